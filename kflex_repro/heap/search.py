"""Where in the user address space a heap can go: a search's outcome on paper, and for real."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """A search for an aligned address: ``tries`` candidates from ``start`` on, ``step`` bytes apart."""

    start: int
    step: int
    tries: int
    alignment: int
    size: int
    down: bool = True

    def addresses(self) -> range:
        """The candidates, in order; try 1 is the first."""
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """What a search came to. ``address`` and ``attempt`` (from 1) are None if no try succeeded.

    ``first`` and ``last`` are the first and the last address tried, ``tried`` how many were; of them
    ``above_task_size`` did not end within user space (ENOMEM), ``occupied`` met a mapping (EEXIST).
    ``errno`` is the last failed try's, 0 after a success.
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
    errno: int


def artifact(size: int) -> Search:
    """The search of the artifact's libbpf for a heap of ``size`` bytes."""
    raise NotImplementedError


def fixed(size: int, va_bits: int | None = None) -> Search:
    """The same search from the real end of user space (this machine's unless ``va_bits`` are given)."""
    raise NotImplementedError


def task_size(bits: int) -> int:
    """Where user space ends (exclusive) with so many bits of it."""
    raise NotImplementedError


def va_bits() -> int:
    """Bits of user address space here, measured with mmap."""
    raise NotImplementedError


def mappings() -> list[range]:
    """This process's mappings (/proc/self/maps)."""
    raise NotImplementedError


def on_paper(search: Search, task_size: int, occupied: list[range] | None = None) -> Outcome:
    """The outcome with user space ending at ``task_size`` and the ``occupied`` ranges (none unless given) taken."""
    raise NotImplementedError


def for_real(search: Search) -> Outcome:
    """The outcome of real mmaps of a memfd (MAP_SHARED|MAP_FIXED_NOREPLACE), unmapped at once, nothing touched."""
    raise NotImplementedError
