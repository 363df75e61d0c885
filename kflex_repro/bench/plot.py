"""The plots, from the document of ``result.json``: PNG bytes, in a light or a dark theme."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from kflex_repro.bench.canvas import Theme, canvas, headline, legend, log_ticks, png
from kflex_repro.bench.mark import emulated
from kflex_repro.bench.summary import count, median_of, number

Document = Mapping[str, Any]
Scenario = Mapping[str, Any]

ARMS = ("baseline", "unix", "offload")
ARM_NAMES = {"baseline": "Redis, TCP", "unix": "Redis, unix socket", "offload": "Redis + offload"}


def _side(scenario: Scenario, arm: str) -> Mapping[str, Any] | None:
    side = scenario["peers"].get(arm) if arm == "unix" else scenario[arm]
    return None if side is None else dict(side)


def _arms_of(scenarios: Sequence[Scenario]) -> list[str]:
    return [arm for arm in ARMS if any(_side(scenario, arm) for scenario in scenarios)]


def _label(scenario: Scenario) -> str:
    return textwrap.fill(str(scenario.get("about") or scenario["name"]), 36)


def _rows(axis: Axes, scenarios: Sequence[Scenario], theme: Theme, *, labels: bool = True) -> None:
    axis.set_ylim(len(scenarios) - 0.45, -0.55)
    axis.set_yticks(range(len(scenarios)))
    axis.set_yticklabels([_label(s) for s in scenarios] if labels else [""] * len(scenarios))
    axis.tick_params(axis="y", colors=theme.ink, labelsize=8.8, pad=6)


def _arm_handles(arms: Sequence[str], theme: Theme) -> list[Any]:
    return [Patch(color=theme.arms[arm], label=ARM_NAMES[arm]) for arm in arms]


def _placed(
    scenario: Scenario, arms: Sequence[str], row: int
) -> Iterator[tuple[str, Mapping[str, Any], float, float]]:
    """``(arm, side, y, thickness)`` of every arm the scenario has, centred on its row."""
    height = 0.78 / len(arms)
    sides = [(arm, side) for arm in arms if (side := _side(scenario, arm)) is not None]
    for index, (arm, side) in enumerate(sides):
        yield arm, side, row + (index - (len(sides) - 1) / 2) * height, height * 0.92


def throughput(document: Document, theme: Theme) -> bytes | None:
    """Requests per second by arm: medians as bars, the range over the runs as a line; None without data."""
    closed = [s for s in document["scenarios"] if not s.get("rate")]
    panels = [
        ("one request at a time per client", [s for s in closed if s["pipeline"] == 1]),
        ("pipelined", [s for s in closed if s["pipeline"] > 1]),
    ]
    panels = [(name, scenarios) for name, scenarios in panels if scenarios]
    if not panels:
        return None
    arms = _arms_of(closed)
    row = 0.21 * len(arms) + 0.12
    heights = [row * len(scenarios) for _, scenarios in panels]
    figure, axes = canvas(heights, theme, titled=len(panels) > 1)
    for (name, scenarios), (axis, *_) in zip(panels, axes, strict=True):
        top = 0.0
        for index, scenario in enumerate(scenarios):
            for arm, side, y, thick in _placed(scenario, arms, index):
                rps = side["rps"]
                if rps is None:
                    continue
                axis.barh(y, rps["median"], height=thick, color=theme.arms[arm])
                axis.plot([rps["min"], rps["max"]], [y, y], color=theme.ink, linewidth=0.9, alpha=0.75)
                top = max(top, rps["max"])
                axis.annotate(
                    count(rps["median"]),
                    (max(rps["max"], rps["median"]), y),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.4,
                    color=theme.ink if arm == "offload" else theme.faint,
                )
        axis.set_xlim(0, top * 1.09)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if value else "0"))
        _rows(axis, scenarios, theme)
        if len(panels) > 1:
            axis.set_title(name, loc="left", fontsize=9, color=theme.faint, pad=6)
    subtitle = "requests per second, closed loop; median, and range over the runs"
    headline(figure, theme, "Throughput", subtitle, document)
    legend(figure, theme, _arm_handles(arms, theme))
    return png(figure)


_PERCENTILES = (("p50_ms", "o", "p50"), ("p99_ms", "D", "p99"), ("p999_ms", ">", "p99.9"))


def latency(document: Document, theme: Theme) -> bytes | None:
    """Latency percentiles by arm on a logarithmic axis; where a driver reports only p99, only that."""
    scenarios = [s for s in document["scenarios"] if any(s["offload"][name] for name, _, _ in _PERCENTILES)]
    if not scenarios:
        return None
    arms = _arms_of(scenarios)
    figure, [[axis]] = canvas([(0.19 * len(arms) + 0.12) * len(scenarios)], theme)
    for index, scenario in enumerate(scenarios):
        for arm, side, y, _ in _placed(scenario, arms, index):
            points = [(median_of(side[name]), marker) for name, marker, _ in _PERCENTILES]
            shown = [(value, marker) for value, marker in points if value]
            colour = theme.arms[arm]
            if shown:
                axis.plot(
                    [value for value, _ in shown], [y] * len(shown), color=colour, linewidth=1.6, alpha=0.55
                )
            for value, marker in shown:
                axis.plot([value], [y], marker=marker, color=colour, markersize=4.6, linestyle="none")
        if index % 2:
            axis.axhspan(index - 0.5, index + 0.5, color=theme.grid, alpha=0.35, linewidth=0)
    axis.set_xscale("log")
    log_ticks(axis, lambda value: f"{number(value * 1000)} µs" if value < 1 else f"{number(value)} ms")
    _rows(axis, scenarios, theme)
    subtitle = "medians over the runs; logarithmic. Pipelined rows time a whole batch"
    headline(figure, theme, "Latency", subtitle, document)
    markers: list[Any] = [
        Line2D([], [], color=theme.faint, marker=marker, linestyle="none", markersize=5, label=name)
        for _, marker, name in _PERCENTILES
    ]
    legend(figure, theme, [*_arm_handles(arms, theme), *markers])
    return png(figure)


def cpu(document: Document, theme: Theme) -> bytes | None:
    """CPU per operation by arm: the whole machine, and within it (solid) the server's process."""
    scenarios = [
        s for s in document["scenarios"] if s["offload"]["system_cpu_us_per_op"] and not s.get("rate")
    ]
    if not scenarios:
        return None
    arms = _arms_of(scenarios)
    figure, [[axis]] = canvas([(0.21 * len(arms) + 0.12) * len(scenarios)], theme)
    for index, scenario in enumerate(scenarios):
        for arm, side, y, thick in _placed(scenario, arms, index):
            system, server = median_of(side["system_cpu_us_per_op"]), median_of(side["server_cpu_us_per_op"])
            if system is not None:
                axis.barh(y, system, height=thick, color=theme.arms[arm], alpha=0.38)
                axis.annotate(
                    f"{number(system)} ({number(server)})",
                    (system, y),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.4,
                    color=theme.ink if arm == "offload" else theme.faint,
                )
            if server is not None:
                axis.barh(y, server, height=thick, color=theme.arms[arm])
    axis.set_xlim(0, axis.get_xlim()[1] * 1.1)
    _rows(axis, scenarios, theme)
    headline(
        figure,
        theme,
        "CPU per operation",
        "µs: whole machine (pale), of it redis-server (solid, in brackets)",
        document,
    )
    legend(figure, theme, _arm_handles(arms, theme))
    return png(figure)


