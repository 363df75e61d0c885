"""Bar charts of counts and times, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from kflex_repro.bench.canvas import LIGHT, Theme
from kflex_repro.bench.summary import count


@dataclass(frozen=True)
class Panel:
    """One column of bars: a heading, a value for each row, and how a value is written."""

    heading: str
    values: Sequence[float]
    texts: Sequence[str]


def counts(heading: str, values: Sequence[int]) -> Panel:
    """A panel of numbers like 128k."""
    return Panel(heading, values, [count(value) for value in values])


def bars(
    title: str, subtitle: str, rows: Sequence[str], panels: Sequence[Panel], theme: Theme = LIGHT
) -> bytes:
    """A row of bars for each of ``rows``, side by side for each panel: PNG bytes."""
    height = 1.35 + 0.27 * max(1, len(rows))
    figure = Figure(figsize=(9.5, height), dpi=144, facecolor=theme.background)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    colours = [theme.arms["offload"], theme.arms["unix"], theme.arms["baseline"]]
    for axis, panel, colour in zip(axes, panels, colours, strict=False):
        axis.set_facecolor(theme.background)
        axis.barh(range(len(rows)), panel.values, color=colour, height=0.68)
        for at, (value, text) in enumerate(zip(panel.values, panel.texts, strict=True)):
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.8}
            axis.annotate(text, (value, at), color=theme.ink, **place)
        axis.set_title(panel.heading, loc="left", fontsize=9.2, color=theme.faint)
        axis.set_xlim(0, max([*panel.values, 1e-9]) * 1.2)
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0, labelcolor=theme.ink, labelsize=8.6)
        for side in ("top", "right", "bottom", "left"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(rows)))
    axes[0].set_yticklabels(rows)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    longest = max([len(row) for row in rows] + [8])
    left = min(0.42, 0.03 + 0.0078 * longest)
    figure.subplots_adjust(left=left, right=0.98, top=1 - 0.92 / height, bottom=0.12 / height, wspace=0.08)
    figure.text(0.012, 1 - 0.12 / height, title, color=theme.ink, fontsize=13, weight="bold", va="top")
    figure.text(0.012, 1 - 0.38 / height, subtitle, color=theme.faint, fontsize=8.8, va="top")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
