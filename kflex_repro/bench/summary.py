"""What a result says in words and in one table: shared by the terminal and the report.

All functions take the document of ``result.json`` (schema 1), so that an old result reads like a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kflex_repro.bench.mark import EMULATED, emulated

Document = Mapping[str, Any]

METRIC_NAMES = {
    "rps": "throughput, × plain Redis (TCP)",
    "rps_unix": "throughput, × its unix socket",
    "p99": "p99 latency, × plain Redis (TCP)",
    "server_cpu": "server CPU per op, × plain Redis (TCP)",
    "system_cpu": "system CPU per op, × plain Redis (TCP)",
    "recovery_s": "served share back after the burst, s",
    "set_in_redis_ms": "oldest SET not yet in Redis, ms",
}


def median_of(figure: Mapping[str, Any] | None) -> float | None:
    """The median of a figure of the document; None for null."""
    return None if figure is None else float(figure["median"])


def count(value: float | None) -> str:
    """``128k``, ``1.25M``, ``940``; a dash for None."""
    if value is None:
        return "–"
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    if value >= 1e4:
        return f"{value / 1e3:.0f}k"
    if value >= 1e3:
        return f"{value / 1e3:.1f}k"
    return f"{value:.0f}"


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, without an exponent; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return f"0{unit}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{digits}f}{unit}"


def times(figure: Mapping[str, Any] | None, *, spread: bool = True) -> str:
    """``2.31× (2.20–2.40)``: the median of a ratio and its range over the pairs."""
    if figure is None:
        return "–"
    text = number(float(figure["median"]), "×")
    if spread and len(figure["runs"]) > 1:
        text += f" ({number(float(figure['min']))}–{number(float(figure['max']))})"
    return text


@dataclass(frozen=True)
class Row:
    """One scenario as text, in the order of headings()."""

    name: str
    about: str
    cells: tuple[str, ...]
    targets: tuple[tuple[str, bool | None], ...]
    wrong: int


_HEADINGS = ("Redis, TCP", "unix socket", "offload", "× TCP", "× unix", "p99 ×", "system CPU ×", "in kernel")
# Requests that were answered, not requests per second: of an emulated run no figure says how fast.
_COUNTED = ("Redis, TCP", "unix socket", "offload", "in kernel", "checked", "wrong")


def headings(document: Document) -> tuple[str, ...]:
    """The columns after the scenario's name."""
    return _COUNTED if emulated(document) else _HEADINGS


def _counted(scenario: Mapping[str, Any]) -> tuple[str, ...]:
    requests, checked = scenario.get("requests", {}), scenario["checked"]
    return (
        *(f"{requests[arm]:,}" if arm in requests else "–" for arm in ("baseline", "unix", "offload")),
        _share(scenario["offload"].get("served_in_kernel")),
        f"{checked['ops']:,}",
        f"{checked['mismatches']:,}",
    )


def _share(served: float | None) -> str:
    return "–" if served is None else f"{served:.1%}"


def rows(document: Document) -> list[Row]:
    """The table: a row per scenario."""
    table = []
    for scenario in document["scenarios"]:
        unix = scenario["peers"].get("unix")
        to_unix = scenario["ratio_to"].get("unix")
        cells = (
            _counted(scenario)
            if emulated(document)
            else (
                count(median_of(scenario["baseline"]["rps"])),
                count(median_of(unix["rps"])) if unix else "–",
                count(median_of(scenario["offload"]["rps"])),
                times(scenario["ratio"]["rps"]),
                times(to_unix["rps"], spread=False) if to_unix else "–",
                times(scenario["ratio"]["p99"], spread=False),
                times(scenario["ratio"]["system_cpu"], spread=False),
                _share(scenario["offload"].get("served_in_kernel")),
            )
        )
        targets = tuple((target_text(target), target["met"]) for target in scenario.get("targets", ()))
        wrong = scenario["checked"]["mismatches"]
        table.append(Row(scenario["name"], scenario.get("about", ""), cells, targets, wrong))
    return table


