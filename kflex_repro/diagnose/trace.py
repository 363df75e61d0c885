"""A log, condensed: JSON lines of the instrumented libbpf, strace, libbpf's text, dmesg, or all of it mixed.

Each line is sniffed by itself. Memory is bounded whatever the log's size: lines are cut at
``LONGEST_LINE``, kept events at ``KEPT`` of a kind, and a search of any number of tries is one ``Search``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from kflex_repro.diagnose.events import (
    Definition,
    Event,
    Fact,
    Failure,
    Form,
    MapCreate,
    Mmap,
    Search,
    Unmap,
    map_bytes,
)
from kflex_repro.diagnose.text import TOKENS, Lines

LONGEST_LINE = 64 << 10
KEPT = 200
_BLOCK = 1 << 20
# Threads whose search is open at a time, and maps whose definition was printed.
_OPEN = 1024


@dataclass
class Log:
    """A log, condensed. The lists hold failures only, successes are counted.

    ``mappings``: the most that one process had at a time, as far as the log shows.
    """

    lines: int = 0
    size: int = 0
    recognised: int = 0
    forms: set[Form] = field(default_factory=set)
    created: int = 0
    searched: int = 0
    recovered: int = 0
    dropped: int = 0
    mappings: int = 0
    creates: list[MapCreate] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    facts: dict[str, Fact] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether anything in it failed."""
        return bool(self.everything)

    @property
    def everything(self) -> tuple[MapCreate | Search | Failure, ...]:
        """All failures."""
        return (*self.creates, *self.searches, *self.failures)


