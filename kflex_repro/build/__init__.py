"""Builds vmlinux.h, the BPF objects and kflex.so into a content-hashed cache; a second call is instant."""

from kflex_repro.build.objects import Built, ensure
from kflex_repro.build.toolchain import BuildError

__all__ = ["BuildError", "Built", "ensure"]
