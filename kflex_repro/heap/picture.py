"""The picture of a search: the address line, the tries as ticks, the end of user space as a wall."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.text import Text

from kflex_repro import files
from kflex_repro.errors import KflexError
from kflex_repro.heap.explain import Case, Explanation, place, tries

_GLYPH = {"mapped": "✓", "above": "×", "taken": "o"}
_STYLE = {"mapped": "bold green", "above": "red", "taken": "yellow"}
_COLOUR = {"mapped": "#1a7f37", "above": "#c4320a", "taken": "#b7791f"}
_SHORT = {"mapped": "mapped", "above": "ENOMEM", "taken": "EEXIST"}
_INK = "#1c2128"
# What a later kind may cover of an earlier one in the same column.
_RANK = ("above", "taken", "mapped")
_ASCII = str.maketrans({"✓": "V", "×": "x", "━": "=", "┄": ".", "┃": "|", "▲": "^", "…": "~", "–": "-"})


# --- in a terminal ----------------------------------------------------------------------------------------


def terminal(made: Explanation, width: int, unicode: bool = True) -> list[Text]:
    """The picture in lines of at most ``width`` columns (60 at least); without ``unicode`` in plain ASCII."""
    label = max(len(case.name) for case in made.cases) + 2
    columns = max(60, width) - label - 1
    wall = min(max(1, made.platform.task_size * columns // made.top), columns - 1)

    def column(address: int, size: int) -> int:
        """Never across the wall: a cell may hold addresses of both sides."""
        cell = min(address * columns // made.top, columns - 1)
        inside = address + size <= made.platform.task_size
        return min(cell, wall - 1) if inside else max(cell, min(wall + 1, columns - 1))

    lines = [_scale(made, label, columns, wall)]
    for case in made.cases:
        cells: dict[int, str] = {}
        for _, address, kind in tries(case.outcome):
            at = column(address, case.outcome.search.size)
            cells[at] = max(cells.get(at, kind), kind, key=_RANK.index)
        line = Text(case.name.ljust(label))
        for at in range(columns):
            if at == wall:
                line.append("┃", "bold")
            elif at in cells:
                line.append(_GLYPH[cells[at]], _STYLE[cells[at]])
            else:
                line.append("━" if at < wall else "┄", "" if at < wall else "dim")
        lines.append(line)
    end = f"user space ends: {place(made.platform.task_size)}"
    if wall + 2 + len(end) <= columns:
        lines.append(Text(" " * (label + wall) + f"▲ {end}", "bold"))
    else:
        lines.append(Text(" " * max(0, label + wall - len(end) - 1) + f"{end} ▲", "bold"))
    if unicode:
        return lines
    return [Text(line.plain.translate(_ASCII)) for line in lines]


def _scale(made: Explanation, label: int, columns: int, wall: int) -> Text:
    top = place(made.top)
    row = [" "] * columns
    for at, text in ((wall // 2 - 5, "user space"), ((wall + columns) // 2 - 6, "not user space")):
        room = wall if at < wall else columns - len(top) - 1
        if at >= 2 and at + len(text) < room:
            row[at : at + len(text)] = text
    row[0] = "0"
    row[columns - len(top) :] = top
    return Text(" " * label + "".join(row), "dim")


def listed(case: Case, most: int = 6) -> list[str]:
    """The first and the last tries in words, at most so many, and what the ones between are."""
    rows = list(tries(case.outcome))
    shown = rows if len(rows) <= most else [*rows[: most // 2], None, *rows[-(most // 2) :]]
    lines = []
    for row in shown:
        if row is None:
            lines.append(f"  … {len(rows) - most // 2 * 2:,} more")
            continue
        number, address, kind = row
        if kind == "mapped":
            meaning = "mapped"
        elif kind == "above":
            beyond = address + case.outcome.search.size - case.outcome.task_size
            meaning = f"ends {place(beyond)} above user space: ENOMEM"
        elif case.outcome.refused_inside:
            meaning = "within user space, but refused"
        else:
            meaning = "something is mapped there: EEXIST"
        lines.append(f"  try {number:>5,}  {address:>#15x}  {place(address):>12}  {meaning}")
    return lines


# --- as a file --------------------------------------------------------------------------------------------


def save(made: Explanation, path: Path) -> None:
    """Draw into ``path``, PNG or SVG by its name; the file is replaced only by a whole one."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise KflexError(f"cannot draw '{path.name}'", "--plot", "name a file .png or .svg")
    buffer = io.BytesIO()
    # No date: the same picture is the same file.
    draw(made).savefig(buffer, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
    files.write_atomically(path, buffer.getvalue(), "--plot")


def draw(made: Explanation) -> Any:
    """A matplotlib figure: for each search the whole address line, and beside it the part that decides."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kflex-repro"
    from matplotlib.figure import Figure

    rows = len(made.cases)
    height = 0.75 + 1.95 * rows
    figure = Figure(figsize=(11, height), facecolor="white")
    axes = figure.subplots(
        rows, 2, squeeze=False, gridspec_kw={"width_ratios": (1.45, 1), "wspace": 0.08, "hspace": 0.62}
    )
    figure.subplots_adjust(left=0.02, right=0.97, top=1 - 0.78 / height, bottom=0.36 / height)
    figure.text(
        0.02,
        1 - 0.12 / height,
        f"Where a heap of {made.gb} GB is looked for: {made.platform.text}",
        va="top",
        fontsize=12,
        fontweight="bold",
    )
    for (whole, near), case in zip(axes, made.cases, strict=True):
        _whole(whole, made, case)
        _near(near, made, case)
    return figure


def _line(axis: Any, made: Explanation, low: int, high: int) -> None:
    """Ground of an address line: user space, what is beyond, and the wall between them."""
    end = made.platform.task_size
    axis.set_xlim(low, high)
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    if end > low:
        axis.axvspan(low, min(end, high), color="#dff0e3", lw=0, zorder=0)
    if end < high:
        axis.axvspan(
            max(end, low), high, facecolor="#f4f4f4", edgecolor="#d4d4d4", hatch="////", lw=0, zorder=0
        )
    if low < end < high:
        axis.axvline(end, color=_INK, lw=3.5, zorder=3)


def _label(axis: Any, at: float, y: float, text: str, **how: Any) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axis.text(at, y, text, va="center", bbox=box, zorder=5, **{"ha": "center", "fontsize": 8.5, **how})


def _whole(axis: Any, made: Explanation, case: Case) -> None:
    found, top, end = case.outcome, made.top, made.platform.task_size
    high = top + top // 40
    _line(axis, made, 0, high)
    ticks = [top * part // 4 for part in range(5)]
    axis.set_xticks(ticks, [place(tick) if tick else "0" for tick in ticks], fontsize=8)
    for _, address, kind in tries(found):
        if kind != "mapped":
            axis.plot([address] * 2, [0.12, 0.55], color=_COLOUR[kind], lw=1, solid_capstyle="butt", zorder=2)
    search = found.search
    axis.set_title(
        f"{case.title}: {place(search.start)} and down, {place(search.step)} apart", fontsize=10, loc="left"
    )
    _label(axis, end, 0.93, "TASK_SIZE", color=_INK, fontweight="bold")
    if end > top // 8:
        _label(axis, end / 2, 0.8, "user space", color=_INK)
    if top - end > top // 8:
        _label(axis, (end + high) / 2, 0.8, "not user space", color=_INK)
    if found.address is not None:
        axis.plot([found.address], [0.64], marker="v", ms=9, color=_COLOUR["mapped"], zorder=4)
        axis.plot([found.address] * 2, [0.12, 0.62], color=_COLOUR["mapped"], lw=2.5, zorder=4)
        at, text, colour = found.address, f"try {found.attempt:,}: mapped", _COLOUR["mapped"]
    else:
        where = "all beyond user space" if found.above_task_size == found.tried else "none succeeds"
        at, text, colour = found.last, f"{found.tried:,} tries, {where}", _COLOUR["above"]
    left = at > top // 3
    gap = high / 70
    _label(
        axis,
        at - gap if left else at + gap,
        0.36,
        text,
        ha="right" if left else "left",
        color=colour,
        fontsize=9.5,
        fontweight="bold",
    )


def _near(axis: Any, made: Explanation, case: Case) -> None:
    """The part that decides: each candidate as a bar as long as the heap, the wall if it is near."""
    found, size, end = case.outcome, case.outcome.search.size, made.platform.task_size
    low = max(0, (found.last if found.address is None else found.address) - size)
    high = low + 5 * size
    _line(axis, made, low, high)
    edges = [low + size, low + 3 * size]
    axis.set_xticks(edges, [f"{edge:#x}" for edge in edges], fontsize=8)
    for number, address, kind in tries(found):
        if not low < address + size <= high:
            continue
        axis.add_patch(_bar(address, size, kind))
        _bar_text(axis, address + size / 2, f"try {number:,}\n{_SHORT[kind]}")
    title = "the last tries" if found.tried > 1 else "the first try"
    if end < low:
        title += f"; user space ends {place(low - end)} further down"
    elif end > high:
        title += f"; user space ends {place(end - high)} further up"
    axis.set_title(title, fontsize=9, loc="left", color="#59636e")


def _bar(address: int, size: int, kind: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((address, 0.12), size, 0.5, facecolor=_COLOUR[kind], edgecolor="white", lw=1.5, zorder=2)


def _bar_text(axis: Any, at: float, text: str) -> None:
    axis.text(
        at, 0.37, text, ha="center", va="center", fontsize=8, color="white", fontweight="bold", zorder=4
    )