# (entry of "ratio", metric of the targets, heading, a higher value is better)
_RATIO_COLUMNS = (
    ("rps", "rps", "throughput", True),
    ("p99", "p99", "p99 latency", False),
    ("system_cpu", "system_cpu", "system CPU per op", False),
)


def ratio(document: Document, theme: Theme) -> bytes | None:
    """Offload divided by plain Redis over TCP: median and min–max over the pairs, with targets as ticks."""
    scenarios = [s for s in document["scenarios"] if s["ratio"]["rps"] and not s.get("rate")]
    if not scenarios:
        return None
    figure, [axes] = canvas([0.3 * len(scenarios) + 0.1], theme, columns=3, titled=True)
    for column, (axis, (entry, metric, heading, higher)) in enumerate(zip(axes, _RATIO_COLUMNS, strict=True)):
        for index, scenario in enumerate(scenarios):
            if index % 2:
                axis.axhspan(index - 0.5, index + 0.5, color=theme.grid, alpha=0.35, linewidth=0)
            found = scenario["ratio"][entry]
            target = next((t for t in scenario.get("targets", ()) if t["metric"] == metric), None)
            wanted = target.get("at_least", target.get("at_most")) if target else None
            if found is None:
                axis.text(1.0, index, "–", color=theme.faint, va="center", ha="center", fontsize=8)
                continue
            median = found["median"]
            # Within 3 % of plain Redis is neither: it is the noise of a shared machine.
            worse = median < 0.97 if higher else median > 1.03
            colour = theme.bad if worse else theme.arms["offload"]
            axis.plot([found["min"], found["max"]], [index, index], color=colour, linewidth=1.8, alpha=0.6)
            axis.plot([median], [index], marker="o", color=colour, markersize=5.2)
            axis.annotate(
                number(median),
                (max(found["max"], wanted or 0.0), index),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.6,
                color=theme.ink,
            )
            if target is not None and wanted is not None:
                met = theme.good if target["met"] else theme.bad
                axis.plot([wanted], [index], marker="|", markersize=13, markeredgewidth=2, color=met)
        axis.axvline(1.0, color=theme.faint, linewidth=1)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(min(low / 1.15, 0.7), max(high * 1.45, 1.5))
        log_ticks(axis, lambda value: f"{value:g}×")
        axis.tick_params(axis="x", labelsize=7.6)
        axis.set_title(heading, loc="left", fontsize=9, color=theme.faint, pad=6)
        _rows(axis, scenarios, theme, labels=column == 0)
    headline(
        figure,
        theme,
        "Offload divided by plain Redis over TCP",
        "pair by pair: median and range; 1× is plain Redis",
        document,
    )
    handles = [
        Line2D(
            [],
            [],
            color=theme.arms["offload"],
            marker="o",
            markersize=5,
            label="as good as plain Redis, or better",
        ),
        Line2D([], [], color=theme.bad, marker="o", markersize=5, label="worse"),
        Line2D(
            [],
            [],
            color=theme.good,
            marker="|",
            linestyle="none",
            markersize=11,
            markeredgewidth=2,
            label="target met",
        ),
        Line2D(
            [],
            [],
            color=theme.bad,
            marker="|",
            linestyle="none",
            markersize=11,
            markeredgewidth=2,
            label="missed",
        ),
    ]
    legend(figure, theme, handles)
    return png(figure)


