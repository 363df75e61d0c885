"""Tries mmaps and map creations in a process of its own, under limits it sets on itself; run as a script.

Reads a JSON list of attempts on standard input, writes the errno of each (0: it worked, and was undone) as a
JSON list. An attempt: {"call": "mmap"|"map_create", "length", "hint", "flags", "limits": {"AS": n}};
limits hold for that attempt and all after it. Nothing is touched, so no memory is taken by the mmaps.
"""

from __future__ import annotations

import ctypes as c
import json
import mmap
import os
import resource
import struct
import sys
from pathlib import Path

_BPF = {"x86_64": 321}.get(os.uname().machine, 280)
_BPF_MAP_CREATE, _ARRAY, _MMAPABLE = 0, 2, 1 << 10
_FAILED = c.c_void_p(-1).value


def _mmap(length: int, hint: int, flags: int) -> int:
    libc = c.CDLL(None, use_errno=True)
    libc.mmap.restype = c.c_void_p
    libc.mmap.argtypes = [c.c_void_p, c.c_size_t, *[c.c_int] * 3, c.c_long]
    libc.munmap.argtypes = [c.c_void_p, c.c_size_t]
    fd = os.memfd_create("kflex-attempt")
    try:
        # A sparse file: its size costs nothing until it is touched.
        os.ftruncate(fd, length)
        address = libc.mmap(hint or None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        if address is None or address == _FAILED:
            return c.get_errno()
        libc.munmap(address, length)
        return 0
    finally:
        os.close(fd)


def map_create(kind: int, key: int, value: int, entries: int, flags: int) -> int:
    """The errno of bpf(BPF_MAP_CREATE), past libbpf, which would hide what the kernel said; 0: it worked."""
    libc = c.CDLL(None, use_errno=True)
    attributes = c.create_string_buffer(struct.pack("<5I", kind, key, value, entries, flags), 72)
    fd = libc.syscall(_BPF, _BPF_MAP_CREATE, attributes, 72)
    if fd < 0:
        return c.get_errno()
    os.close(fd)
    return 0


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def main() -> None:
    """Standard input to standard output."""
    results = []
    for attempt in json.load(sys.stdin):
        try:
            for name, value in attempt.get("limits", {}).items():
                # An address space limit is given beyond what this process has already.
                value += _address_space() if name == "AS" else 0
                hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
            length = attempt["length"]
            if attempt["call"] == "mmap":
                results.append(_mmap(length, attempt.get("hint", 0), attempt.get("flags", mmap.MAP_SHARED)))
            else:
                results.append(map_create(_ARRAY, 4, 4096, length // 4096, _MMAPABLE))
        except OSError as error:
            results.append(error.errno or -1)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
