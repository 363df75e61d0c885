"""Uprobes at many places of one file: by one link for each chunk (Linux 6.6), else one by one.

libbpf 1.1 knows no uprobe_multi, so that link is made by bpf(2) itself.
"""

from __future__ import annotations

import ctypes as c
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.bpf.libbpf import AttachType
from kflex_repro.bpf.links import Link, Program
from kflex_repro.errors import KflexError, Unavailable, os_failure

_BPF_LINK_CREATE = 28
_F_RETURN = 1
_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
CHUNK = 256


@dataclass(frozen=True)
class Place:
    """An offset in a file (bytes) and what the program gets as its cookie there."""

    offset: int
    cookie: int


def attach_multi(
    program: Program, path: Path, places: Sequence[Place], pid: int = 0, returning: bool = False
) -> Link:
    """One link for all places; the program was loaded with expected attach type TRACE_UPROBE_MULTI.

    ``pid`` 0 is every process. The kernel takes all places or, with an error, none.
    """
    machine = os.uname().machine
    if machine not in _SYS_BPF:
        raise Unavailable("uprobe_multi is not known here", machine)
    name = c.create_string_buffer(os.fsencode(path))
    offsets = (c.c_uint64 * len(places))(*(place.offset for place in places))
    cookies = (c.c_uint64 * len(places))(*(place.cookie for place in places))
    attributes = struct.pack(
        "<IIIIQQQQIIII",
        *(program.fd, 0, AttachType.TRACE_UPROBE_MULTI, 0),
        *(c.addressof(name), c.addressof(offsets), 0, c.addressof(cookies)),
        *(len(places), _F_RETURN if returning else 0, pid, 0),
    )
    libc = c.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_BPF[machine], _BPF_LINK_CREATE, attributes, len(attributes))
    if fd < 0:
        raise os_failure("attaching uprobes", c.get_errno(), f"{path}, {len(places)} places")
    return Link(fd=fd, name=program.name)


def attach_all(
    program: Program,
    path: Path,
    places: Sequence[Place],
    *,
    multi: bool,
    pid: int = 0,
    returning: bool = False,
    into: list[Link],
    done: Callable[[int], None] = lambda _: None,
) -> list[Place]:
    """Attach at every place that takes a probe; returns those whose instruction the kernel cannot step.

    Links are appended to ``into`` as they are made, so that who is interrupted can take them off. ``done``
    hears how many places each step dealt with. ``multi``: CHUNK at a time; ``program`` was loaded for it.
    """
    refused: list[Place] = []
    if not multi:
        for place in places:
            try:
                into.append(program.attach_uprobe(path, place.offset, place.cookie, pid or -1, returning))
            except KflexError as error:
                _only_the_place(error)
                refused.append(place)
            done(1)
        return refused
    waiting = [places[at : at + CHUNK] for at in range(0, len(places), CHUNK)]
    while waiting:
        chunk = waiting.pop(0)
        try:
            into.append(attach_multi(program, path, chunk, pid, returning))
        except KflexError as error:
            _only_the_place(error)
            if len(chunk) > 1:
                half = len(chunk) // 2
                waiting[:0] = [chunk[:half], chunk[half:]]
                continue
            refused += chunk
        done(len(chunk))
    return refused


def _only_the_place(error: KflexError) -> None:
    """Raise what is not about one instruction: no permission, no such process, no memory."""
    # EINVAL, EOPNOTSUPP, ENOTSUPP, EIO: what uprobe_register() says of an instruction.
    if error.errno not in (22, 95, 524, 5):
        raise error
