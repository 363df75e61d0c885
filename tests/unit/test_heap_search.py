"""The address search: on paper for every address space, and with real mmaps for the one that is here."""

from __future__ import annotations

import ctypes
import errno
import mmap
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kflex_repro import memory
from kflex_repro.errors import KflexError
from kflex_repro.heap import search
from kflex_repro.heap.search import Outcome, Search

GIB = 1 << 30
TIB = 1 << 40
SIZES = [1 << power for power in range(10)]


def on_paper(bits: str, gb: int, old: bool = True) -> Outcome:
    end = search.platform(bits).task_size
    wanted = search.artifact(gb * GIB) if old else search.from_end(gb * GIB, end)
    return search.on_paper(wanted, end)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def agreed(wanted: Search) -> tuple[Outcome, Outcome]:
    """Paper's and the real outcome of a search, where nothing came or went in between.

    Paper knows what is mapped from /proc/self/maps, so address randomisation needs no tolerance. The
    interpreter may map memory between reading that and searching: then both are done again.
    """
    for _ in range(20):
        before = search.on_paper(wanted, memory.task_size(), search.mappings())
        real = search.for_real(wanted)
        after = search.on_paper(wanted, memory.task_size(), search.mappings())
        if before == after:
            return before, real
    pytest.fail("the mappings of this process never stand still")


# -- for real --


@pytest.mark.parametrize("gb", SIZES)
@pytest.mark.parametrize("which", [search.artifact, search.fixed])
def test_paper_and_real_mmaps_agree(which: Callable[[int], Search], gb: int) -> None:
    """Outcome, try, address, and why each of the others failed: exactly."""
    paper, real = agreed(which(gb * GIB))
    assert real == paper
    assert real.refused_inside == 0
    if real.address is not None:
        assert real.address % (gb * GIB) == 0
        assert real.address + gb * GIB <= memory.task_size()


