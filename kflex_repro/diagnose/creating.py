"""Causes of a failed map creation."""

from __future__ import annotations

import errno
import re

from kflex_repro.diagnose.case import Case
from kflex_repro.diagnose.cause import (
    GIB,
    Cause,
    Confidence,
    created,
    fit,
    largest_gb,
)
from kflex_repro.diagnose.events import describe, size_text
from kflex_repro.diagnose.probes import ARTIFACT_HEAP_TYPE, HEAP_TYPE_NAME

# A pointer into an arena is 32 bits wide. [read] kernel/bpf/arena.c
_ARENA_MOST = 4 << 30


def no_map_type(case: Case) -> Cause | None:
    """The kernel does not know the map's type (EINVAL)."""
    for event in created(case, errno.EINVAL):
        evidence = [describe(event)]
        named = event.type_name in ("heap", "")
        is_heap = event.type == ARTIFACT_HEAP_TYPE or (
            event.type is None and named and case.declared(event.name)
        )
        if not is_heap and (event.type is None or not case.types or event.type in case.types):
            continue
        confidence: Confidence = "likely"
        if is_heap and case.heap_type is not None:
            if case.heap_type.known:
                continue
            evidence.append(case.heap_type.sentence() + case.said("kernel"))
            confidence = "certain" if case.where == "this" and event.type is not None else "likely"
        elif case.types and event.type is not None:
            evidence.append(f"the kernel's BTF has no map type {event.type}{case.said('kernel')}")
            confidence = "certain" if case.where == "this" else "likely"
        evidence.append(
            f"{HEAP_TYPE_NAME} exists only in KFlex's own kernel; the number {ARTIFACT_HEAP_TYPE} is free, "
            "or another map type, in every other"
            if is_heap
            else "the kernel answers EINVAL to a type it does not know, before it looks at sizes"
        )
        return Cause(
            "no-map-type",
            "The kernel has no heap map type" if is_heap else f"The kernel has no map type {event.type}",
            confidence,
            tuple(evidence),
            (
                "boot the artifact's kernel: kflex-repro build --artifact --source DIR says how to get it",
                "or use what needs none: kflex-repro offload start (this kernel, a real Redis)",
            )
            if is_heap
            else ("boot a kernel that has it: kflex-repro doctor says what this one has",),
        )
    return None


