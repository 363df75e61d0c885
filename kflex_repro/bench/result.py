"""``result.json``, schema 1: what a run measured, as frozen data; checked when written, replaced atomically.

Every figure is ``{"median", "min", "max", "runs"}``; null where a driver cannot measure it. Beyond the
schema of the design a scenario may carry ``recovery`` (the burst scenario), ``set_in_redis_ms`` (how old an
accepted SET ever was before Redis had it), ``inside`` (what requests took inside the server, with --probe)
``requests`` (how many were answered, by arm) and ``targets`` (the expected ratios and whether they were
met). An emulated run has neither ratios nor targets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kflex_repro.bench.inside import Inside
from kflex_repro.bench.mark import without_ratios
from kflex_repro.bench.scenario import FLOORS, Scenario
from kflex_repro.bench.stats import Figure
from kflex_repro.errors import KflexError
from kflex_repro.files import write_atomically

SCHEMA = 1
SIDE_FIGURES = ("rps", "p50_ms", "p99_ms", "p999_ms", "server_cpu_us_per_op", "system_cpu_us_per_op")
RATIO_FIGURES = ("rps", "p99", "server_cpu", "system_cpu")


def make_directory(out: Path) -> bool:
    """Make the directory of a run's results: whether it was not there. KflexError where it cannot be made."""
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KflexError(
            f"cannot create the results directory, {error.strerror}", str(out), "choose another --out"
        ) from error
    return fresh


def _figure(value: Figure | None) -> dict[str, Any] | None:
    return None if value is None else value.to_json()


@dataclass(frozen=True)
class Side:
    """One arm: requests/s, latencies in ms, CPU in µs per operation (of the server, and of the whole
    machine).
    """

    rps: Figure | None
    p50_ms: Figure | None
    p99_ms: Figure | None
    p999_ms: Figure | None
    server_cpu_us_per_op: Figure | None
    system_cpu_us_per_op: Figure | None

    def to_json(self) -> dict[str, Any]:
        return {name: _figure(getattr(self, name)) for name in SIDE_FIGURES}


@dataclass(frozen=True)
class Ratio:
    """Offload divided by another arm, pair by pair."""

    rps: Figure | None
    p99: Figure | None
    server_cpu: Figure | None = None
    system_cpu: Figure | None = None


@dataclass(frozen=True)
class TargetCheck:
    """One expectation: ``measured`` is None where it could not be measured, and then ``met`` is None too."""

    metric: str
    wanted: float
    measured: float | None

    @property
    def floor(self) -> bool:
        return self.metric in FLOORS

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.floor else self.measured <= self.wanted

    def to_json(self) -> dict[str, Any]:
        bound = "at_least" if self.floor else "at_most"
        return {
            "metric": self.metric,
            bound: self.wanted,
            "measured": self.measured,
            "met": self.met,
        }