def recovery(document: Document, theme: Theme) -> bytes | None:
    """The share of requests that the kernel served over time, around the burst."""
    found = next((s["recovery"] for s in document["scenarios"] if s.get("recovery")), None)
    if found is None or not found["series"]:
        return None
    figure, [[axis]] = canvas([2.2], theme, left=0.08)
    began, ended = found["burst"]
    axis.axvspan(began, ended, color=theme.bad, alpha=0.16, linewidth=0)
    axis.annotate(
        "burst", ((began + ended) / 2, 6), ha="center", fontsize=8.5, color=theme.bad, annotation_clip=False
    )
    axis.plot(
        [t for t, _ in found["series"]],
        [share * 100 for _, share in found["series"]],
        color=theme.arms["offload"],
        linewidth=1.8,
    )
    seconds = found["seconds"]
    text = "not recovered" if seconds is None else f"back {number(seconds['median'])} s after the burst"
    axis.annotate(text, (ended, 50), xytext=(8, 0), textcoords="offset points", fontsize=9, color=theme.ink)
    axis.set_ylim(0, 101)
    axis.set_xlim(0, found["series"][-1][0])
    axis.set_yticks([0, 25, 50, 75, 100])
    axis.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_xlabel("seconds", fontsize=8.8, color=theme.faint)
    headline(
        figure,
        theme,
        "Recovery",
        "share of all requests served in the kernel, in windows of 50 ms (first run)",
        document,
    )
    return png(figure)


def served(document: Document, theme: Theme) -> bytes | None:
    """The share of requests that the kernel answered: what an emulated run has to show instead of ratios."""
    scenarios = [s for s in document["scenarios"] if s["offload"].get("served_in_kernel") is not None]
    if not scenarios or not emulated(document):
        return None
    figure, [[axis]] = canvas([0.3 * len(scenarios) + 0.1], theme)
    for row, scenario in enumerate(scenarios):
        share = scenario["offload"]["served_in_kernel"] * 100
        axis.barh(row, share, height=0.6, color=theme.arms["offload"])
        axis.annotate(
            f"{share:.1f} %", (share, row), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=7.6, color=theme.ink,
        )  # fmt: skip
    axis.set_xlim(0, 109)
    axis.set_xticks([0, 25, 50, 75, 100])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    _rows(axis, scenarios, theme)
    headline(figure, theme, "Served in the kernel", "share of the requests of the offload's runs", document)
    return png(figure)


PLOTS: Mapping[str, Callable[[Document, Theme], bytes | None]] = {
    "served": served,
    "throughput": throughput,
    "ratio": ratio,
    "latency": latency,
    "cpu": cpu,
    "recovery": recovery,
}


def draw(document: Document, theme: Theme) -> dict[str, bytes]:
    """Every plot that the document has data for, by name."""
    drawn = {name: plot(document, theme) for name, plot in PLOTS.items()}
    return {name: data for name, data in drawn.items() if data is not None}