def target_parts(target: Mapping[str, Any]) -> tuple[str, str, str]:
    """``("throughput, × plain Redis (TCP)", "≥ 2.3", "2.41")``."""
    sign, wanted = ("≥", target["at_least"]) if "at_least" in target else ("≤", target["at_most"])
    name = METRIC_NAMES.get(target["metric"], target["metric"])
    found = "not measured" if target["measured"] is None else number(float(target["measured"]))
    return name, f"{sign} {wanted:g}", found


def target_text(target: Mapping[str, Any]) -> str:
    """``throughput, × plain Redis (TCP) ≥ 2.3: 2.41``."""
    name, bound, found = target_parts(target)
    return f"{name} {bound}: {found}"


def _find(document: Document, *names: str) -> list[Mapping[str, Any]]:
    by_name = {scenario["name"]: scenario for scenario in document["scenarios"]}
    return [by_name[name] for name in names if name in by_name]


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def verdict_on_answers(document: Document) -> str:
    """``all 12,345 checked answers were right``, or how many were not."""
    ops = sum(scenario["checked"]["ops"] for scenario in document["scenarios"])
    wrong = sum(scenario["checked"]["mismatches"] for scenario in document["scenarios"])
    if wrong:
        return f"WRONG ANSWERS: {wrong:,} of {ops:,} checked did not match"
    return f"all {ops:,} checked answers were right" if ops else "no answer was checked"


def closing_line(document: Document) -> str:
    """One line: how much faster, at what cost, and whether all answers were right (wrong ones come first)."""
    scenarios = document["scenarios"]
    answers = verdict_on_answers(document)
    if not scenarios:
        return "nothing was completed"
    if emulated(document):
        return _in_order(document, answers, _functional(scenarios))
    local = [s for s in scenarios if s["mode"] == "coherent" and s["path"] == "local"]
    shown = _find(document, "get-2t", "set-2t", "mix-90-10") or local[:3] or scenarios[:3]
    labels = {"get-2t": "GET", "set-2t": "SET", "mix-90-10": "the 90:10 mix"}
    faster = [
        f"{labels.get(s['name'], s['name'])} {times(s['ratio']['rps'], spread=False)}"
        for s in shown
        if s["ratio"]["rps"]
    ]
    parts = [f"{_join(faster)} plain Redis over TCP"]
    unix = [times(s["ratio_to"]["unix"]["rps"], spread=False) for s in shown if s["ratio_to"].get("unix")]
    if unix:
        parts[0] += f" ({_join(unix)} its unix socket)"
    tails = [times(s["ratio"]["p99"], spread=False) for s in shown if s["ratio"]["p99"]]
    if tails:
        parts.append(f"p99 {_join(tails)}")
    costs = [times(s["ratio"]["system_cpu"], spread=False) for s in shown if s["ratio"]["system_cpu"]]
    if costs:
        parts.append(f"system CPU per operation {_join(costs)}")
    text = "; ".join(parts)
    return _in_order(document, answers, text)


def _in_order(document: Document, answers: str, text: str) -> str:
    wrong = any(s["checked"]["mismatches"] for s in document["scenarios"])
    text = f"{answers}; {text}" if wrong else f"{text}; {answers}"
    return f"interrupted; {text}" if document.get("interrupted") else text


def _functional(scenarios: Sequence[Mapping[str, Any]]) -> str:
    """What an emulated run has shown."""
    requests = [scenario.get("requests", {}) for scenario in scenarios]
    text = f"{EMULATED}: {sum(sum(one.values()) for one in requests):,} requests answered"
    shares = [s["offload"].get("served_in_kernel") for s in scenarios]
    if known := [share for share in shares if share]:
        text += f", up to {max(known):.1%} of a scenario's in the kernel"
    return text


def missed_targets(document: Document) -> list[str]:
    """``name: target`` for every expectation that was measured and not met."""
    return [
        f"{scenario['name']}: {target_text(target)}"
        for scenario in document["scenarios"]
        for target in scenario.get("targets", ())
        if target["met"] is False
    ]
