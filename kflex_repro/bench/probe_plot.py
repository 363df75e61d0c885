"""The plots of ``bench probe``, from its result.json: PNG bytes, in a light or a dark theme."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from kflex_repro.bench.canvas import Theme, canvas, headline, legend, log_ticks, png
from kflex_repro.bench.mark import emulated
from kflex_repro.bench.probe_arms import LABELS, OPTIONS, PLAIN
from kflex_repro.bench.summary import count, number

Document = Mapping[str, Any]

# Apart for colour-blind readers too: no probe grey, ours blue to violet, the others orange and brown.
_COLOURS = {
    PLAIN: "#8b949e",
    "histogram": "#0b62c4",
    "events": "#6a51d6",
    "sampled": "#2aa198",
    "old": "#d9762b",
    "bpftrace": "#a0522d",
}


def _handles(arms: Sequence[str]) -> list[Any]:
    return [Patch(color=_COLOURS[arm], label=LABELS[arm]) for arm in arms]


def _op_rows(axis: Axes, document: Document, theme: Theme, labels: bool) -> None:
    ops = document["ops"]
    axis.set_ylim(len(ops) - 0.45, -0.55)
    axis.set_yticks(range(len(ops)))
    axis.set_yticklabels([op["about"] for op in ops] if labels else [""] * len(ops))
    axis.tick_params(axis="y", colors=theme.ink, labelsize=8.8, pad=6)


def _placed(arms: Sequence[str], row: int) -> Iterator[tuple[str, float, float]]:
    """``(arm, y, thickness)``, centred on the row of an op."""
    height = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        yield arm, row + (index - (len(arms) - 1) / 2) * height, height * 0.9


def throughput(document: Document, theme: Theme) -> bytes | None:
    """Requests per second of every arm at saturation."""
    if "saturation" not in document["loads"] or not document["ops"]:
        return None
    arms = list(document["arms"])
    figure, [[axis]] = canvas([(0.2 * len(arms) + 0.15) * len(document["ops"])], theme, left=0.2)
    for row, op in enumerate(document["ops"]):
        for arm, y, thick in _placed(arms, row):
            found = op["figures"]["saturation"][arm]["rps"]
            if found is None:
                continue
            axis.barh(y, found["median"], height=thick, color=_COLOURS[arm])
            axis.plot([found["min"], found["max"]], [y, y], color=theme.ink, linewidth=0.9, alpha=0.75)
            axis.annotate(
                count(found["median"]), (found["max"], y), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7.4, color=theme.faint,
            )  # fmt: skip
    axis.set_xlim(0, axis.get_xlim()[1] * 1.06)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if value else "0"))
    _op_rows(axis, document, theme, True)
    subtitle = f"requests per second, {document['loads']['saturation']}; median, and range over the runs"
    headline(figure, theme, "Throughput with and without probes", subtitle, document)
    legend(figure, theme, _handles(arms))
    return png(figure)


def cost(document: Document, theme: Theme) -> bytes | None:
    """Our modes divided by no probe at saturation, with the goals and the noise of the machine."""
    arms = [arm for arm in document["arms"] if arm in OPTIONS]
    if "saturation" not in document["loads"] or not document["ops"] or not arms or emulated(document):
        return None
    height = (0.26 * len(arms) + 0.2) * len(document["ops"])
    figure, [axes] = canvas([height], theme, 2, left=0.2, titled=True)
    columns = (("rps", "throughput"), ("p50", "p50 latency"))
    for column, (axis, (metric, heading)) in enumerate(zip(axes, columns, strict=True)):
        for row, op in enumerate(document["ops"]):
            noise = op["noise"]["saturation"][metric]
            if noise is not None:
                axis.fill_betweenx(
                    [row - 0.45, row + 0.45],
                    noise["min"],
                    noise["max"],
                    color=theme.grid,
                    alpha=0.7,
                    linewidth=0,
                )
            for arm, y, _ in _placed(arms, row):
                found = op["ratio"]["saturation"][arm][metric]
                if found is None:
                    continue
                axis.plot([found["min"], found["max"]], [y, y], color=_COLOURS[arm], linewidth=1.8, alpha=0.6)
                axis.plot(found["runs"], [y] * len(found["runs"]), "|", color=_COLOURS[arm], markersize=5)
                axis.plot([found["median"]], [y], marker="o", color=_COLOURS[arm], markersize=5)
                for goal in document["goals"]:
                    if (goal["op"], goal["arm"], goal["metric"]) == (op["name"], arm, metric):
                        bound = goal.get("at_least", goal.get("at_most"))
                        colour = theme.good if goal["met"] else theme.bad
                        axis.plot([bound], [y], marker="|", markersize=14, markeredgewidth=2, color=colour)
        axis.axvline(1.0, color=theme.faint, linewidth=1)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{(value - 1) * 100:+.3g} %"))
        axis.tick_params(axis="x", labelsize=7.6)
        axis.set_title(heading, loc="left", fontsize=9, color=theme.faint, pad=6)
        _op_rows(axis, document, theme, column == 0)
    headline(
        figure, theme, "What our probes cost at saturation",
        "change to the run without a probe beside it: median, every pair; grey: plain runs among themselves",
        document,
    )  # fmt: skip
    marks = [
        Line2D(
            [], [], color=colour, marker="|", linestyle="none", markersize=11, markeredgewidth=2, label=text
        )
        for colour, text in ((theme.good, "goal, met"), (theme.bad, "goal, missed"))
    ]
    legend(figure, theme, [*_handles(arms), *marks])
    return png(figure)


def latency(document: Document, theme: Theme) -> bytes | None:
    """p50 and p99 of every arm, a panel for each load, logarithmic."""
    loads, ops, arms = list(document["loads"]), document["ops"], list(document["arms"])
    if not ops:
        return None
    height = (0.17 * len(arms) + 0.15) * len(ops)
    figure, axes = canvas([height] * len(loads), theme, left=0.2, titled=True)
    for load, (axis, *_) in zip(loads, axes, strict=True):
        for row, op in enumerate(ops):
            for arm, y, _ in _placed(arms, row):
                found = op["figures"][load][arm]
                points = [(found[name], mark) for name, mark in (("p50", "o"), ("p99", "D")) if found[name]]
                values = [one["median"] * 1000 for one, _ in points]
                axis.plot(values, [y] * len(values), color=_COLOURS[arm], linewidth=1.4, alpha=0.5)
                for value, (_, mark) in zip(values, points, strict=True):
                    axis.plot([value], [y], marker=mark, color=_COLOURS[arm], markersize=4.4)
        axis.set_xscale("log")
        log_ticks(axis, lambda value: f"{number(value)} µs")
        axis.set_title(document["loads"][load], loc="left", fontsize=9, color=theme.faint, pad=6)
        _op_rows(axis, document, theme, True)
    subtitle = "as the client sees it: p50 (●) and p99 (◆), medians over the runs; logarithmic"
    headline(figure, theme, "Latency with and without probes", subtitle, document)
    legend(figure, theme, _handles(arms))
    return png(figure)


PLOTS: Mapping[str, tuple[str, Callable[[Document, Theme], bytes | None]]] = {
    "cost": ("Our modes divided by no probe: throughput and p50 at saturation, with the goals", cost),
    "throughput": ("Requests per second at saturation, of every arm", throughput),
    "latency": ("p50 and p99 of every arm, by load", latency),
}


def draw(document: Document, theme: Theme) -> dict[str, bytes]:
    """Every plot that the document has data for, by name."""
    drawn = {name: plot(document, theme) for name, (_, plot) in PLOTS.items()}
    return {name: data for name, data in drawn.items() if data is not None}
