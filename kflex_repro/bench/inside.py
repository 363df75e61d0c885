"""``bench redis --probe``: what requests took inside the server, beside what the clients saw.

The histograms of the monitor in each run: arrival in the socket, read, execution, end of the write. They hold
what reached the server; what the kernel answered itself never did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kflex_repro.bench.bed import Endpoint
from kflex_repro.bench.stats import Figure, figure
from kflex_repro.bench.summary import count, median_of, number
from kflex_repro.errors import Unavailable
from kflex_repro.probe import latency, targets

PERCENTILES = {"p50_us": 50.0, "p99_us": 99.0, "p999_us": 99.9}
HEADINGS = ("command", "in the server", "client p50 / p99", "server p50 / p99", "queue", "exec", "reply")
NOTE = (
    "--probe: histograms of the monitor were on in every run, on both sides; they hold what reached the "
    "server, the checker's requests among it"
)


@dataclass
class Watched:
    """What one run's probe counted, by command; filled when the run is over."""

    commands: Mapping[str, latency.Counts] = field(default_factory=dict)


@contextmanager
def watching(endpoint: Endpoint) -> Iterator[Watched]:
    """Histograms of the server, attached while inside."""
    if endpoint.pid is None:
        raise Unavailable("the server is not on this machine", "--probe", "its probes must run where it does")
    with latency.Probe(targets.by_pid(endpoint.pid), latency.Options()) as probe:
        watched, before = Watched(), probe.snapshot()
        yield watched
        watched.commands = probe.snapshot().since(before)


@dataclass(frozen=True)
class Inside:
    """One command in one arm: requests in all runs, and the percentiles of each phase over the runs, µs."""

    calls: int
    phases: Mapping[str, Mapping[str, Figure | None]]

    def to_json(self) -> dict[str, Any]:
        phases = {
            phase: {name: one.to_json() if one else None for name, one in figures.items()}
            for phase, figures in self.phases.items()
        }
        return {"calls": self.calls, **phases}


def inside(runs: Sequence[Mapping[str, latency.Counts]], commands: Sequence[str]) -> dict[str, Inside]:
    """Of one arm's runs: the scenario's commands, as far as any reached the server."""
    found = {}
    for command in commands:
        seen = [run[command] for run in runs if command in run]
        if not seen:
            continue
        phases = {
            phase: {
                name: figure([_us(one.phases[phase], percent) for one in seen if one.phases[phase].count])
                for name, percent in PERCENTILES.items()
            }
            for phase in latency.PHASES
        }
        found[command] = Inside(sum(one.calls for one in seen), phases)
    return found


def _us(histogram: latency.Histogram, percent: float) -> float:
    return histogram.percentile(percent) / 1e3


def rows(document: Mapping[str, Any], arm_names: Mapping[str, str]) -> list[tuple[str, ...]]:
    """``(scenario, arm, *HEADINGS)`` of a result document, times in µs; empty without --probe."""
    table = []
    for scenario in document["scenarios"]:
        for arm, commands in scenario.get("inside", {}).items():
            side = scenario["peers"].get(arm) or scenario[arm]
            client = " / ".join(_client(side[name]) for name in ("p50_ms", "p99_ms"))
            for command, one in commands.items():
                cells = [_pair(one[phase]) for phase in latency.PHASES]
                label = (scenario["name"], arm_names[arm], command)
                table.append((*label, count(one["calls"]), client, *cells))
    return table


def _client(found: Mapping[str, Any] | None) -> str:
    value = median_of(found)
    return number(value * 1000 if value is not None else None)


def _pair(phase: Mapping[str, Any]) -> str:
    return " / ".join(number(median_of(phase[name])) for name in ("p50_us", "p99_us"))