@dataclass(frozen=True)
class Recovery:
    """The burst scenario: seconds until the served share was back, and the first run's share over time.

    ``series`` holds ``(seconds, share 0 to 1)``; ``burst`` is when the burst began and ended, in the same
    seconds.
    """

    seconds: Figure | None
    burst: tuple[float, float]
    series: tuple[tuple[float, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": _figure(self.seconds),
            "burst": [round(edge, 3) for edge in self.burst],
            "series": [[round(t, 3), round(share, 4)] for t, share in self.series],
        }


@dataclass(frozen=True)
class ScenarioResult:
    """Everything one scenario gave; ``pairs`` is how many pairs were completed."""

    scenario: Scenario
    pairs: int
    baseline: Side
    offload: Side
    served_in_kernel: float | None
    ratio: Ratio
    peers: Mapping[str, Side] = field(default_factory=dict)
    ratio_to: Mapping[str, Ratio] = field(default_factory=dict)
    checked_ops: int = 0
    mismatches: int = 0
    mismatch_examples: tuple[str, ...] = ()
    set_in_redis_ms: Figure | None = None
    recovery: Recovery | None = None
    inside: Mapping[str, Mapping[str, Inside]] = field(default_factory=dict)
    requests: Mapping[str, int] = field(default_factory=dict)

    def targets(self) -> tuple[TargetCheck, ...]:
        """The scenario's expectations with what was measured."""
        unix = self.ratio_to.get("unix")
        measured = {
            "rps": self.ratio.rps,
            "rps_unix": unix.rps if unix else None,
            "p99": self.ratio.p99,
            "server_cpu": self.ratio.server_cpu,
            "system_cpu": self.ratio.system_cpu,
            "recovery_s": self.recovery.seconds if self.recovery else None,
            "set_in_redis_ms": self.set_in_redis_ms,
        }
        checks = []
        for metric, wanted in self.scenario.targets.items():
            found = measured[metric]
            # A bound on every SET is a bound on the worst one; the others are medians over the pairs.
            value = None if found is None else found.max if metric == "set_in_redis_ms" else found.median
            checks.append(TargetCheck(metric, wanted, value))
        return tuple(checks)

    def to_json(self) -> dict[str, Any]:
        scenario = self.scenario
        out: dict[str, Any] = {
            "name": scenario.name,
            "about": scenario.about,
            "op": scenario.op,
            "path": scenario.path,
            "mode": scenario.mode,
            "driver": scenario.driver,
            "clients": scenario.clients,
            "client_threads": scenario.client_threads,
            "value_bytes": scenario.value_bytes,
            "pipeline": scenario.pipeline,
            "keys": scenario.keys,
            "distribution": scenario.distribution,
            "pairs": self.pairs,
            "baseline": self.baseline.to_json(),
            "peers": {name: side.to_json() for name, side in self.peers.items()},
            "offload": {**self.offload.to_json(), "served_in_kernel": self.served_in_kernel},
            "ratio": {name: _figure(getattr(self.ratio, name)) for name in RATIO_FIGURES},
            "ratio_to": {
                name: {"rps": _figure(ratio.rps), "p99": _figure(ratio.p99)}
                for name, ratio in self.ratio_to.items()
            },
            "checked": {"ops": self.checked_ops, "mismatches": self.mismatches},
        }
        if scenario.mix_label:
            out["mix"] = scenario.mix_label
        if self.requests:
            out["requests"] = dict(self.requests)
        if scenario.rate:
            out["rate"] = scenario.rate
        if self.mismatch_examples:
            out["checked"]["examples"] = list(self.mismatch_examples)
        if self.set_in_redis_ms:
            out["set_in_redis_ms"] = _figure(self.set_in_redis_ms)
        if self.recovery:
            out["recovery"] = self.recovery.to_json()
        if self.inside:
            out["inside"] = {
                arm: {command: one.to_json() for command, one in commands.items()}
                for arm, commands in self.inside.items()
            }
        if scenario.targets:
            out["targets"] = [check.to_json() for check in self.targets()]
        return out


@dataclass(frozen=True)
class Result:
    """A whole run. ``host`` holds doctor's facts and ``emulated``; ``started`` is UTC, ISO 8601."""

    host: Mapping[str, Any]
    redis: Mapping[str, Any]
    command: str
    started: str
    scenarios: tuple[ScenarioResult, ...]
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def mismatches(self) -> int:
        return sum(scenario.mismatches for scenario in self.scenarios)

    @property
    def checked_ops(self) -> int:
        return sum(scenario.checked_ops for scenario in self.scenarios)

    def to_json(self) -> dict[str, Any]:
        document = {
            "schema": SCHEMA,
            "host": {"emulated": False, **self.host},
            "redis": dict(self.redis),
            "command": self.command,
            "started": self.started,
            "interrupted": self.interrupted,
            "notes": list(self.notes),
            "scenarios": [scenario.to_json() for scenario in self.scenarios],
        }
        return without_ratios(document)


# --- checking -------------------------------------------------------------------------------------


def _problem_in_figure(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"median", "min", "max", "runs"}:
        return f"{where}: not a figure"
    runs = value["runs"]
    if not isinstance(runs, list) or not runs:
        return f"{where}: no runs"
    numbers = [value["median"], value["min"], value["max"], *runs]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        return f"{where}: not a finite number"
    if any(n < 0 for n in numbers):
        return f"{where}: negative"
    if not value["min"] <= value["median"] <= value["max"]:
        return f"{where}: median outside of min and max"
    return None


def _problems_in_scenario(raw: Mapping[str, Any]) -> list[str]:
    where = str(raw.get("name", "?"))
    needed = {
        "name", "op", "path", "mode", "clients", "client_threads", "value_bytes", "pipeline", "keys",
        "distribution", "baseline", "peers", "offload", "ratio", "ratio_to", "checked",
    }  # fmt: skip
    missing = sorted(needed - set(raw))
    if missing:
        return [f"{where}: without {', '.join(missing)}"]
    found: list[str | None] = []
    sides = {"baseline": raw["baseline"], "offload": raw["offload"], **raw["peers"]}
    for side, figures in sides.items():
        if not set(SIDE_FIGURES) <= set(figures):
            found.append(f"{where}.{side}: incomplete")
            continue
        found += [_problem_in_figure(figures[name], f"{where}.{side}.{name}") for name in SIDE_FIGURES]
        if figures["rps"] is None:
            found.append(f"{where}.{side}: without throughput")
    served = raw["offload"].get("served_in_kernel")
    if served is not None and not 0 <= served <= 1:
        found.append(f"{where}: served_in_kernel {served} is not a share")
    for name in RATIO_FIGURES:
        found.append(_problem_in_figure(raw["ratio"].get(name), f"{where}.ratio.{name}"))
    for peer, figures in raw["ratio_to"].items():
        found += [
            _problem_in_figure(figures.get(name), f"{where}.ratio_to.{peer}.{name}")
            for name in ("rps", "p99")
        ]
    for name in ("ops", "mismatches"):
        if not isinstance(raw["checked"].get(name), int):
            found.append(f"{where}.checked.{name}: not a count")
    if raw["mode"] not in ("coherent", "store", "none") or raw["path"] not in ("local", "remote"):
        found.append(f"{where}: mode or path")
    return [problem for problem in found if problem]


def problems(document: Mapping[str, Any]) -> list[str]:
    """What is wrong with a result document under schema 1; empty if nothing is."""
    if document.get("schema") != SCHEMA:
        return [f"schema {document.get('schema')!r} is not {SCHEMA}"]
    missing = [key for key in ("host", "redis", "command", "started", "scenarios") if key not in document]
    if missing:
        return [f"without {', '.join(missing)}"]
    found = [] if isinstance(document["host"].get("emulated"), bool) else ["host: without emulated"]
    for raw in document["scenarios"]:
        found += _problems_in_scenario(raw)
    return found


# --- writing --------------------------------------------------------------------------------------


def write_result(result: Result, out: Path) -> Path:
    """Check ``result`` and write ``out/result.json``.

    Raises KflexError, or ValueError for a document that is wrong.
    """
    return write_document(result.to_json(), out)


def write_document(document: Mapping[str, Any], out: Path) -> Path:
    """write_result() of what is a document already."""
    found = problems(document)
    if found:
        raise ValueError(f"not a valid result: {'; '.join(found[:5])}")
    path = out / "result.json"
    write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_result(path: Path) -> dict[str, Any]:
    """The document in ``path``, checked; KflexError if it is not a result of schema 1."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KflexError(f"cannot read {path.name}, {error}", str(path.parent)) from error
    found: Sequence[str] = problems(document) if isinstance(document, dict) else ["not an object"]
    if found:
        raise KflexError(f"{path.name} is not a benchmark result, {found[0]}", str(path.parent))
    return without_ratios(document)
