"""A case: what failed, what is known of the machine it failed on and from where, what the tree declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kflex_repro.diagnose import probes
from kflex_repro.diagnose.events import UNLIMITED, MapCreate, Search, size_text
from kflex_repro.diagnose.probes import HeapType, Known, Origin
from kflex_repro.diagnose.trace import Log
from kflex_repro.heap.model import Heap

# Where it failed: "unknown" takes this machine's facts for want of better, and says so.
Where = Literal["this", "other", "unknown"]

# What the published artifact declares, by BPF file. [read] in the KFlex repository, bpf/.
PUBLISHED = (
    Heap("heap", 256, "bpf/ffkx_redis.bpf.c"),
    Heap("heap", 256, "bpf/ffkx_memcached.bpf.c"),
    Heap("heap", 128, "bpf/ffkx_memcache.bpf.c"),
    Heap("heap", 64, "bpf/bench_data_structures.bpf.c"),
)
# RAM as two reports of one machine give it differs by what the kernel keeps for itself.
_SAME_RAM = 0.1


@dataclass(frozen=True)
class Case:
    """All that the causes are judged by. ``heaps`` are the tree's; ``predicted``: a check-up."""

    log: Log
    facts: Mapping[str, Known]
    where: Where
    heaps: tuple[Heap, ...] = ()
    heap_type: HeapType | None = None
    types: Mapping[int, str] = field(default_factory=dict)
    predicted: bool = False

    def number(self, key: str) -> int | None:
        """A fact's number; None where it is unknown or unlimited."""
        known = self.facts.get(key)
        if known is None or not isinstance(known.value, int) or known.value == UNLIMITED:
            return None
        return known.value

    def said(self, key: str) -> str:
        """Where a fact is from, in brackets; nothing where it is this machine's own failure."""
        known = self.facts.get(key)
        return f" ({known.label()})" if known and self.where != "this" else ""

    def declared(self, map_name: str) -> tuple[Heap, ...]:
        """The heaps that a map of the log may be: the tree's, else the published, by object."""
        # libbpf names an object by its skeleton, or by the file it was opened from.
        told = str(self.log.facts["object"].value) if "object" in self.log.facts else ""
        stem = told.rpartition("/")[2].partition(".")[0]
        pool = self.heaps or PUBLISHED
        by_object = tuple(h for h in pool if stem and h.file.rpartition("/")[2].startswith(stem + "."))
        named = tuple(h for h in by_object if not map_name or h.name[:15] == map_name[:15])
        if named or by_object:
            return named or by_object
        return tuple(h for h in self.heaps if not map_name or h.name[:15] == map_name[:15])

    def size(self, event: MapCreate | Search) -> tuple[int, str] | None:
        """(bytes, how that is known) of a failed map; None where neither log nor tree says it."""
        told = event.bytes if isinstance(event, MapCreate) else event.length
        if told is not None:
            return told, ""
        name = event.name if isinstance(event, MapCreate) else event.map
        sizes = {heap.bytes: heap for heap in self.declared(name)}
        if len(sizes) != 1:
            return None
        (size, heap), *_ = sizes.items()
        if self.heaps:
            return size, f"the log does not say the size; {heap.file}:{heap.line} declares {heap.gb} GB"
        return size, f"the log does not say the size; the published {heap.file} declares {heap.gb} GB"

    def declaration(self, size: int | None, name: str = "") -> str:
        """Where the tree declares a heap of so many bytes; "" where it does not."""
        found = [h for h in self.heaps if h.bytes == size]
        if not found and name and self.heaps:
            found = list(self.declared(name))
        return ", ".join(f"{h.file}:{h.line} ({h.name}, {h.gb} GB)" for h in found)


def contradictions(log: Log) -> list[str]:
    """What in a log cannot be of this machine."""
    here, found = probes.here(), []
    told = {key: fact.value for key, fact in log.facts.items()}
    ram = told.get("ram_total")
    if isinstance(ram, int) and abs(ram - int(here["ram_total"])) > _SAME_RAM * int(here["ram_total"]):
        found.append(f"RAM {size_text(ram)}, here {size_text(int(here['ram_total']))}")
    for key in ("kernel", "va_bits"):
        if key in told and told[key] != here[key]:
            found.append(f"{key} {told[key]}, here {here[key]}")
    return found


def facts(log: Log, where: Where, more: Mapping[str, int | str] | None = None) -> dict[str, Known]:
    """The facts of the machine that failed: the log's, else this machine's unless it failed elsewhere.

    ``more`` is what was seen of the process itself (its limits); it beats this machine's.
    """
    known: dict[str, Known] = {}
    if where != "other":
        origin: Origin = "here" if where == "this" else "assumed"
        known = {key: Known(value, origin) for key, value in {**probes.here(), **(more or {})}.items()}
    known.update({key: Known(fact.value, "log") for key, fact in log.facts.items()})
    if where == "other" and "ram_total" in known:
        known.setdefault("ram_available", known["ram_total"])
    return known
