"""This machine's RAM and user address space, and the one rule of what fits into the RAM.

The offload's table and the artifact's heaps are both allocated whole when their maps are made:
`--table-size auto` and `fit-heap --auto` plan them with the functions here.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
from fractions import Fraction
from pathlib import Path
from typing import Any

from kflex_repro.errors import KflexError

MIB = 1 << 20
GIB = 1 << 30
PAGE = mmap.PAGESIZE

# Linux's, the same on every architecture that we name; Python's mmap module has it from 3.13 on.
MAP_FIXED_NOREPLACE = 0x100000
_MAP_FAILED = ctypes.c_void_p(-1).value


# --- RAM --------------------------------------------------------------------------------------------------


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes (its counts of huge pages, too, times 1024)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def available() -> int:
    """MemAvailable in bytes."""
    return meminfo().get("MemAvailable", 0)


def share(free: int, part: Fraction, least: int, most: int) -> int:
    """What an automatic size takes of ``free`` bytes: that part of them, within ``least`` and ``most``."""
    return max(least, min(most, int(free * part)))


def amount(size: int) -> str:
    """Bytes for a reader: MiB below 1 GiB, else GiB with at most two decimals."""
    if size < GIB:
        return f"{size >> 20} MiB"
    return f"{size / GIB:,.2f}".rstrip("0").rstrip(".") + " GiB"


def misfit(what: str, size: int, free: int) -> str | None:
    """Why ``what`` (``size`` bytes taken at once) does not fit into ``free`` bytes of RAM, or None."""
    return None if size <= free else f"{what} does not fit into {amount(free)} of free RAM"


# --- address space ----------------------------------------------------------------------------------------


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def try_map(address: int, size: int, fd: int = -1) -> int:
    """0 if ``size`` bytes can be mapped at exactly ``address``, else the errno of mmap.

    Shared with ``fd``, or anonymous; unmapped at once, never touched. EEXIST: something else is mapped there.
    """
    sharing = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    libc = _libc()
    flags = sharing | MAP_FIXED_NOREPLACE
    found = libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if found == _MAP_FAILED:
        return ctypes.get_errno()
    libc.munmap(found, size)
    # A kernel before 4.17 takes the address for a hint.
    return 0 if found == address else errno.EEXIST


@functools.cache
def va_bits() -> int:
    """Bits of user address space: 47 on x86-64 (56 with 5-level paging), found by mapping single pages.

    KflexError if not even a page can be mapped (RLIMIT_AS).
    """
    for bits in range(63, 29, -1):
        if try_map(1 << (bits - 1), PAGE) in (0, errno.EEXIST):
            return bits
    raise KflexError("not one page can be mapped", "address space limit", "ulimit -v unlimited")


@functools.cache
def task_size() -> int:
    """Where user space ends here (exclusive): x86-64 leaves the last page below 2^47 out."""
    end = 1 << va_bits()
    return end if try_map(end - PAGE, PAGE) in (0, errno.EEXIST) else end - PAGE
