"""Why a heap can be mapped or not: both searches, in words and as a document."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from kflex_repro import memory
from kflex_repro.heap import model, search
from kflex_repro.heap.search import Outcome, Platform

# What the artifact's programs ask for (kRedisHeapCapacity and the two like it, src/Main.cpp [read]).
ARTIFACT_OBJECTS = 10_000_000
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
TITLES = {"old": "the artifact's search", "fixed": "the same search, from the end of user space"}


@dataclass(frozen=True)
class Case:
    """One search: what came out, for real (``real``) or on paper, and what paper says."""

    name: str
    real: bool
    outcome: Outcome
    paper: Outcome

    @property
    def title(self) -> str:
        """What a reader sees as its name."""
        return TITLES[self.name]


@dataclass(frozen=True)
class Explanation:
    """Both searches (or one) for a heap of ``gb`` GB in one address space."""

    gb: int
    platform: Platform
    cases: tuple[Case, ...]
    machine: model.Machine

    @property
    def top(self) -> int:
        """The highest address of the picture."""
        return max(self.platform.task_size, *(case.outcome.first for case in self.cases))


def explain(gb: int, where: Platform | None, names: tuple[str, ...] = ("old", "fixed")) -> Explanation:
    """Search for a heap's address: for real here (``where`` None), or on paper in another address space."""
    platform = where or search.here()
    end = platform.task_size
    cases = []
    for name in names:
        wanted = search.artifact(gb * model.GIB) if name == "old" else search.from_end(gb * model.GIB, end)
        # What is mapped already is known only here: elsewhere the paper's address space is empty.
        occupied = [] if where else search.mappings()
        paper = search.on_paper(wanted, end, occupied)
        cases.append(Case(name, where is None, paper if where else search.for_real(wanted), paper))
    return Explanation(gb, platform, tuple(cases), model.machine())


def place(address: int) -> str:
    """An address as a distance from 0, in the unit that fits: 127.996 TiB."""
    unit = min(max(0, address.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{address / (1 << 10 * unit):,.3f}".rstrip("0").rstrip(".") + f" {_UNITS[unit]}"


def errno_name(code: int) -> str:
    """ENOMEM for 12."""
    return errno.errorcode.get(code, f"errno {code}")


def tries(outcome: Outcome) -> Iterator[tuple[int, int, str]]:
    """Each try: number, address, and ``mapped``, ``above`` (user space's end), or ``taken``."""
    for number, address in enumerate(outcome.search.addresses()[: outcome.tried], 1):
        if number == outcome.attempt:
            yield number, address, "mapped"
        elif address + outcome.search.size > outcome.task_size:
            yield number, address, "above"
        else:
            yield number, address, "taken"


def verdict(case: Case) -> str:
    """Why it fails, or where it succeeds: one sentence or two."""
    found = case.outcome
    size = place(found.search.size)
    if found.address is not None and found.attempt is not None:
        text = f"Try {found.attempt:,} succeeds, at {place(found.address)} ({found.address:#x})."
        if found.above_task_size:
            text += f" Tries before it that end above user space: {found.above_task_size:,} (ENOMEM each)."
        if found.occupied:
            text += f" That meet a mapping: {found.occupied:,} (EEXIST)."
        return text
    if found.above_task_size == found.tried:
        distance = found.last + found.search.size - found.task_size
        return (
            f"Fails: all {found.tried:,} tries end above user space, the lowest by {place(distance)}: "
            f"{errno_name(found.errno)}, however much memory is free. {found.search.tries:,} steps of {size} "
            f"are {place(found.search.tries * found.search.step)}; no sysctl or limit changes where it looks."
        )
    parts = [
        (found.above_task_size, "end above user space (ENOMEM)"),
        (found.occupied, "meet a mapping (EEXIST)"),
        (found.refused_inside, "are refused within user space (a limit: ulimit -v, vm.max_map_count)"),
    ]
    told = ", ".join(f"{number:,} {what}" for number, what in parts if number)
    return f"Fails with {errno_name(found.errno)}: of {found.tried:,} tries, {told or 'none'}."


def works_for(where: Platform, name: str) -> list[int]:
    """The sizes in GB, of 1 to 512, for which a search succeeds on paper."""
    end = where.task_size
    sizes = []
    for gb in (1 << power for power in range(10)):
        size = gb * model.GIB
        wanted = search.artifact(size) if name == "old" else search.from_end(size, end)
        if search.on_paper(wanted, end).address is not None:
            sizes.append(gb)
    return sizes


@dataclass(frozen=True)
class Objects:
    """How many objects of each size class a heap holds, as heap/model.py tells the cases apart.

    ``once``: mallocx takes ordinary memory; ``planned``: it takes the heap's, ``retain:false``; ``retained``:
    the heap's, with jemalloc's default.
    """

    cpus: int
    once: int
    planned: int
    retained: int


def capacities(made: Explanation) -> Objects:
    """The objects that the heap holds on this machine's CPUs."""
    cpus = made.machine.cpus
    cases = (
        model.Allocator(cpus, doubled=False),
        model.Allocator(cpus),
        model.Allocator(cpus, retain=True),
    )
    return Objects(cpus, *(model.largest_objects(made.gb, case) for case in cases))


def as_json(made: Explanation) -> dict[str, object]:
    """The explanation, JSON-ready; addresses are numbers."""
    heap = model.Heap("heap", made.gb)
    return {
        "schema": 1,
        "gb": made.gb,
        "bytes": heap.bytes,
        "pages": heap.pages,
        "ram_bytes": heap.ram_bytes,
        "ram_available": made.machine.ram_available,
        "ram_fits": memory.misfit("heap", heap.ram_bytes, made.machine.ram_available) is None,
        "platform": made.platform.name,
        "va_bits": made.platform.bits,
        "task_size": made.platform.task_size,
        "objects": asdict(capacities(made)),
        "searches": {
            case.name: {
                "real": case.real,
                "ok": case.outcome.address is not None,
                **asdict(case.outcome),
                "paper_agrees": case.paper == case.outcome,
                "works_for_gb": works_for(made.platform, case.name),
                "why": verdict(case),
            }
            for case in made.cases
        },
    }
