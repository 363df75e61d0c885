"""Runs of ``bench probe`` as figures: of each arm, divided by no probe, and how many requests each saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kflex_repro.bench.cpu import CpuCost
from kflex_repro.bench.load import Outcome
from kflex_repro.bench.probe_arms import PLAIN, Sight
from kflex_repro.bench.probe_plan import METRICS, Load, Op, Round
from kflex_repro.bench.stats import Figure, figure, ratios


@dataclass(frozen=True)
class ArmRun:
    """An arm under every load. ``requests``: of the op, as Redis counted them; ``others``: all others."""

    loads: Mapping[str, tuple[Outcome, CpuCost]]
    requests: int = 0
    others: int = 0
    sight: Sight | None = None
    hits: float | None = None

    def value(self, load: str, metric: str) -> float | None:
        """One figure: 1/s, ms, or µs of CPU per request."""
        outcome, cost = self.loads[load]
        return {
            "rps": outcome.rps,
            "p50": outcome.p50_ms,
            "p99": outcome.p99_ms,
            "server_cpu": cost.server,
            "system_cpu": cost.system,
        }[metric]


Ratios = dict[str, dict[str, dict[str, Figure | None]]]


@dataclass
class OpResult:
    """The completed rounds of one op."""

    op: Op
    loads: Sequence[Load]
    rounds: list[tuple[Round, list[ArmRun]]] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        return list(self.rounds[0][0].pairs)

    def figures(self, load: str, arm: str) -> dict[str, Figure | None]:
        """Of every run of an arm under a load."""
        made = [
            run for one, runs in self.rounds for name, run in zip(one.runs, runs, strict=True) if name == arm
        ]
        return {metric: figure([run.value(load, metric) for run in made]) for metric in METRICS}

    def ratios(self) -> Ratios:
        """load -> arm -> metric: divided by the plain run beside it, pair by pair."""

        def of(load: str, metric: str, arm: str, place: int) -> list[float | None]:
            return [runs[one.pairs[arm][place]].value(load, metric) for one, runs in self.rounds]

        return {
            load.name: {
                arm: {
                    metric: ratios(of(load.name, metric, arm, 1), of(load.name, metric, arm, 0))
                    for metric in METRICS
                }
                for arm in self.arms
            }
            for load in self.loads
        }

    def noise(self) -> dict[str, dict[str, Figure | None]]:
        """load -> metric: one plain run divided by the plain run before it; nothing is attached in either."""
        pairs = []
        for one, runs in self.rounds:
            plain = [run for name, run in zip(one.runs, runs, strict=True) if name == PLAIN]
            pairs += list(zip(plain[1:], plain[:-1], strict=True))
        return {
            load.name: {
                metric: ratios(
                    [a.value(load.name, metric) for a, _ in pairs],
                    [b.value(load.name, metric) for _, b in pairs],
                )
                for metric in METRICS
            }
            for load in self.loads
        }

    def sights(self) -> dict[str, dict[str, Any]]:
        """arm -> how many requests of the op there were, and how many it saw."""
        found: dict[str, dict[str, Any]] = {}
        for one, runs in self.rounds:
            for arm, run in zip(one.runs, runs, strict=True):
                if run.sight is None:
                    continue
                entry = found.setdefault(
                    arm, {"requests": 0, "others": 0, "seen": 0, "skipped": 0, "lost": 0, "write_us": []}
                )
                entry["requests"] += run.requests
                entry["others"] += run.others
                entry["seen"] += run.sight.commands.get(self.op.command, 0)
                entry["skipped"] += run.sight.skipped
                entry["lost"] += run.sight.lost or 0
                if run.sight.write_us is not None:
                    entry["write_us"].append(run.sight.write_us)
        for entry in found.values():
            made = figure(entry.pop("write_us"))
            if made is not None:
                entry["write_us"] = made.to_json()
        return found

    def to_json(self) -> dict[str, Any]:
        names = [PLAIN, *self.arms]
        hits = figure([run.hits for _, runs in self.rounds for run in runs])
        found = {
            "name": self.op.name,
            "about": self.op.about,
            "pairs": len(self.rounds),
            "figures": {
                load.name: {arm: _plain(self.figures(load.name, arm)) for arm in names} for load in self.loads
            },
            "ratio": {
                load: {arm: _plain(metrics) for arm, metrics in arms.items()}
                for load, arms in self.ratios().items()
            },
            "noise": {load: _plain(metrics) for load, metrics in self.noise().items()},
            "seen": self.sights(),
        }
        if hits is not None:
            found["existing"] = hits.to_json()
        return found


def _plain(figures: Mapping[str, Figure | None]) -> dict[str, Any]:
    return {metric: one.to_json() if one else None for metric, one in figures.items()}
