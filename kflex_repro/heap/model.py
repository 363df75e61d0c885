"""KFlex's heap and its allocator in figures: what a heap takes, what a capacity takes, which fits which.

Facts [read] in the KFlex repository; the file is named at each. Sizes are bytes unless a name says GB (2^30).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 1 << 30
PAGE = 4096
# ffkx_heap(): max_entries = size in GB × this (bpf/include/ffkx_heap.bpf.h).
PAGES_PER_GB = GIB // PAGE


@dataclass(frozen=True)
class Heap:
    """One declared heap: ``gb`` as declared; ``file`` and ``line`` where; ``eager``: RAM is taken at creation."""

    name: str
    gb: int
    file: str = ""
    line: int = 0
    eager: bool = True

    @property
    def pages(self) -> int:
        """max_entries of the map."""
        return self.gb * PAGES_PER_GB

    @property
    def bytes(self) -> int:
        """The heap itself."""
        return self.gb * GIB

    @property
    def ram_bytes(self) -> int:
        """RAM that creating the map takes; 0 for a lazy heap."""
        raise NotImplementedError

    @property
    def address_bytes(self) -> int:
        """User address space that the mapping takes."""
        return self.bytes

    @property
    def alignment(self) -> int:
        """What the user and the kernel address must be aligned to."""
        return self.bytes


@dataclass(frozen=True)
class Allocator:
    """How the user-space program fills a heap before the first request."""

    cpus: int
    class_bytes: tuple[int, ...] = (16, 32, 64, 96, 128, 192)
    header: int = 16
    percpu_objects: int = 512
    doubled: bool = True
    hash_entries: int = 1_000_000


@dataclass(frozen=True)
class Need:
    """What a capacity takes of a heap, part by part."""

    objects: int
    prefill: int
    caches: int
    hash_map: int
    other: int
    jemalloc: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.prefill + self.caches + self.hash_map + self.other + self.jemalloc


@dataclass(frozen=True)
class Machine:
    """What a plan is made for: RAM, bits of user address space, possible CPUs."""

    ram_total: int
    ram_available: int
    va_bits: int
    cpus: int


@dataclass(frozen=True)
class Problem:
    """Why a plan does not work: ``what`` in one line with the numbers, ``nearest_gb`` the nearest size that does.

    ``id``: size, power-of-two, ram, address-space, capacity. ``heap`` is the heap's name ("" for all together).
    """

    id: str
    what: str
    heap: str = ""
    nearest_gb: int | None = None
    nearest_objects: int | None = None


def need(objects: int, allocator: Allocator) -> Need:
    """What a capacity of ``objects`` (per size class) takes."""
    raise NotImplementedError


def smallest_gb(objects: int, allocator: Allocator) -> int:
    """The smallest heap, a power of two in GB, that ``objects`` fit into."""
    raise NotImplementedError


def largest_objects(gb: int, allocator: Allocator) -> int:
    """The largest capacity (even) that fits into a heap; 0 if none does."""
    raise NotImplementedError


def largest_gb(ram: int, va_bits: int) -> int:
    """The largest eager heap, a power of two in GB, for so much RAM and address space; 0 if none fits."""
    raise NotImplementedError


def auto_gb(machine: Machine) -> int:
    """What ``fit-heap --auto`` means: leaves room for the rest of the machine; 0 if no heap fits."""
    raise NotImplementedError


def machine() -> Machine:
    """This machine, now."""
    raise NotImplementedError


def parse_gb(text: str, where: str = "--gb") -> int:
    """A heap size a user typed: a power of two of whole GB. KflexError names the nearest that works."""
    raise NotImplementedError


def check(heaps: Sequence[Heap], on: Machine, capacities: Mapping[str, int]) -> list[Problem]:
    """All that keeps these heaps, with these capacities (objects by heap name), from working on a machine."""
    raise NotImplementedError
