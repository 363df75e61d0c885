"""A typed binding over the system's libbpf: objects, maps, programs, links, BTF layouts."""

from kflex_repro.bpf.links import Link, Program
from kflex_repro.bpf.maps import Map
from kflex_repro.bpf.object import Object, VerifierError

__all__ = ["Link", "Map", "Object", "Program", "VerifierError"]
