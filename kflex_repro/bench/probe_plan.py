"""What ``bench probe`` runs (``bench/probe.toml``), which runs are compared, how goals are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from kflex_repro.bench.load import Job
from kflex_repro.bench.probe_arms import PLAIN, PROBES
from kflex_repro.bench.scenario import data_dir, read_toml
from kflex_repro.bench.stats import Figure
from kflex_repro.errors import KflexError

VALUE_BYTES = 64
METRICS = ("rps", "p50", "p99", "server_cpu", "system_cpu")


@dataclass(frozen=True)
class Op:
    """A kind of request. ``fill``: keys set before it is measured; ``refill``: before each run anew."""

    name: str
    about: str
    command: str
    keys: int
    fill: int
    refill: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Load:
    """How the requests come. ``share`` of the seconds of a run; ``rate`` in requests/s, 0: closed loop."""

    name: str
    about: str
    driver: str
    clients: int
    share: float
    threads: int = 1
    rate: int = 0
    quick: bool = False

    def job(self, op: Op, seconds: float) -> Job:
        """For the load generator; ``seconds`` of a whole run."""
        return Job(
            op=op.command,
            mix=(),
            clients=self.clients,
            threads=self.threads,
            value_bytes=VALUE_BYTES,
            pipeline=1,
            keys=op.keys,
            distribution="uniform",
            seconds=max(0.1, seconds * self.share),
            rate=self.rate,
        )


@dataclass(frozen=True)
class Goal:
    """What an arm may cost under a load: bounds on the ratios to no probe. rps is a floor, p50 a ceiling."""

    arm: str
    load: str
    bounds: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """A goal, for one op, as measured. ``met`` by the median; ``clear``: every single pair says the same.

    None where it was not measured.
    """

    op: str
    arm: str
    load: str
    metric: str
    bound: float
    found: Figure | None

    @property
    def floor(self) -> bool:
        return self.metric == "rps"

    def _holds(self, value: float) -> bool:
        return value >= self.bound if self.floor else value <= self.bound

    @property
    def met(self) -> bool | None:
        return None if self.found is None else self._holds(self.found.median)

    @property
    def clear(self) -> bool | None:
        if self.found is None:
            return None
        return self._holds(self.found.min) == self._holds(self.found.max)

    def to_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "arm": self.arm,
            "load": self.load,
            "metric": self.metric,
            "at_least" if self.floor else "at_most": self.bound,
            "measured": self.found.to_json() if self.found else None,
            "met": self.met,
            "clear": self.clear,
        }


@dataclass(frozen=True)
class Study:
    """Everything of the file."""

    ops: tuple[Op, ...]
    loads: tuple[Load, ...]
    goals: tuple[Goal, ...] = field(default=())


T = TypeVar("T", Op, Load)


def _entries(kind: type[T], document: Mapping[str, Any], path: Path) -> tuple[T, ...]:
    name = kind.__name__.lower()
    known = {one.name for one in fields(kind)}
    found = []
    for raw in document.get(name, ()):
        if unknown := sorted(set(raw) - known):
            raise KflexError(f"{name} {raw.get('name')!r}: unknown entries {unknown}", str(path))
        try:
            found.append(kind(**raw))
        except TypeError as error:
            raise KflexError(f"{name} {raw.get('name')!r}: {error}", str(path)) from None
    if not found:
        raise KflexError(f"no {name} in the file", str(path))
    return tuple(found)


def read_study(path: Path | None = None) -> Study:
    """The file; KflexError naming the entry that is wrong."""
    path = path or data_dir() / "probe.toml"
    document = read_toml(path)
    ops, loads = _entries(Op, document, path), _entries(Load, document, path)
    goals = []
    for raw in document.get("goal", ()):
        bounds = {metric: float(value) for metric, value in raw.items() if metric in METRICS}
        arm, load = raw.get("arm"), raw.get("load")
        if set(raw) != {"arm", "load", *bounds} or arm not in PROBES:
            raise KflexError(f"goal of {arm!r} is wrong", str(path))
        if load not in {one.name for one in loads}:
            raise KflexError(f"goal of {arm!r}: no load {load!r}", str(path))
        goals.append(Goal(arm, load, bounds))
    return Study(ops, loads, tuple(goals))


@dataclass(frozen=True)
class Round:
    """The runs of one round, in order; ``pairs``: arm -> (place of the plain run beside it, its own)."""

    runs: tuple[str, ...]
    pairs: Mapping[str, tuple[int, int]]


def schedule(probes: Sequence[str], number: int) -> Round:
    """Round ``number`` (0 …): every probe runs right beside a run without one, A B B A, A B B A …

    Two neighbours share a plain run: plain P1 P2 plain P3 P4 plain. Odd rounds run backwards, so that drift
    favours nobody.
    """
    runs, pairs = [PLAIN], {}
    for index, probe in enumerate(probes):
        runs.append(probe)
        if index % 2 == 0:
            pairs[probe] = (len(runs) - 2, len(runs) - 1)
        else:
            runs.append(PLAIN)
            pairs[probe] = (len(runs) - 1, len(runs) - 2)
    if number % 2:
        last = len(runs) - 1
        runs.reverse()
        pairs = {probe: (last - a, last - b) for probe, (a, b) in pairs.items()}
    return Round(tuple(runs), pairs)


def judge(
    goals: Sequence[Goal], op: str, ratios: Mapping[str, Mapping[str, Mapping[str, Figure | None]]]
) -> list[Verdict]:
    """The goals of one op. ``ratios``: load -> arm -> metric; what was not run is left out."""
    return [
        Verdict(op, goal.arm, goal.load, metric, bound, ratios[goal.load][goal.arm].get(metric))
        for goal in goals
        if goal.arm in ratios.get(goal.load, {})
        for metric, bound in goal.bounds.items()
    ]
