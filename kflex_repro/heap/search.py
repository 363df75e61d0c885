"""Where in the user address space a heap can go: a search's outcome on paper, and for real."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kflex_repro import memory
from kflex_repro.errors import KflexError

# The loop over BPF_MAP_TYPE_HEAP in bpf_object__create_maps() of the artifact's libbpf/src/libbpf.c [read].
ARTIFACT_START = 1 << 48
TRIES = 1024


@dataclass(frozen=True)
class Platform:
    """A kind of user address space: ``bits`` of it, without the last ``guard`` bytes."""

    name: str
    bits: int
    guard: int
    text: str

    @property
    def task_size(self) -> int:
        """Where user space ends (exclusive)."""
        return (1 << self.bits) - self.guard


# TASK_SIZE of the kernel's arch/*/include/asm [read]. x86-64 leaves out a page; riscv64 halves its sv bits.
PLATFORMS = (
    Platform("x86-64", 47, memory.PAGE, "x86-64, 4-level paging"),
    Platform("la57", 56, memory.PAGE, "x86-64, 5-level paging (LA57)"),
    Platform("arm64", 48, 0, "arm64, 48-bit addresses"),
    Platform("arm64-39", 39, 0, "arm64, 39-bit addresses"),
    Platform("sv39", 38, 0, "riscv64, sv39"),
    Platform("sv48", 47, 0, "riscv64, sv48"),
    Platform("sv57", 56, 0, "riscv64, sv57"),
)


def platform(text: str) -> Platform:
    """A platform by its name, or by its bits of user space (30 to 57; of two with the same, x86-64's)."""
    for known in PLATFORMS:
        if text in (known.name, str(known.bits)):
            return known
    if text.isascii() and text.isdigit() and 30 <= int(text) <= 57:
        return Platform(text, int(text), 0, f"{int(text)} bits of user space")
    names = ", ".join(known.name for known in PLATFORMS)
    raise KflexError(
        f"'{text}' is no address space",
        "--va-bits",
        f"say the bits of user space (30 to 57), or one of {names}",
    )


def here() -> Platform:
    """This machine's address space, measured."""
    bits, end = memory.va_bits(), memory.task_size()
    return Platform("here", bits, (1 << bits) - end, f"this machine, {bits} bits of user space")


@dataclass(frozen=True)
class Search:
    """A search for an aligned address: at most ``tries`` candidates from ``start`` on, ``step`` bytes apart.

    Address 0 ends it, as in the artifact's loop.
    """

    start: int
    step: int
    tries: int
    alignment: int
    size: int
    down: bool = True

    def addresses(self) -> range:
        """The candidates, in order; the first is try 1."""
        if not self.down:
            return range(self.start, self.start + self.tries * self.step, self.step)
        return range(self.start, max(0, self.start - self.tries * self.step), -self.step)


@dataclass(frozen=True)
class Outcome:
    """What a search came to. ``address`` and ``attempt`` (from 1) are None if no try succeeded.

    ``first`` and ``last`` are the first and the last address tried, ``tried`` how many were. Of them
    ``above_task_size`` did not end within user space (ENOMEM), ``occupied`` met a mapping (EEXIST), and
    ``refused_inside`` failed although they lay within it (a limit: RLIMIT_AS, max_map_count; only for real).
    ``errno`` is the last try's, 0 after a success: what the artifact reports.
    """

    search: Search
    task_size: int
    address: int | None
    attempt: int | None
    first: int
    last: int
    tried: int
    above_task_size: int
    occupied: int
    refused_inside: int
    errno: int


def _checked(size: int) -> int:
    if size <= 0 or size & (size - 1):
        raise ValueError(f"a heap of {size} bytes: not a power of two")
    return size


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def artifact(size: int) -> Search:
    """The search of the artifact's libbpf for a heap of ``size`` bytes (a power of two)."""
    _checked(size)
    return Search(_round_up(ARTIFACT_START, size), size, TRIES, size, size)


def fixed(size: int, va_bits: int | None = None) -> Search:
    """The same search from the end of user space: this machine's, or that of ``va_bits``."""
    end = memory.task_size() if va_bits is None else task_size(va_bits)
    return from_end(size, end)


def from_end(size: int, end: int) -> Search:
    """The artifact's search, but starting where user space really ends (rounded up to ``size``)."""
    return Search(_round_up(end, _checked(size)), size, TRIES, size, size)


def task_size(bits: int) -> int:
    """Where user space ends (exclusive) with so many bits of it."""
    return platform(str(bits)).task_size


def mappings() -> list[range]:
    """This process's mappings, by /proc/self/maps."""
    spans = (line.split(None, 1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def _run(search: Search, end: int, attempt_at: Callable[[int], int]) -> Outcome:
    above = occupied = inside = tried = code = 0
    address = None
    last = search.start
    for candidate in search.addresses():
        tried += 1
        last = candidate
        code = attempt_at(candidate)
        if code == 0:
            address = candidate
            break
        if code == errno.EEXIST:
            occupied += 1
        elif candidate + search.size > end:
            above += 1
        else:
            inside += 1
    return Outcome(
        search=search,
        task_size=end,
        address=address,
        attempt=tried if address is not None else None,
        first=search.start,
        last=last,
        tried=tried,
        above_task_size=above,
        occupied=occupied,
        refused_inside=inside,
        errno=code,
    )


def on_paper(search: Search, task_size: int, occupied: Sequence[range] = ()) -> Outcome:
    """The outcome if user space ends at ``task_size`` and the ``occupied`` ranges of it are taken."""

    def attempt_at(address: int) -> int:
        if address + search.size > task_size:
            return errno.ENOMEM
        taken = any(span.start < address + search.size and address < span.stop for span in occupied)
        return errno.EEXIST if taken else 0

    return _run(search, task_size, attempt_at)


def for_real(search: Search) -> Outcome:
    """The outcome of real mmaps: of a memfd, MAP_SHARED|MAP_FIXED_NOREPLACE, as the artifact maps its heap.

    Each is unmapped at once and nothing is touched: it takes addresses, no memory.
    """
    fd = os.memfd_create("kflex-heap-search")
    try:
        return _run(search, memory.task_size(), lambda address: memory.try_map(address, search.size, fd))
    finally:
        os.close(fd)
