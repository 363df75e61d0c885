"""What the plots have in common: colours, axes, title, legend, and what must stand on them; PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kflex_repro.bench.mark import EMULATED, emulated, mark

Document = Mapping[str, Any]

_DPI = 144
_WIDTH_IN = 9.5
_TOP_IN = 0.95
_BOTTOM_IN = 0.48


@dataclass(frozen=True)
class Theme:
    """Colours; the three arms stay apart for colour-blind readers, and in grey."""

    name: str
    background: str
    ink: str
    faint: str
    grid: str
    arms: Mapping[str, str]
    good: str
    bad: str


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1c2128",
    faint="#59636e",
    grid="#e3e7ec",
    arms={"baseline": "#8b949e", "unix": "#d99a2b", "offload": "#0b62c4"},
    good="#1a7f37",
    bad="#c4320a",
)
DARK = Theme(
    name="dark",
    background="#14181d",
    ink="#e6ebf0",
    faint="#9aa5b1",
    grid="#2b323b",
    arms={"baseline": "#7d8791", "unix": "#e0aa48", "offload": "#58a6ff"},
    good="#3fb950",
    bad="#ff7b54",
)


def canvas(
    heights: Sequence[float], theme: Theme, columns: int = 1, *, left: float = 0.34, titled: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a row of axes per entry of ``heights`` (inches); ``titled``: room for axes titles."""
    gap = 0.75
    top = _TOP_IN + (0.25 if titled else 0)
    total = sum(heights) + gap * (len(heights) - 1) + top + _BOTTOM_IN
    figure = Figure(figsize=(_WIDTH_IN, total), dpi=_DPI, facecolor=theme.background)
    grid = figure.add_gridspec(
        len(heights),
        columns,
        height_ratios=list(heights),
        left=left,
        right=0.965,
        top=1 - top / total,
        bottom=_BOTTOM_IN / total,
        hspace=gap / (sum(heights) / len(heights)),
        wspace=0.12,
    )
    axes = [
        [figure.add_subplot(grid[row, column]) for column in range(columns)] for row in range(len(heights))
    ]
    for row in axes:
        for axis in row:
            _style(axis, theme)
    return figure, axes


def _style(axis: Axes, theme: Theme) -> None:
    axis.set_facecolor(theme.background)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(theme.grid)
    axis.tick_params(axis="both", which="both", length=0, colors=theme.faint, labelsize=8.5)
    axis.grid(axis="x", color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)


def headline(figure: Figure, theme: Theme, title: str, subtitle: str, document: Document) -> None:
    """Title and subtitle, and what ``document`` must say about where it was measured."""
    height = figure.get_figheight()
    if text := mark(document):
        colour = theme.bad if emulated(document) else theme.faint
        figure.text(
            0.988, 1 - 0.16 / height, text, color=colour, fontsize=9.5, weight="bold", va="top", ha="right"
        )
    if emulated(document):
        # Also across the bars: a part cut out of the picture says it, too.
        angle = math.degrees(math.atan2(height, _WIDTH_IN))
        figure.text(
            0.5, 0.45, EMULATED.replace(", ", ",\n"), color=theme.bad, alpha=0.28, fontsize=24, weight="bold",
            va="center", ha="center", rotation=min(angle, 30.0), zorder=10,
        )  # fmt: skip
    figure.text(0.012, 1 - 0.14 / height, title, color=theme.ink, fontsize=13, weight="bold", va="top")
    figure.text(0.012, 1 - 0.41 / height, subtitle, color=theme.faint, fontsize=8.8, va="top")


def legend(figure: Figure, theme: Theme, handles: Sequence[Any]) -> None:
    """Above the plot, below the title."""
    height = figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.003, 1 - 0.55 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=8.8,
        labelcolor=theme.ink,
        handlelength=1.2,
        columnspacing=1.6,
    )


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def log_ticks(axis: Axes, text: Callable[[float], str]) -> None:
    """1, 2 and 5 of each decade, as ``text`` has them."""
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=24))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_xlim()
    if high / low > 300:
        axis.xaxis.set_major_locator(LogLocator(base=10, numticks=24))
