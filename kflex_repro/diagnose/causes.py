"""All causes, one small function each: given a case, a Cause with its evidence, or None.

Where two could be, the kernel's own order of checks decides which is first; ``ranked`` sorts by confidence.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from kflex_repro.diagnose import creating, mapping
from kflex_repro.diagnose.case import Case
from kflex_repro.diagnose.cause import (
    Cause,
    fit,
)
from kflex_repro.diagnose.events import describe, size_text
from kflex_repro.diagnose.probes import is_permission
from kflex_repro.heap import model

# The capacities of the published src/Main.cpp.
_PUBLISHED_OBJECTS = 10_000_000
_ORDER: dict[str, int] = {"certain": 0, "likely": 1, "possible": 2}


def ranked(case: Case) -> list[Cause]:
    """The causes that the case shows, the most probable first."""
    found = [cause for judge in JUDGES if (cause := judge(case)) is not None]
    return sorted(found, key=lambda cause: _ORDER[cause.confidence])


def cgroup2_path(case: Case) -> Cause | None:
    """The directory at /sys/fs/cgroup is not cgroup v2's root: attaching to it is EBADF."""
    root = case.facts.get("cgroup2_root")
    for failure in case.log.failures:
        attach = failure.call in ("attach to cgroup", "bpf(BPF_PROG_ATTACH)", "bpf(BPF_LINK_CREATE)")
        if not (failure.call == "open" or (attach and failure.errno in (errno.EBADF, errno.EINVAL, 0))):
            continue
        elsewhere = root is not None and root.value != "/sys/fs/cgroup"
        if root is not None and not elsewhere and failure.call != "open":
            continue
        evidence = [describe(failure)]
        if root is not None:
            place = f"is mounted at {root.value}" if root.value else "is not mounted"
            evidence.append(
                f"cgroup v2 {place}, not at /sys/fs/cgroup, where the artifact opens "
                f"it{case.said('cgroup2_root')}"
            )
        return Cause(
            "cgroup2-path",
            "cgroup v2 is not where the artifact looks for it",
            "certain" if elsewhere and case.where == "this" else "likely" if failure.errno else "possible",
            tuple(evidence),
            (
                "kflex-repro patch apply cgroup2-path --source DIR",
                "or boot with systemd.unified_cgroup_hierarchy=1",
            ),
            "cgroup2-path",
        )
    return None


def permission(case: Case) -> Cause | None:
    """EPERM of bpf(): capabilities, lockdown, or whatever else refuses it."""
    events = [describe(e) for e in case.log.creates if is_permission(e.errno)]
    events += [describe(f) for f in case.log.failures if is_permission(f.errno) and "bpf(" in f.call]
    if not events:
        return None
    lockdown, lacking = case.facts.get("lockdown"), case.facts.get("lacking_capabilities")
    if lockdown is not None and lockdown.value == "confidentiality":
        return Cause(
            "lockdown",
            "Kernel lockdown (confidentiality) forbids it",
            "likely",
            (events[0], f"lockdown is in mode confidentiality{case.said('lockdown')}"),
            ("boot without lockdown=confidentiality (Secure Boot may set it)",),
        )
    if lacking is not None and lacking.value:
        return Cause(
            "capability",
            "The process lacks the capabilities that bpf() needs",
            "certain" if case.where == "this" else "likely",
            (events[0], f"without {lacking.value}{case.said('lacking_capabilities')}"),
            ("run it as root (sudo), or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",),
        )
    told = case.where == "other"
    return Cause(
        "capability",
        "bpf() is not permitted to the process",
        "likely" if told else "possible",
        (
            events[0],
            "EPERM of bpf() is a missing capability, or a container, seccomp or security module that "
            "refuses it",
        ),
        (
            "run it as root, outside containers (docker: --privileged, or --cap-add BPF,PERFMON,NET_ADMIN "
            "and a seccomp profile that allows bpf)",
        ),
    )


def out_of_heap(case: Case) -> Cause | None:
    """The program aborts where its heap is used up."""
    for failure in case.log.failures:
        if failure.call == "out-of-heap":
            cpus = model.possible_cpus()
            once, planned, retained = (
                size_text(model.need(_PUBLISHED_OBJECTS, allocator).bytes)
                for allocator in (
                    model.Allocator(cpus, doubled=False),
                    model.Allocator(cpus),
                    model.Allocator(cpus, retain=True),
                )
            )
            return Cause(
                "out-of-heap",
                "The heap is too small for the capacities compiled into the program",
                "likely",
                (
                    describe(failure),
                    "the artifact takes .value() of a failed allocation: an abort, without a word of memory",
                    f"the published {_PUBLISHED_OBJECTS:,} objects take {once} of heap; where jemalloc takes "
                    f"from it too, {planned} with retain:false, {retained} without",
                ),
                (
                    "MALLOC_CONF=retain:false in the program's environment (docs/heap.md says why)",
                    "kflex-repro fit-heap --auto --source DIR (it changes the capacities too)",
                    "kflex-repro patch apply out-of-heap --source DIR (says it in words next time)",
                ),
                "fit-heap",
            )
    return None


def out_of_memory(case: Case) -> Cause | None:
    """The kernel killed something for want of memory."""
    for failure in case.log.failures:
        if failure.call == "oom":
            return Cause(
                "out-of-memory",
                "The machine ran out of memory",
                "possible" if case.log.creates or case.log.searches else "likely",
                (describe(failure),),
                (fit(case), "or free memory first"),
            )
    return None


JUDGES: tuple[Callable[[Case], Cause | None], ...] = (
    creating.no_map_type,
    creating.not_power_of_two,
    creating.heap_alignment,
    creating.arena_size,
    creating.eager_heap,
    creating.cgroup_memory,
    creating.vmalloc_space,
    mapping.address_space,
    mapping.address_search,
    mapping.rlimit_as,
    creating.rlimit_memlock,
    mapping.overcommit,
    mapping.max_map_count,
    cgroup2_path,
    permission,
    out_of_heap,
    out_of_memory,
)
