"""Watching: polls the programs, follows restarts, and shows what came as a table, as lines, as JSON."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kflex_repro.errors import KflexError
from kflex_repro.offload import session
from kflex_repro.probe import events as events_
from kflex_repro.probe import latency, targets
from kflex_repro.probe.events import Event
from kflex_repro.probe.record import Writer

POLL_S = 0.02
PERCENTILES = (50.0, 99.0, 99.9)


# --- filters -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyPattern:
    """A glob over keys. ``prefix`` is its literal beginning; ``simple``: the kernel can decide."""

    pattern: str
    prefix: bytes
    whole: bool
    simple: bool

    def matches(self, key: bytes) -> bool:
        """Whether a key is meant."""
        return re.fullmatch(self._regex, key.decode("latin-1"), re.S) is not None

    @property
    def _regex(self) -> str:
        return fnmatch.translate(self.pattern.encode().decode("latin-1").replace("[^", "[!"))


def key_pattern(text: str) -> KeyPattern:
    """``user:*`` and the like."""
    literal = re.split(r"[*?\[\\]", text, maxsplit=1)[0]
    whole = literal == text
    return KeyPattern(text, literal.encode(), whole, whole or text == literal + "*")


def wanted(event: Event, commands: Sequence[str], key: KeyPattern | None, slower_than: int) -> bool:
    """The same filters in Python: for what the kernel cannot decide, and for recordings."""
    if event.pushed:
        return not (commands or key or slower_than)
    if commands and event.command not in commands:
        return False
    if event.phases["total"] < slower_than:
        return False
    if key is not None:
        words = events_.arguments(event)
        return len(words) > 1 and words[1].data is not None and key.matches(words[1].data)
    return True


# --- the offload beside ------------------------------------------------------------------------------------


class Served:
    """What the offload of the watched servers answered in the kernel, which the servers never see."""

    def __init__(self, servers: Sequence[targets.Server]) -> None:
        self._wanted = {server.port for server in servers}
        self._sessions: list[session.Session] = []
        self._find()
        self._before = self._read()

    def _find(self) -> None:
        with contextlib.suppress(KflexError, OSError):
            for one in session.attached():
                if one.port in self._wanted and one.readable:
                    self._sessions.append(one)
                else:
                    one.close()

    def _read(self) -> dict[str, int]:
        found = {"GET": 0, "SET": 0}
        for one in self._sessions:
            stats = one.stats()
            for name in found:
                found[name] += stats[f"served_{name.lower()}"]
        return found

    def counts(self) -> dict[str, int] | None:
        """GETs and SETs served since the beginning; None without an offload."""
        if not self._sessions:
            self._find()
        if not self._sessions:
            return None
        return {name: count - self._before[name] for name, count in self._read().items()}

    def close(self) -> None:
        """Let go of the sessions."""
        for one in self._sessions:
            one.close()


# --- watching ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """What came within ``seconds``: by command, and what the offload served (None: there is none)."""

    seconds: float
    commands: Mapping[str, latency.Counts]
    served: Mapping[str, int] | None
    totals: Mapping[str, int]
    missed: int
    sample: int = 1

    def rate(self, name: str) -> float:
        """Requests per second, those that the offload served among them; with sampling an estimate."""
        counts = self.commands.get(name)
        calls = counts.calls * self.sample if counts else 0
        return (calls + _served_of(self, name)) / self.seconds

    @property
    def lost(self) -> int:
        """Events that were dropped, runs of programs that were skipped: what the figures do not contain."""
        return self.totals["dropped"] + self.missed + self.totals["no_room"]


@dataclass
class Watch:
    """An open probe, and what was seen. ``until_pids``: end with the processes, do not wait for others."""

    probe: latency.Probe
    until_pids: bool = False
    say: Callable[[str], None] = lambda line: None
    ended: bool = False
    _gone: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.served = Served(self.probe.servers)
        self._first = self._last = self.probe.snapshot()
        self._served_last = self.served.counts()
        options = self.probe.options
        self.ring = events_.Ring(self.probe.ring_fd, options.ring_bytes) if options.events else None
        constants = self.probe.constants
        self.reader = events_.Reader(self.probe.btf.struct("kflex_lat_event"), constants["KFLEX_LAT_K_PUSH"])
        self._slots = -1

    def records(self) -> list[bytes]:
        """The events that came since the last call, as the kernel wrote them; the reader has their names."""
        if self.ring is None:
            return []
        found = self.ring.read()
        if found and (slots := self.probe.totals()["next_slot"]) != self._slots:
            self._slots = slots
            self.reader.names = self.probe.slots()
        return found

    def interval(self) -> Interval:
        """What came since the last call."""
        now, served = self.probe.snapshot(), self.served.counts()
        made = self._between(self._last, now, served, self._served_last)
        self._last, self._served_last = now, served
        return made

    def all(self) -> Interval:
        """What came since the beginning."""
        return self._between(self._first, self.probe.snapshot(), self.served.counts(), None)

    def _between(
        self,
        before: latency.Snapshot,
        now: latency.Snapshot,
        served: Mapping[str, int] | None,
        served_before: Mapping[str, int] | None,
    ) -> Interval:
        if served is not None:
            served = {name: count - (served_before or {}).get(name, 0) for name, count in served.items()}
        totals = {name: count - before.totals[name] for name, count in now.totals.items()}
        sample = self.probe.options.sample
        missed = now.missed - before.missed
        return Interval(now.at - before.at, now.since(before), served, totals, missed, sample)

    def follow(self) -> None:
        """Notice servers that ended or were started anew."""
        for index, server in enumerate(self.probe.servers):
            if Path(f"/proc/{server.pid}").exists():
                continue
            if index not in self._gone:
                self._gone.add(index)
                self.say(f"{server.label} has ended" + ("" if self.until_pids else "; waiting for the next"))
            if self.until_pids:
                continue
            if following := targets.successor(server):
                self._gone.discard(index)
                self.probe.replace(index, following)
                self.say(f"now {following.label}")
        if self.until_pids and len(self._gone) == len(self.probe.servers):
            self.ended = True

    def close(self) -> None:
        """Detach everything."""
        if self.ring is not None:
            self.ring.close()
        self.served.close()
        self.probe.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def of_events(chosen: Iterable[Event]) -> Interval:
    """What the table shows of recorded events."""
    found: dict[str, list[Event]] = {}
    pushed, first, last = 0, 0, 0
    for event in chosen:
        first, last = first or event.at, event.at
        if event.pushed:
            pushed += 1
        else:
            found.setdefault(event.command, []).append(event)
    totals = dict.fromkeys(("dropped", "no_room", "garbled", "foreign", "connections"), 0)
    totals |= {"pushed": pushed, "events": sum(map(len, found.values())) + pushed}
    commands = {name: _counts(events) for name, events in found.items()}
    return Interval(max(last - first, 1) / 1e9, commands, None, totals, 0)


def _counts(events: Sequence[Event]) -> latency.Counts:
    phases = {}
    for phase in latency.PHASES:
        values = [event.phases[phase] for event in events]
        phases[phase] = latency.histogram(values)
    return latency.Counts(
        calls=len(events),
        answered=len(events),
        errors=sum(event.error for event in events),
        bytes_in=sum(event.bytes_in for event in events),
        bytes_out=sum(event.bytes_out for event in events),
        untimed=0,
        phases=phases,
    )


def run(
    watch: Watch,
    interval: float,
    duration: float | None,
    on_records: Callable[[list[bytes]], None],
    on_interval: Callable[[Interval], None] | None,
) -> None:
    """Until ``duration`` seconds are over, the processes watched have ended, or Ctrl-C."""
    started = time.monotonic()
    due = started + interval
    end = started + duration if duration else float("inf")
    while not watch.ended:
        now = time.monotonic()
        if now >= end:
            break
        records = watch.records()
        if records:
            on_records(records)
        if now >= due:
            due = max(due + interval, now)
            watch.follow()
            if on_interval is not None:
                on_interval(watch.interval())
        if not records or watch.ring is None:
            # A signal handler that ends us does not end a sleep.
            step = POLL_S if watch.ring is not None else min(interval, 5 * POLL_S)
            time.sleep(max(0.0, min(step, due - now, end - now)))
    if records := watch.records():
        on_records(records)


def recorder(watch: Watch, path: Path) -> Writer:
    """A recording of what ``watch`` sees."""
    return Writer(path, watch.probe.btf.struct("kflex_lat_event"), watch.probe.constants, watch.probe.servers)


# --- shown -------------------------------------------------------------------------------------------------


def _served_of(interval: Interval, name: str) -> int:
    return (interval.served or {}).get(name, 0)


def _rows(interval: Interval) -> Iterator[tuple[str, latency.Counts | None]]:
    """Commands, the busiest first; those that only the kernel served too."""
    names = set(interval.commands) | {name for name in interval.served or {} if _served_of(interval, name)}

    def busy(name: str) -> int:
        counts = interval.commands.get(name)
        return (counts.calls if counts else 0) + _served_of(interval, name)

    for name in sorted(names, key=lambda name: (-busy(name), name)):
        yield name, interval.commands.get(name)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def table(interval: Interval, title: str, width: int) -> RenderableType:
    """For people: a row for each command, times in µs or as written, then what was not seen."""
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1), header_style="bold")
    headings = ["command", "per s", "calls", "errors", "p50", "p99", "p99.9", "max"]
    headings += ["p50 queue", "exec", "reply", "in/s", "out/s"]
    if interval.served is not None:
        headings.insert(3, "in kernel")
    # What a narrow terminal has no room for.
    left_out = {"in/s", "out/s"} if width < 125 else set()
    left_out |= {"calls", "p99.9"} if width < 100 else set()
    for index, heading in enumerate(heading for heading in headings if heading not in left_out):
        shown.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for name, counts in _rows(interval):
        calls = counts.calls if counts else 0
        cells = [name, f"{interval.rate(name):,.0f}", f"{calls:,}"]
        if interval.served is not None:
            cells.append(f"{_served_of(interval, name):,}")
        if counts is None:
            cells += ["0"] + ["–"] * 9
        else:
            total = counts.phases["total"]
            cells.append(str(counts.errors))
            cells += [
                events_.microseconds(total.percentile(one)) if total.count else "–" for one in PERCENTILES
            ]
            cells.append(events_.microseconds(total.max) if total.count else "–")
            cells += [
                events_.microseconds(counts.phases[phase].percentile(50)) if total.count else "–"
                for phase in latency.PHASES[1:]
            ]
            cells += [
                _bytes(size * interval.sample / interval.seconds)
                for size in (counts.bytes_in, counts.bytes_out)
            ]
        shown.add_row(
            *(cell for cell, heading in zip(cells, headings, strict=True) if heading not in left_out)
        )
    lines = [Text(line, style="yellow") for line in unseen(interval)]
    return Group(shown, *lines)


def unseen(interval: Interval) -> list[str]:
    """What the figures do not contain, in words."""
    totals, found = interval.totals, []
    if interval.sample > 1:
        found.append(f"sampled: about one request of {interval.sample}; rates are estimates")
    untimed = sum(counts.untimed for counts in interval.commands.values())
    for count, words in (
        (totals["dropped"], "events dropped: the reader was too slow, or pipelines too deep"),
        (interval.missed, "runs of a program skipped by the kernel: figures may lack as many requests"),
        (totals["no_room"], "reads not seen: no memory for their connections"),
        (untimed, "requests counted without a latency: deep pipelines, or clients that want no replies"),
        (totals["garbled"], "reads or writes that are not Redis's protocol"),
        (totals["foreign"], "reads of encrypted connections, or by other system calls than read"),
    ):
        if count:
            found.append(f"{count:,} {words}")
    if totals["pushed"]:
        found.append(f"{totals['pushed']:,} messages pushed (they answer no request)")
    return found


def as_dict(interval: Interval, kind: str) -> dict[str, Any]:
    """For --json: a line of it. Times in µs."""
    commands = {}
    for name, counts in _rows(interval):
        entry: dict[str, Any] = {"calls": counts.calls if counts else 0}
        entry["per_second"] = round(interval.rate(name), 1)
        if interval.served is not None:
            entry["in_kernel"] = _served_of(interval, name)
        if counts:
            entry |= {
                "answered": counts.answered,
                "errors": counts.errors,
                "untimed": counts.untimed,
                "bytes_in": counts.bytes_in,
                "bytes_out": counts.bytes_out,
                "us": {phase: _times(counts.phases[phase]) for phase in latency.PHASES},
            }
        commands[name] = entry
    totals = interval.totals
    return {
        "type": kind,
        "at": round(time.time(), 3),
        "seconds": round(interval.seconds, 3),
        "sample": interval.sample,
        "commands": commands,
        "events": totals["events"],
        "dropped": totals["dropped"],
        "missed": interval.missed,
        "pushed": totals["pushed"],
        "garbled": totals["garbled"],
        "foreign": totals["foreign"],
        "no_room": totals["no_room"],
        "connections": totals["connections"],
    }


def _times(histogram: latency.Histogram) -> dict[str, float]:
    found = {f"p{one:g}": round(histogram.percentile(one) / 1e3, 2) for one in PERCENTILES}
    return {**found, "max": round(histogram.max / 1e3, 2), "mean": round(histogram.mean / 1e3, 2)}
