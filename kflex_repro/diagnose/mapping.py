"""Causes of a failed mmap."""

from __future__ import annotations

import errno

from kflex_repro.diagnose import probes
from kflex_repro.diagnose.case import Case
from kflex_repro.diagnose.cause import (
    COMMON_BITS,
    Cause,
    Confidence,
    fit,
    fits,
    is_search,
)
from kflex_repro.diagnose.events import MAP_ANONYMOUS, MAP_PRIVATE, describe, size_text
from kflex_repro.heap import search


def _bits(case: Case) -> tuple[int, bool]:
    """(bits of user space, whether that is known and not assumed)."""
    known = case.number("va_bits")
    return (known or COMMON_BITS, known is not None and case.facts["va_bits"].origin != "assumed")


def address_search(case: Case) -> Cause | None:
    """All the addresses that were tried lie above the end of user space."""
    bits, sure = _bits(case)
    end = search.task_size(bits)
    told = case.said("va_bits") if "va_bits" in case.facts else " (assumed: 4-level paging, as most machines)"
    for event in case.log.searches:
        if event.errno != errno.ENOMEM or not is_search(event):
            continue
        size = case.size(event)
        evidence = [describe(event)]
        if event.tries and size:
            lowest = min(event.first, event.last)
            if lowest + size[0] <= end:
                continue
            evidence.append(
                f"user space ends at {end:#x}, 2^{bits}{told}; the lowest address tried, {lowest:#x}, is "
                f"{size_text(lowest - end)} above it"
            )
            if event.tries > 1:
                evidence.append(
                    f"{event.tries} tries x {size_text(abs(event.step))} look through "
                    f"{size_text(event.tries * abs(event.step))} below {size_text(event.first)}; "
                    f"{size_text(max(0, event.first - end))} would have to be passed to reach user space"
                )
            confidence: Confidence = "certain" if sure or lowest >= 1 << COMMON_BITS else "likely"
        elif size:
            if size[0] & (size[0] - 1):
                continue
            outcome = search.on_paper(search.artifact(size[0]), end)
            if outcome.address is not None:
                continue
            evidence.append(
                f"the artifact's libbpf looks for {size_text(size[0])} from {outcome.first:#x} down to "
                f"{outcome.last:#x}, {outcome.tried} tries; user space ends at {end:#x}, 2^{bits}{told}: all "
                f"{outcome.above_task_size} are above it"
            )
            confidence = "certain" if sure else "likely"
        else:
            evidence.append(
                "only the artifact's libbpf says this, after its 1024 tries from 2^48 downwards in steps of "
                f"the heap's size: with user space ending at 2^{bits}{told} heaps of 1 to 128 GB all fail so"
            )
            confidence = "likely" if bits <= COMMON_BITS else "possible"
        evidence.append(
            "an address above the end of user space is ENOMEM by definition, however much memory is free; "
            "the map itself had been created: its memory is there"
        )
        if size and (rehearsed := probes.same_search(event, size[0])):
            evidence.append(rehearsed)
        if size:
            evidence += filter(None, (size[1], case.declaration(size[0], event.map)))
        many = event.tries != 1
        return Cause(
            "address-search",
            "The address search never gets down to user space"
            if many
            else "The address asked for lies above the end of user space",
            confidence,
            tuple(evidence),
            (
                "kflex-repro patch apply address-search --source DIR (it starts at the end of user space)",
                "then build that libbpf again; kflex-repro heap explain --gb N draws the search",
            )
            if many
            else (f"ask for an address that ends below {end:#x} (an arena's: map_extra), or for none",),
            "address-search" if many else "",
        )
    return None


def address_space(case: Case) -> Cause | None:
    """The heap and its alignment do not fit the user address space at all."""
    bits, _ = _bits(case)
    for event in case.log.searches:
        size = case.size(event)
        if event.errno != errno.ENOMEM or size is None:
            continue
        if fits(size[0], bits):
            continue
        return Cause(
            "address-space",
            "The user address space is too small for the heap",
            "certain" if "va_bits" in case.facts else "likely",
            (
                describe(event),
                f"{size_text(size[0])} aligned to its size in {size_text(search.task_size(bits))} of user "
                f"space (2^{bits}{case.said('va_bits')})",
            ),
            (fit(case),),
            "fit-heap",
        )
    return None


def rlimit_as(case: Case) -> Cause | None:
    """The process may not have so much address space."""
    limit = case.number("rlimit_as")
    for event in case.log.searches:
        size = case.size(event)
        if limit is None or event.errno != errno.ENOMEM or size is None or size[0] <= limit // 2:
            continue
        origin = case.facts["rlimit_as"]
        return Cause(
            "rlimit-as",
            "RLIMIT_AS (ulimit -v) is smaller than the mapping",
            "certain" if size[0] > limit and origin.origin != "assumed" else "likely",
            (
                describe(event),
                f"the process may have {size_text(limit)} of address space in all{case.said('rlimit_as')}; "
                f"this mapping alone takes {size_text(size[0])}",
            ),
            ("ulimit -v unlimited in the shell that starts it (or LimitAS=infinity in the unit)",),
        )
    return None


def overcommit(case: Case) -> Cause | None:
    """Private writable memory beyond what overcommit allows. A map is mapped shared and never counted."""
    mode, limit, ram = case.number("overcommit"), case.number("commit_limit"), case.number("ram_total")
    for event in case.log.searches:
        private = (event.flags or 0) & MAP_PRIVATE and (event.flags or 0) & MAP_ANONYMOUS
        if event.errno != errno.ENOMEM or not private or event.length is None or is_search(event):
            continue
        if mode == 2 and limit is not None and event.length > limit:
            said = f"vm.overcommit_memory = 2 allows {size_text(limit)} in all{case.said('commit_limit')}"
        elif mode == 0 and ram is not None and event.length > ram:
            said = f"vm.overcommit_memory = 0 refuses more than RAM, {size_text(ram)}{case.said('ram_total')}"
        else:
            continue
        return Cause(
            "overcommit",
            "Private memory beyond what vm.overcommit_memory allows",
            "likely",
            (describe(event), said),
            ("sysctl vm.overcommit_memory=1, if the program does not touch it all; else less memory",),
        )
    return None


def max_map_count(case: Case) -> Cause | None:
    """The process has as many mappings as it may."""
    limit = case.number("max_map_count")
    failed = [event for event in case.log.searches if event.errno == errno.ENOMEM]
    if limit is None or not failed or case.log.mappings < limit * 0.9:
        return None
    return Cause(
        "max-map-count",
        "The process has as many mappings as vm.max_map_count allows",
        "likely",
        (
            describe(failed[-1]),
            f"about {case.log.mappings} mappings were made and not undone in this log; vm.max_map_count = "
            f"{limit}{case.said('max_map_count')}",
        ),
        (f"sysctl vm.max_map_count={2 * limit}",),
    )