def candidates(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of the lines that may say something, each cut at LONGEST_LINE."""
    number, rest, skipping = 1, b"", False
    for chunk in chunks:
        data = rest + chunk
        rest = b""
        if skipping:
            end = data.find(b"\n")
            if end < 0:
                continue
            data, number, skipping = data[end + 1 :], number + 1, False
        last = data.rfind(b"\n") + 1
        if len(data) - last > LONGEST_LINE:
            # The head of an overlong line is read, what follows is not a line of its own.
            whole, skipping = data[: last + LONGEST_LINE], True
        else:
            whole, rest = data[:last], data[last:]
        yield from _candidates(whole, number)
        number += whole.count(b"\n")
    yield from _candidates(rest, number)


def _candidates(block: bytes, number: int) -> Iterator[tuple[int, bytes]]:
    # A search for each word through the whole block is much faster than a look at every line.
    starts = set()
    for token in TOKENS:
        at = block.find(token)
        while at >= 0:
            starts.add(block.rfind(b"\n", 0, at) + 1)
            end = block.find(b"\n", at)
            at = block.find(token, end) if end >= 0 else -1
    before = 0
    for start in sorted(starts):
        number += block.count(b"\n", before, start)
        before = start
        end = block.find(b"\n", start)
        yield number, block[start : min(len(block) if end < 0 else end, start + LONGEST_LINE)]


def read(
    stream: BinaryIO,
    progress: Callable[[int], None] = lambda _: None,
    collector: Collector | None = None,
) -> Log:
    """The log of a binary stream, read once from front to end; ``progress`` gets the bytes of each block.

    ``collector``: one that has taken what belongs to it already.
    """
    collector = collector or Collector()
    lines, size, ends, last = Lines(), 0, 0, b""

    def blocks() -> Iterator[bytes]:
        nonlocal size, ends, last
        while block := stream.read(_BLOCK):
            size, ends, last = size + len(block), ends + block.count(b"\n"), block[-1:]
            progress(len(block))
            yield block

    for number, line in candidates(blocks()):
        collector.take(lines.events(line.decode("utf-8", "replace"), number))
    log = collector.finish()
    log.lines, log.size = ends + (last not in (b"", b"\n")), size
    return log


class Collector:
    """Turns events into a Log: joins tries, drops what was retried with success, merges accounts."""

    def __init__(self) -> None:
        self._log = Log()
        self._open: OrderedDict[tuple[int, int], _Tries] = OrderedDict()
        self._failing: set[tuple[int, int | None, int]] = set()
        self._mappings: OrderedDict[int, int] = OrderedDict()
        self._definitions: OrderedDict[str, dict[str, int]] = OrderedDict()

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            self._log.recognised += 1
            if isinstance(event, Mmap):
                self._mmap(event)
            elif isinstance(event, MapCreate):
                self._create(event)
            elif isinstance(event, Failure):
                self._keep(self._log.failures, event)
            elif isinstance(event, Fact):
                self._log.facts[event.key] = event
            elif isinstance(event, Definition):
                self._definitions.setdefault(event.map, {})[event.attribute] = event.value
                if len(self._definitions) > _OPEN:
                    self._definitions.popitem(last=False)
            else:
                self._count(event.pid, -1)
            if not isinstance(event, Fact | Definition | Unmap):
                self._log.forms.add(event.form)

    def finish(self) -> Log:
        while self._open:
            self._close(self._open.popitem(last=False)[1])
        log = self._log
        log.creates = [self._defined(event) for event in _merged_creates(log)]
        log.searches = [self._sized(event) for event in _merged_searches(log.searches)]
        return log

    def _keep(self, kept: list[Any], event: object) -> None:
        if len(kept) < KEPT:
            kept.append(event)
        else:
            # The first failures tell what began it, the last what ended it: let the middle go.
            kept.pop(KEPT // 2)
            kept.append(event)
            self._log.dropped += 1

    def _create(self, event: MapCreate) -> None:
        for key in [key for key in self._open if key[0] == event.pid]:
            self._close(self._open.pop(key))
        if event.errno:
            self._keep(self._log.creates, event)
            return
        self._log.created += 1
        # libbpf tries again without BTF, or with a shorter name: only the last answer counts.
        left = [old for old in self._log.creates if (old.pid, old.name) != (event.pid, event.name)]
        self._log.recovered += len(self._log.creates) - len(left)
        self._log.creates = left

    def _mmap(self, event: Mmap) -> None:
        if event.form == "libbpf":
            self._close(_Tries(event, 0))
            return
        key = (event.pid, event.tid)
        search = self._open.pop(key, None)
        if search is None or not search.goes_on(event):
            if search is not None:
                self._close(search)
            search = _Tries(event, 1)
        if event.errno == 0:
            self._close(search)
            return
        self._open[key] = search
        if len(self._open) > _OPEN:
            self._close(self._open.popitem(last=False)[1])

    def _close(self, tries: _Tries) -> None:
        event = tries.last
        key = (event.pid, event.length, event.fd)
        if event.errno:
            self._keep(self._log.searches, tries.search())
            if len(self._failing) < _OPEN:
                self._failing.add(key)
            return
        self._count(event.pid, 1)
        self._log.searched += tries.count > 1 or bool(event.map)
        if key in self._failing:
            # What was refused was granted in the end, at another address or later.
            self._failing.discard(key)
            left = [old for old in self._log.searches if (old.pid, old.length, old.fd) != key]
            self._log.recovered += len(self._log.searches) - len(left)
            self._log.searches = left

    def _count(self, pid: int, change: int) -> None:
        count = self._mappings.pop(pid, 0) + change
        self._mappings[pid] = count
        self._log.mappings = max(self._log.mappings, count)
        if len(self._mappings) > _OPEN:
            self._mappings.popitem(last=False)

    def _defined(self, event: MapCreate) -> MapCreate:
        known = self._definitions.get(event.name, {})
        entries = event.entries if event.entries is not None else known.get("max_entries")
        value = event.value_size if event.value_size is not None else known.get("value_size")
        size = event.bytes
        if size is None and entries is not None and value is not None:
            size = map_bytes(entries, value)
        type = event.type if event.type is not None else known.get("type")
        return replace(event, entries=entries, value_size=value, bytes=size, type=type)

    def _sized(self, event: Search) -> Search:
        known = self._definitions.get(event.map, {})
        if event.length is None and {"max_entries", "value_size"} <= known.keys():
            return replace(event, length=map_bytes(known["max_entries"], known["value_size"]))
        return event


class _Tries:
    """A search as it goes on: a log of it has a line for each of its tries, so this is kept cheap."""

    __slots__ = ("count", "first", "last", "step")

    def __init__(self, event: Mmap, count: int) -> None:
        self.first = self.last = event
        self.count, self.step = count, 0

    def goes_on(self, event: Mmap) -> bool:
        """Take the next try: the same thing at another address, in the same stride; False if it is none."""
        last = self.last
        step = event.hint - last.hint
        if (
            not event.hint
            or (last.length, last.fd, last.flags) != (event.length, event.fd, event.flags)
            or not step
            or self.step not in (0, step)
        ):
            return False
        self.last, self.step = event, step
        self.count += 1
        return True

    def search(self) -> Search:
        first, last = self.first, self.last
        return Search(
            map=first.map,
            errno=last.errno,
            length=first.length,
            first=first.hint,
            last=last.hint,
            step=self.step,
            tries=self.count,
            flags=first.flags,
            fd=first.fd,
            address=last.address,
            pid=first.pid,
            line=first.line,
            form=first.form,
        )


def _merged_creates(log: Log) -> list[MapCreate]:
    """One failure for each map and errno, the account that says most; none where the mmap is what failed."""
    # libbpf says "failed to create" for whatever went wrong with the map, the artifact's mmap included. The
    # system calls, where the log has them, know better.
    seen = log.created or any(event.form != "libbpf" for event in log.creates)
    mapped = {search.errno for search in log.searches if seen or search.form == "libbpf"}
    best: dict[tuple[object, ...], MapCreate] = {}
    for event in log.creates:
        if event.form != "libbpf":
            best.setdefault((event.name, event.errno, event.type, event.bytes), event)
    for event in log.creates:
        # A kernel's name has 15 characters, libbpf's text the whole.
        known = any(key[1] == event.errno and str(key[0])[:15] == event.name[:15] for key in best)
        if event.form == "libbpf" and not known and event.errno not in mapped:
            best[event.name, event.errno] = event
    return list(best.values())


def _merged_searches(searches: list[Search]) -> list[Search]:
    """Without libbpf's one-line account of a search whose tries are in the log too."""
    told = [search for search in searches if search.tries]
    if not any(search.tries > 1 for search in told):
        return searches
    merged = []
    for search in told:
        name = next((s.map for s in searches if not s.tries and s.errno == search.errno), "")
        merged.append(replace(search, map=search.map or name))
    return merged
