"""From a log, a command or a bare machine to a Diagnosis: make the case, judge it, try what people try."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kflex_repro.diagnose import causes, probes
from kflex_repro.diagnose.case import PUBLISHED, Case, Where, contradictions, facts
from kflex_repro.diagnose.cause import Cause, is_search
from kflex_repro.diagnose.events import MAP_FIXED_NOREPLACE, MAP_SHARED, Failure, MapCreate, Search
from kflex_repro.diagnose.probes import ARTIFACT_HEAP_TYPE, Ruled
from kflex_repro.diagnose.report import Diagnosis
from kflex_repro.diagnose.trace import Log
from kflex_repro.heap import search
from kflex_repro.heap.model import Heap

_STRACE = "strace -f -o LOG -e trace=bpf,mmap,munmap,openat,prlimit64 COMMAND"
_UNSIZED_TRY = 4 << 30


def of_log(
    log: Log,
    where: Where,
    heaps: Sequence[Heap] = (),
    kind: str = "log",
    more: Mapping[str, int | str] | None = None,
) -> Diagnosis:
    """The diagnosis of what a log shows; ``more`` are facts of the process itself (see case.facts)."""
    notes = []
    if where == "unknown" and (why := contradictions(log)):
        where = "other"
        notes.append(f"the log is of another machine ({'; '.join(why)}): this one's numbers are not used")
    elif where == "unknown" and log.failed:
        notes.append(
            "what the log does not say of its machine is assumed from this one; --other-machine if it is "
            "another's"
        )
    if log.dropped:
        notes.append(f"{log.dropped} further failures in the log were not looked at one by one")
    elsewhere = where == "other"
    case = Case(
        log=log,
        facts=facts(log, where, more),
        where=where,
        heaps=tuple(heaps),
        heap_type=None if elsewhere else probes.heap_type(),
        types={} if elsewhere else probes.map_types(),
    )
    ranked = causes.ranked(case)
    tried = tuple(_tried(case, ranked))
    return Diagnosis(
        kind=kind,
        case=case,
        causes=tuple(ranked),
        tried=tried,
        collect=tuple(_collect(case, ranked)),
        notes=tuple(notes),
    )


def _tried(case: Case, ranked: Sequence[Cause]) -> list[Ruled]:
    """What people change when they see ENOMEM, tried once more for the failure that is explained first."""
    mapped = [event for event in case.log.searches if event.errno == errno.ENOMEM]
    created = [event for event in case.log.creates if event.errno == errno.ENOMEM]
    by_map = {"address-search", "address-space", "rlimit-as", "overcommit", "max-map-count"}
    if mapped and (not created or (ranked and ranked[0].id in by_map)):
        lengths = [known[0] for event in mapped if (known := case.size(event))]
        above = any(cause.id == "address-search" for cause in ranked)
        found = list(probes.mmap_tries(lengths[0] if lengths else _UNSIZED_TRY, above))
        if any(map(is_search, mapped)):
            found.append(_ram_is_there(case, mapped[0]))
        return found
    if created:
        sizes = [known[0] for event in created if (known := case.size(event))]
        return list(probes.create_tries(max(sizes, default=0)))
    return []


def _ram_is_there(case: Case, event: Search) -> Ruled:
    size = case.size(event)
    how = "the map had been created, so its memory was allocated, before it was mapped"
    if size and size[0] & (size[0] - 1) == 0 and size[0] <= probes.LARGEST_TRY:
        outcome = search.for_real(search.fixed(size[0]))
        if outcome.address is not None:
            how += f"; here the same mmap works inside user space, at {outcome.address:#x}"
    return Ruled("ram", "RAM and swap", "out", how)


def _collect(case: Case, ranked: Sequence[Cause]) -> list[str]:
    """What would tell more, where no cause is at least likely; empty where one is, or nothing failed."""
    log = case.log
    if any(cause.confidence != "possible" for cause in ranked):
        return []
    if not log.failed and log.recognised:
        return []
    if not log.recognised:
        return [
            "a log that shows the failure: kflex-repro diagnose -- COMMAND records one",
            f"or: {_STRACE}",
            "or what the program prints with LIBBPF_LOG_LEVEL=debug in its environment",
        ]
    wanted = []
    unsized = any(case.size(event) is None for event in log.creates)
    unsized |= any(case.size(event) is None for event in log.searches)
    if unsized and not case.heaps:
        wanted.append(
            "the sizes: the source tree (--source DIR), or libbpf's words with LIBBPF_LOG_LEVEL=debug"
        )
    if "strace" not in log.forms and "trace" not in log.forms:
        wanted.append(f"the system calls: kflex-repro diagnose --strace -- COMMAND, or {_STRACE}")
    if case.where == "other":
        wanted.append(
            "facts of that machine, pasted into the log: uname -a; cat /proc/meminfo /proc/PID/limits; "
            "grep 'address sizes' /proc/cpuinfo"
        )
    return [*wanted, "the kernel's words at that moment: dmesg | tail -50"]


# --- a machine without a failure --------------------------------------------------------------------------


def of_machine(heaps: Sequence[Heap], applied: frozenset[str] = frozenset()) -> Diagnosis:
    """What would stop the artifact here: each of its steps, judged as if it had been taken.

    ``heaps`` are the tree's (the published ones without a tree), ``applied`` the recipes that it has.
    """
    log = Log(recognised=1)
    known = probes.here()
    kind = probes.heap_type()
    ram, limit = int(known["ram_total"]), int(known["memory_limit"])
    if kind is not None and not kind.known:
        log.creates.append(MapCreate("heap", errno.EINVAL, type=ARTIFACT_HEAP_TYPE, type_name="heap"))
    for heap in heaps or PUBLISHED:
        create = MapCreate(heap.name, 0, ARTIFACT_HEAP_TYPE, "heap", 4096, heap.pages, bytes=heap.bytes)
        if heap.bytes & (heap.bytes - 1):
            log.creates.append(_failed(create, errno.ENOENT))
            continue
        if heap.ram_bytes > int(known.get("ram_available", ram)) or 0 <= limit < heap.bytes:
            log.creates.append(_failed(create, errno.ENOMEM))
        plan = search.fixed(heap.bytes) if "address-search" in applied else search.artifact(heap.bytes)
        outcome = search.for_real(plan)
        if outcome.address is None:
            log.searches.append(
                Search(
                    heap.name,
                    outcome.errno or errno.ENOMEM,
                    heap.bytes,
                    outcome.first,
                    outcome.last,
                    -plan.step if plan.down else plan.step,
                    outcome.tried,
                    MAP_SHARED | MAP_FIXED_NOREPLACE,
                )
            )
    if known["cgroup2_root"] != "/sys/fs/cgroup" and "cgroup2-path" not in applied:
        log.failures.append(
            Failure("attach to cgroup", errno.EBADF, "the sockops program, to /sys/fs/cgroup")
        )
    if known.get("lacking_capabilities"):
        log.failures.append(Failure("bpf(BPF_MAP_CREATE)", errno.EPERM, "the first map"))
    case = Case(
        log=log,
        facts=facts(log, "this"),
        where="this",
        heaps=tuple(heaps),
        heap_type=kind,
        types=probes.map_types(),
        predicted=True,
    )
    ranked = causes.ranked(case)
    notes = [] if heaps else ["with the sizes of the published artifact; --source DIR reads those of a tree"]
    return Diagnosis("machine", case, tuple(ranked), tuple(_tried(case, ranked)), (), tuple(notes))


def _failed(event: MapCreate, code: int) -> MapCreate:
    return replace(event, errno=code)


# --- a source tree ----------------------------------------------------------------------------------------


def of_tree(root: Path) -> tuple[tuple[Heap, ...], frozenset[str]]:
    """(heaps that a source tree declares, recipes applied to it). KflexError where it is no such tree."""
    from kflex_repro.heap import declarations
    from kflex_repro.patching.tree import Tree

    tree = Tree.open(root)
    heaps = []
    for item in declarations.find(tree.root, declarations.Shape()).declarations:
        if item.gb is not None:
            heaps += [Heap(name, item.gb, item.path, item.line) for name in item.names or ("heap",)]
    return tuple(heaps), frozenset(one.name for one in tree.applied())