@pytest.mark.parametrize("gb", SIZES)
def test_the_fixed_search_finds_a_place_for_every_size_here(gb: int) -> None:
    found = search.for_real(search.fixed(gb * GIB))
    assert found.attempt is not None
    # Two can end above user space; what is mapped near its end (stack, libraries) lies in 2 TiB at most.
    assert found.above_task_size <= 2
    assert found.occupied <= max(3, 2 * TIB // (gb * GIB))


@pytest.mark.parametrize("gb", SIZES)
def test_how_far_the_artifacts_search_comes_here(gb: int) -> None:
    """By arithmetic: so many of the candidates 2^48, 2^48 - size, … end above user space; 1,024 are tried."""
    size, end = gb * GIB, memory.task_size()
    above = min(1024, max(0, -(-((1 << 48) + size - end) // size)))
    found = search.for_real(search.artifact(size))
    assert found.above_task_size == above
    if above == 1024:
        assert (found.address, found.errno, found.tried) == (None, errno.ENOMEM, 1024)
    else:
        assert found.attempt == above + found.occupied + 1


def test_nothing_stays_mapped_and_no_memory_is_taken() -> None:
    fds = open_files()
    search.for_real(search.fixed(512 * GIB))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = search.for_real(search.fixed(512 * GIB))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096
    assert found.address is not None
    assert not any(span.start == found.address for span in search.mappings())
    assert open_files() == fds


@pytest.fixture
def occupy() -> Iterator[Callable[[int], None]]:
    """Map a page at an address until the test is over."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    taken: list[int] = []

    def at(address: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | memory.MAP_FIXED_NOREPLACE
        assert libc.mmap(address, mmap.PAGESIZE, 0, flags, -1, 0) == address
        taken.append(address)

    yield at
    for address in taken:
        assert libc.munmap(address, mmap.PAGESIZE) == 0


def test_a_mapping_in_the_way_is_stepped_over(occupy: Callable[[int], None]) -> None:
    """One page anywhere in the candidate's range is enough."""
    wanted = search.fixed(4 * GIB)
    free = search.for_real(wanted)
    assert free.address is not None
    occupy(free.address + 3 * GIB)
    paper, real = agreed(wanted)
    assert real == paper
    assert real.occupied > free.occupied
    assert real.address is not None
    assert real.address < free.address


starts = st.integers(0, 1 << 48).map(lambda address: address & -mmap.PAGESIZE)


@settings(max_examples=150, deadline=None)
@given(
    start=starts,
    step=st.integers(12, 42).map(lambda power: 1 << power),
    tries=st.integers(1, 40),
    size=st.integers(16, 45).map(lambda power: 1 << power),
    down=st.booleans(),
)
def test_any_search_agrees(start: int, step: int, tries: int, size: int, down: bool) -> None:
    """Also one that starts inside user space, meets our libraries, or is longer than user space."""
    # Below mmap_min_addr (64 KiB) the kernel says EPERM; no heap ever goes there.
    wanted = Search(start + (1 << 20), step, tries, step, size, down)
    if min(wanted.addresses()) < 1 << 20:
        return
    paper, real = agreed(wanted)
    assert real == paper


def test_a_limit_is_told_from_the_end_of_user_space() -> None:
    """With ulimit -v all tries are ENOMEM, those inside user space too: they are counted apart."""
    script = (
        "import resource, json\n"
        "from kflex_repro import memory\n"
        "from kflex_repro.heap import search\n"
        "memory.task_size()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "found = search.for_real(search.fixed(4 << 30))\n"
        "print(found.address, found.errno, found.above_task_size, found.refused_inside > 1000)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    paper = search.on_paper(search.fixed(4 * GIB), memory.task_size())
    assert ran.stdout.split() == ["None", str(errno.ENOMEM), str(paper.above_task_size), "True"]


def test_the_end_of_user_space_is_measured() -> None:
    """The last page below it can be mapped (or is), the one after it cannot."""
    end = memory.task_size()
    assert memory.try_map(end - memory.PAGE, memory.PAGE) in (0, errno.EEXIST)
    assert memory.try_map(end, memory.PAGE) == errno.ENOMEM
    assert end <= 1 << memory.va_bits() < 2 * end
    assert search.here().task_size == end == search.task_size(memory.va_bits())


# -- on paper --


@pytest.mark.parametrize(
    ("bits", "works"),
    [
        # 1,024 steps from 2^48 must reach user space: with 2^47 of it, from 256 GB on.
        ("47", [256, 512]),
        ("sv48", [256, 512]),
        # arm64: the second try.
        ("48", SIZES),
        # Larger than the start: the first.
        ("56", SIZES),
        ("57", SIZES),
        ("sv57", SIZES),
        # 2^39 and 2^38: the loop gives up before it comes so low, or ends at 0; with 256 GB it comes to 2^38.
        ("39", [256]),
        ("sv39", []),
    ],
)
def test_which_sizes_the_artifacts_search_finds(bits: str, works: list[int]) -> None:
    assert [gb for gb in SIZES if on_paper(bits, gb).address is not None] == works


@pytest.mark.parametrize(
    ("bits", "gb", "attempt"),
    [
        # After the 512 steps to 2^47: that, the heap whose last page is not user space, and then it fits.
        ("47", 256, 515),
        ("47", 512, 259),
        ("sv48", 256, 514),
        ("48", 4, 2),
        ("56", 4, 1),
        ("57", 4, 1),
    ],
)
def test_at_which_try(bits: str, gb: int, attempt: int) -> None:
    assert on_paper(bits, gb).attempt == attempt


@pytest.mark.parametrize("bits", ["47", "48", "56", "57", "sv48", "sv57"])
@pytest.mark.parametrize("gb", SIZES)
def test_the_fixed_search_needs_three_tries_at_most(bits: str, gb: int) -> None:
    found = on_paper(bits, gb, old=False)
    assert found.attempt in (2, 3)
    assert found.address is not None
    assert found.task_size - (found.address + gb * GIB) < 2 * gb * GIB


@pytest.mark.parametrize(("bits", "largest"), [("39", 256), ("sv39", 128)])
def test_a_small_address_space_has_room_for_half_of_it(bits: str, largest: int) -> None:
    """Address 0 is none: a heap as large as half of user space has one place, a larger one has no place."""
    works = [gb for gb in SIZES if on_paper(bits, gb, old=False).address is not None]
    assert works == [gb for gb in SIZES if gb <= largest]


def test_the_4_gb_heap() -> None:
    """The one that cost weeks: it looks at 256 to 252 TiB, and user space ends at 128."""
    found = on_paper("47", 4)
    assert (found.first, found.last) == (256 * TIB, 252 * TIB + 4 * GIB)
    assert (found.tried, found.above_task_size, found.occupied, found.errno) == (1024, 1024, 0, errno.ENOMEM)


def test_names_and_bits() -> None:
    assert search.platform("47").name == search.platform("x86-64").name == "x86-64"
    assert search.platform("56").name == "la57"
    assert search.task_size(47) == (1 << 47) - 4096
    assert search.task_size(48) == 1 << 48
    assert search.platform("sv39").task_size == 1 << 38
    for text in ("29", "58", "64", "x86", "", "-47", "４７"):
        with pytest.raises(KflexError, match="is no address space"):
            search.platform(text)


def test_a_size_that_is_no_power_of_two_is_a_mistake_of_the_caller() -> None:
    for size in (0, -1, 3 * GIB):
        with pytest.raises(ValueError, match="not a power of two"):
            search.artifact(size)
