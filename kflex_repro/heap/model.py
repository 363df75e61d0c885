"""KFlex's heap and its allocator in figures: what a heap takes, what a capacity takes, which fits which.

Facts [read] in the KFlex repository have the file named; those of jemalloc are [measured] with Debian 12's
5.3.0 (tests/artifact/fill.c fills a heap the same way). Sizes are bytes unless a name says GB (2^30).

Each allocation of the program is made twice: with mallocx, from a jemalloc arena that has the heap as its
memory, and from a bump pointer over the heap; only the second is used. What the first takes depends:

- As published, the arena's number is lost when the allocator is moved (BPFHeapAllocator.hpp), and mallocx
  most likely takes ordinary memory, untouched: ``doubled=False``. But no standard says what the number is.
- With the right arena and ``MALLOC_CONF=retain:false`` in the program's environment it takes as much again.
- With the right arena and jemalloc's default, ``retain:true``, it takes 2 MiB for every slab of 4 to 28 KiB
  and leaks the rest, as the arena's hooks cannot split an extent: 60 times as much.

A plan is for the second: with that setting the program then starts in either case.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, count
from pathlib import Path

from kflex_repro import memory
from kflex_repro.errors import KflexError
from kflex_repro.heap import search

GIB = memory.GIB
PAGE = 4096
# ffkx_heap(): max_entries = size in GB × this (bpf/include/ffkx_heap.bpf.h).
PAGES_PER_GB = GIB // PAGE
# max_entries is 32 bits wide; the largest power of two of GB whose pages it can count.
MAX_GB = 8192
# What the program is to be started with, for a plan to hold.
ENVIRONMENT = {"MALLOC_CONF": "retain:false"}
# The kernel's vmalloc of a heap: a pointer and a page-table entry for each page.
VMALLOC_PER_PAGE = 16
# `--auto` leaves the rest of the free RAM to everything else.
AUTO_PART = Fraction(3, 4)
# The capacities of src/Main.cpp are C ints, and PopulateMallocCache() asserts that they are even.
MAX_OBJECTS = (1 << 31) - 2
# struct ffkx_malloc_cache: 11 size classes of 32 bytes each (bpf/include/ffkx_malloc.h).
_CACHE_BYTES = 11 * 32
CLASS_BYTES = (16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)

# jemalloc with 4 KiB pages: arena metadata comes in blocks of 2, 4, 6, … MiB, 128 bytes for each extent.
_HUGE = 2 << 20
_SMALL_MAX = 14336
_EXTENT_META = 128
_ARENA_META = 96 << 10


@dataclass(frozen=True)
class Heap:
    """One declared heap: ``gb`` as declared, ``file`` and ``line`` where.

    ``eager``: RAM is taken when the map is made, as by KFlex's kernel. ``name`` is unique in a plan; heaps of
    one ``file`` (one BPF object) are made together.
    """

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
        """RAM that making the map takes: the pages and what the kernel needs to map them; 0 if lazy."""
        return self.pages * (PAGE + VMALLOC_PER_PAGE) if self.eager else 0

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
    """How the user-space program fills a heap before its first request (src/Main.cpp, BPFHeapAllocator.hpp).

    ``cpus`` are the possible CPUs. ``class_bytes`` are the size classes that are filled, each with the
    capacity, and with ``percpu_objects`` for each CPU, ``header`` bytes before each object. ``doubled``: each
    allocation is made twice, with mallocx and from the bump pointer (AllocateNew). ``retain`` is jemalloc's
    setting of that name (its default is on; ENVIRONMENT switches it off). ``buffer_bytes`` is a CPU's key or
    value buffer (512 for Redis).
    """

    cpus: int
    class_bytes: tuple[int, ...] = CLASS_BYTES[:6]
    header: int = 16
    percpu_objects: int = 512
    doubled: bool = True
    retain: bool = False
    hash_entries: int = 1_000_000
    buffer_bytes: int = 1024


@dataclass(frozen=True)
class Need:
    """What a capacity takes of a heap, part by part.

    The objects of the global lists (``prefill``) and of the CPUs' (``caches``), the hash map's buckets,
    ``other`` things of fixed size, and what ``jemalloc`` takes besides.
    """

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
    """Why a plan does not work: ``what``, one line with the numbers, and the nearest size that does work.

    ``id``: size, power-of-two, ram, address-space, capacity. ``heap``: its name, or several, comma between.
    """

    id: str
    what: str
    heap: str = ""
    nearest_gb: int | None = None
    nearest_objects: int | None = None


# --- jemalloc ---------------------------------------------------------------------------------------------


def _size_class(size: int) -> int:
    """jemalloc's size class: multiples of 16 to 128, then four to each doubling."""
    if size <= 128:
        return -(-size // 16) * 16
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


def _slab(size_class: int) -> int:
    """The fewest pages that a whole number of objects fills."""
    return next(pages * PAGE for pages in count(1) if pages * PAGE % size_class == 0)


def _grown(extent: int, retain: bool) -> int:
    """What jemalloc takes from the hook to get one extent.

    With retain it first takes a larger one, at least 2 MiB, to split it. The hooks have no split: that one is
    lost, and one of the exact size is taken.
    """
    return extent + _size_class(max(_HUGE, extent)) if retain else extent


def _jemalloc(requests: Mapping[int, int], retain: bool) -> int:
    """What jemalloc takes from the hook for so many allocations of each size."""
    small: dict[int, int] = {}
    taken = extents = 0
    for size, times in requests.items():
        size_class = _size_class(size)
        if size_class <= _SMALL_MAX:
            small[size_class] = small.get(size_class, 0) + times
        else:
            taken += times * _grown(size_class + PAGE, retain)
            extents += times
    for size_class, times in small.items():
        slab = _slab(size_class)
        slabs = -(-times // (slab // size_class))
        taken += slabs * _grown(slab, retain)
        extents += slabs
    metadata = _ARENA_META + extents * _EXTENT_META
    blocks = accumulate(_HUGE * step for step in count(1))
    return taken + next(total for total in blocks if total >= metadata)


# --- capacities -------------------------------------------------------------------------------------------


def _round8(size: int) -> int:
    return -(-size // 8) * 8


def _power_of_two(value: int) -> int:
    """The next power of two, 1 at least."""
    return 1 << max(0, value - 1).bit_length()


def need(objects: int, allocator: Allocator) -> Need:
    """What a capacity of ``objects`` (in each size class) takes of a heap, never less than it really does."""
    if objects < 0:
        raise ValueError(f"a capacity of {objects} objects")
    at = allocator
    per_class = at.percpu_objects * at.cpus
    sizes = [_round8(at.header + size) for size in at.class_bytes]
    buckets = _power_of_two(at.hash_entries) * 8
    # The first page (a valid object must not look like NULL), both kinds of cache heads, the map's header
    # with a pointer for each CPU, the skip list's 32 predecessors, a key and a value buffer.
    fixed = [PAGE, _CACHE_BYTES * at.cpus, _CACHE_BYTES, 32 + 8 * at.cpus, 256]
    fixed += [at.buffer_bytes * at.cpus] * 2
    taken_by_jemalloc = 0
    if at.doubled:
        requests = dict.fromkeys(sizes, objects + per_class)
        for size in (*fixed, buckets):
            requests[size] = requests.get(size, 0) + 1
        taken_by_jemalloc = _jemalloc(requests, at.retain)
    return Need(
        objects=objects,
        prefill=objects * sum(sizes),
        caches=per_class * sum(sizes),
        hash_map=buckets,
        other=sum(map(_round8, fixed)),
        jemalloc=taken_by_jemalloc,
    )


def smallest_gb(objects: int, allocator: Allocator) -> int:
    """The smallest heap, a power of two in GB, that ``objects`` fit into (it may be more than MAX_GB)."""
    return _power_of_two(-(-need(objects, allocator).bytes // GIB))


def largest_objects(gb: int, allocator: Allocator) -> int:
    """The largest capacity (even) that fits into a heap; 0 if none does."""
    fits, too_many = 0, MAX_OBJECTS // 2 + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if need(2 * middle, allocator).bytes <= gb * GIB:
            fits = middle
        else:
            too_many = middle
    return 2 * fits


# --- the machine ------------------------------------------------------------------------------------------


def possible_cpus() -> int:
    """The CPUs that may ever be there (libbpf_num_possible_cpus): caches are filled for all of them."""
    try:
        spans = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")
        ends = [span.partition("-")[::2] for span in spans]
        return sum(int(last or first) - int(first) + 1 for first, last in ends)
    except (OSError, ValueError):
        return os.cpu_count() or 1


def machine() -> Machine:
    """This machine, now."""
    info = memory.meminfo()
    return Machine(info["MemTotal"], info.get("MemAvailable", 0), memory.va_bits(), possible_cpus())


def _sizes() -> Iterator[int]:
    """All sizes that a heap can have, the largest first."""
    gb = MAX_GB
    while gb:
        yield gb
        gb //= 2


def _has_place(gb: int, va_bits: int) -> bool:
    end = search.task_size(va_bits)
    return search.on_paper(search.from_end(gb * GIB, end), end).address is not None


def largest_gb(ram: int, va_bits: int, heaps: int = 1) -> int:
    """The largest size, a power of two in GB, of so many eager heaps together in ``ram``; 0 if none fits."""
    for gb in _sizes():
        if heaps * Heap("", gb).ram_bytes <= ram and _has_place(gb, va_bits):
            return gb
    return 0


def auto_gb(on: Machine, heaps: int = 1) -> int:
    """What ``fit-heap --auto`` means: the largest heap in three quarters of the free RAM; 0 if none fits."""
    return largest_gb(memory.share(on.ram_available, AUTO_PART, 0, on.ram_total), on.va_bits, heaps)


def _nearest(gb: float) -> int:
    """The power of two nearest to a size, within what a heap can have."""
    return min(_sizes(), key=lambda size: (abs(size - gb), size))


def parse_gb(text: str, where: str = "--gb") -> int:
    """A heap size that a user typed: a power of two of whole GB. KflexError names the nearest that works."""
    text = text.strip()
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,4})?", text, re.ASCII) or len(text) > 40:
        raise KflexError(f"'{text[:40]}' is not a number of GB", where, "say a power of two: 1, 2, 4, 8, …")
    # Exact: 1e300 must not become a float, nor 4.0000000000000001 a 4.
    mantissa, _, exponent = text.lower().partition("e")
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    found = _wrong_size(value, text)
    if found is not None:
        what, nearest = found
        raise KflexError(what, where, f"nearest that works: {nearest}")
    return int(value)


def _wrong_size(value: Fraction | int, text: str) -> tuple[str, int] | None:
    whole = int(value)
    if value <= 0:
        return f"a heap of {text} GB is none", 1
    if value > MAX_GB:
        return (
            f"a heap of {text} GB has more pages than max_entries (32 bits) can count",
            MAX_GB,
        )
    if value != whole:
        return f"a heap of {text} GB: ffkx_heap() takes whole GB", _nearest(float(value))
    if whole & (whole - 1):
        return f"a heap of {text} GB: the kernel wants a power of two of pages", _nearest(whole)
    return None


# --- the check --------------------------------------------------------------------------------------------


def check(
    heaps: Sequence[Heap],
    on: Machine,
    capacities: Mapping[str, int],
    allocator: Allocator | None = None,
) -> list[Problem]:
    """All that keeps these heaps, with these capacities (objects by heap name), from working on a machine.

    RAM is counted for the heaps of one file together. Without ``allocator``: the artifact's, on the machine's
    CPUs.
    """
    filling = allocator or Allocator(cpus=on.cpus)
    problems: list[Problem] = []
    for heap in heaps:
        wrong = _wrong_size(heap.gb, str(heap.gb))
        if wrong:
            what, nearest = wrong
            kind = "power-of-two" if 0 < heap.gb <= MAX_GB else "size"
            problems.append(Problem(kind, f"{heap.name}: {what}", heap.name, nearest))
            continue
        if not _has_place(heap.gb, on.va_bits):
            end = search.task_size(on.va_bits)
            problems.append(
                Problem(
                    "address-space",
                    f"{heap.name}: {heap.gb} GB aligned to {heap.gb} GB has no place in "
                    f"{memory.amount(end)} of user address space",
                    heap.name,
                    largest_gb(on.ram_available, on.va_bits) or None,
                )
            )
        if heap.name in capacities:
            problems += _capacity_problems(heap, capacities[heap.name], filling)
    for file in dict.fromkeys(heap.file for heap in heaps):
        problems += _ram_problems([heap for heap in heaps if heap.file == file and heap.eager], on)
    return problems


def _capacity_problems(heap: Heap, objects: int, filling: Allocator) -> Iterator[Problem]:
    most = largest_objects(heap.gb, filling)
    if not 0 <= objects <= MAX_OBJECTS or objects % 2:
        what = f"{heap.name}: a capacity of {objects:,}: it must be even, and 0 to {MAX_OBJECTS:,}"
        nearest = min(most, MAX_OBJECTS, max(0, objects - objects % 2))
        yield Problem("capacity", what, heap.name, None, nearest)
        return
    wanted = need(objects, filling).bytes
    if wanted > heap.bytes:
        gb = smallest_gb(objects, filling)
        yield Problem(
            "capacity",
            f"{heap.name}: {objects:,} objects take {memory.amount(wanted)} of a heap of {heap.gb} GB, "
            f"which holds {most:,}",
            heap.name,
            gb if gb <= MAX_GB else None,
            most,
        )


def _ram_problems(together: Sequence[Heap], on: Machine) -> Iterator[Problem]:
    valid = [heap for heap in together if heap.gb > 0]
    taken = sum(heap.ram_bytes for heap in valid)
    names = " + ".join(heap.name for heap in valid)
    sizes = " + ".join(str(heap.gb) for heap in valid)
    line = memory.misfit(f"{names}: {sizes} GB ({memory.amount(taken)} when made)", taken, on.ram_available)
    if line:
        nearest = largest_gb(on.ram_available, on.va_bits, len(valid)) or None
        yield Problem("ram", line, ", ".join(heap.name for heap in valid), nearest)