def not_power_of_two(case: Case) -> Cause | None:
    """KFlex's kernel refuses a heap that is no power of two with ENOENT, before it allocates anything."""
    for event in created(case, errno.ENOENT):
        size = case.size(event)
        if size is None or size[0] & (size[0] - 1) == 0:
            continue
        lower = 1 << (size[0].bit_length() - 1)
        evidence = [
            describe(event),
            f"{size[0]} bytes ({size_text(size[0])}) is no power of two; the nearest are {size_text(lower)} "
            f"and {size_text(2 * lower)}",
            "the heap's size is checked before it is allocated: the errno is ENOENT, no file is missing",
        ]
        nearest = max(1, min(lower // GIB, largest_gb(case) or 1))
        return Cause(
            "not-power-of-two",
            "The heap is not a power of two",
            "certain",
            (*evidence, *filter(None, (size[1], case.declaration(size[0], event.name)))),
            (f"kflex-repro fit-heap --gb {nearest} --source DIR",),
            "fit-heap",
        )
    return None


def heap_alignment(case: Case) -> Cause | None:
    """A power of two, refused with ENOENT: the kernel found no address aligned to the heap's size."""
    for event in created(case, errno.ENOENT):
        size = case.size(event)
        if size is not None and size[0] & (size[0] - 1):
            continue
        told = f"{size_text(size[0])} is a power of two" if size else "the size is unknown"
        return Cause(
            "heap-alignment",
            "The kernel's address for the heap is not aligned to its size",
            "likely" if size else "possible",
            (
                describe(event),
                f"{told}; the only other ENOENT of a heap's creation is a kernel address that is not a "
                "multiple of the size",
            ),
            ("boot the artifact's own kernel, unmodified: its vmalloc aligns the heap", fit(case)),
        )
    return None


def arena_size(case: Case) -> Cause | None:
    """The kernel's own arenas, the upstream form of the heap, end at 4 GiB."""
    for event in created(case, errno.E2BIG):
        size = case.size(event)
        arena = event.type_name == "arena" or case.types.get(event.type or 0) == "BPF_MAP_TYPE_ARENA"
        if arena and size is not None and size[0] > _ARENA_MOST:
            return Cause(
                "arena-size",
                "An arena cannot be that large",
                "certain",
                (describe(event), f"{size_text(size[0])}; the kernel allows {size_text(_ARENA_MOST)}"),
                (f"{_ARENA_MOST // 4096} pages (max_entries) at most, or several arenas",),
            )
    return None


def eager_heap(case: Case) -> Cause | None:
    """The heap is allocated when it is made, and exceeds the RAM."""
    ram, available = case.number("ram_total"), case.number("ram_available")
    vmalloc = [f for f in case.log.failures if f.call == "vmalloc"]
    events = sorted(created(case, errno.ENOMEM), key=lambda e: -(case.size(e) or (0, ""))[0])
    for event in events:
        size = case.size(event)
        evidence = [describe(event)]
        confidence: Confidence
        if size is None:
            confidence = (
                "likely" if re.search("heap|ffkx", event.name) or "object" in case.log.facts else "possible"
            )
            evidence.append("the kernel allocates a map when it is made: ENOMEM there is the map's own size")
        elif ram is None:
            if size[0] < 16 * GIB:
                continue
            confidence = "likely"
            evidence.append(
                "all of it is allocated when the map is made; the log does not say how much RAM there is"
            )
        elif size[0] > ram:
            confidence = "likely" if case.facts["ram_total"].origin == "assumed" else "certain"
            evidence.append(
                f"{size_text(size[0])} are asked for and allocated at once; the machine has {size_text(ram)} "
                f"of RAM in all{case.said('ram_total')}: {size[0] / ram:.1f} times too much"
            )
        elif available is not None and size[0] > available:
            confidence = "likely"
            evidence.append(
                f"{size_text(size[0])} are asked for and allocated at once; {size_text(available)} of "
                f"{size_text(ram)} RAM are free{case.said('ram_available')}"
            )
        else:
            continue
        evidence += [f"the kernel says so itself, {describe(failure)}" for failure in vmalloc[:1]]
        if size:
            evidence += filter(None, (size[1], case.declaration(size[0], event.name)))
        return Cause(
            "eager-heap",
            "The heap is larger than the machine's memory, and allocated all at once",
            confidence,
            tuple(evidence),
            (fit(case), "(it changes the capacities that depend on the size too; --dry-run shows the diff)"),
            "fit-heap" if largest_gb(case) else "",
        )
    return None


def cgroup_memory(case: Case) -> Cause | None:
    """A memory cgroup's limit: kernel memory of maps is charged to whoever makes them."""
    limit, ram = case.number("memory_limit"), case.number("ram_total")
    killed = [failure for failure in case.log.failures if failure.call == "memcg-oom"]
    for event in created(case, errno.ENOMEM):
        size = case.size(event)
        if limit is None or size is None or size[0] <= limit:
            continue
        path = case.facts["memory_limit_path"].value if "memory_limit_path" in case.facts else "a cgroup"
        return Cause(
            "cgroup-memory",
            "The memory limit of the process's cgroup is smaller than the heap",
            "likely" if ram is not None and size[0] > ram else "certain",
            (
                describe(event),
                f"{size_text(size[0])} are charged to the cgroup, whose limit is {size_text(limit)}: {path}"
                + case.said("memory_limit"),
                *filter(None, (size[1],)),
            ),
            (
                f"raise the limit above {size_text(size[0])}: {path} (systemd: MemoryMax=, docker: --memory)",
                "or a smaller heap: kflex-repro fit-heap --gb N --source DIR",
            ),
        )
    if killed:
        return Cause(
            "cgroup-memory",
            "The memory limit of the process's cgroup was reached",
            "likely",
            tuple(describe(failure) for failure in killed[:3]),
            (
                "raise the limit (systemd: MemoryMax=, docker: --memory), or a smaller heap: kflex-repro "
                "fit-heap",
            ),
        )
    return None


def vmalloc_space(case: Case) -> Cause | None:
    """The kernel's own address space for such allocations is smaller than heap and alignment."""
    total = case.number("vmalloc_total")
    for event in created(case, errno.ENOMEM):
        size = case.size(event)
        # An aligned piece is sure to be found in twice its size.
        if size and total is not None and 2 * size[0] > total:
            return Cause(
                "vmalloc-space",
                "The kernel has too little address space for the heap",
                "likely",
                (
                    describe(event),
                    f"{size_text(size[0])}, aligned to its size, in {size_text(total)} of vmalloc space"
                    + case.said("vmalloc_total"),
                ),
                (fit(case),),
                "fit-heap",
            )
    return None


def rlimit_memlock(case: Case) -> Cause | None:
    """Before 5.11 maps count as locked memory: EPERM beyond RLIMIT_MEMLOCK."""
    limit = case.number("rlimit_memlock")
    release = re.match(r"(\d+)\.(\d+)", str(case.facts["kernel"].value)) if "kernel" in case.facts else None
    if release is None or (int(release[1]), int(release[2])) >= (5, 11) or limit is None:
        return None
    for event in created(case, errno.EPERM):
        size = case.size(event)
        if size is None or size[0] > limit:
            return Cause(
                "rlimit-memlock",
                "RLIMIT_MEMLOCK is smaller than the map",
                "certain" if size else "likely",
                (
                    describe(event),
                    f"kernel {release.string} charges maps to RLIMIT_MEMLOCK, {size_text(limit)}",
                ),
                ("ulimit -l unlimited (or LimitMEMLOCK=infinity in the unit)",),
            )
    return None
