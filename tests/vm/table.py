"""The table of features per kernel: for a terminal, and as docs/kernels.md keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.files import write_atomically
from tests.conftest import AREAS
from tests.vm.smoke import Smoke

BEGIN = "<!-- kernels: begin, written by make test-vm -->"
END = "<!-- kernels: end -->"
NONE = "–"

Rows = list[tuple[str, ...]]


def _seconds(one: Smoke, value: float) -> str:
    return f"{value:.0f} s" if one.tests else NONE


def _fact(one: Smoke, key: str) -> str:
    state = next((fact["state"] for fact in one.facts if fact["key"] == key), None)
    if state is None:
        return NONE
    return "yes" if state == "ok" else "no"


def _area(one: Smoke, area: str) -> str:
    tests = one.of(area)
    if not tests:
        return NONE
    passed = sum(test.outcome == "passed" for test in tests)
    return str(passed) if all(test.fine for test in tests) else f"**{passed} of {len(tests)}**"


def rows(runs: Sequence[Smoke]) -> Rows:
    """The header row, then one row for each thing told, a column for each kernel."""
    titles: dict[str, str] = {}
    for one in runs:
        for fact in one.facts:
            titles.setdefault(fact["key"], fact["title"])
    return [
        ("", *(one.kernel for one in runs)),
        ("release", *(one.release or NONE for one in runs)),
        ("accelerator", *(one.accel.upper() or NONE for one in runs)),
        ("up after", *(_seconds(one, one.boot_seconds) for one in runs)),
        ("done after", *(_seconds(one, one.seconds) for one in runs)),
        *((title, *(_fact(one, key) for one in runs)) for key, title in titles.items()),
        *((f"smoke: {what}", *(_area(one, area) for one in runs)) for area, what in AREAS.items()),
        *([("other tests", *(_area(one, "") for one in runs))] if any(one.of("") for one in runs) else []),
        ("smoke tests", *(_verdict(one) for one in runs)),
    ]


def _verdict(one: Smoke) -> str:
    if not one.tests:
        return "**did not run**"
    return f"all {sum(bool(test.area) for test in one.tests)} pass" if not one.problems else "**fail**"


def markdown(runs: Sequence[Smoke]) -> str:
    """The table alone, as Markdown."""
    head, *body = rows(runs)
    lines = [_line(head), _line(("---",) * len(head)), *map(_line, body)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells).strip() + " |"


def between(text: str) -> str:
    """What lies between the two markers; KflexError where they are not there once and in order."""
    before, begun, rest = text.partition(BEGIN)
    table, ended, after = rest.partition(END)
    if not begun or not ended or BEGIN in after or END in before + after:
        raise KflexError("no place for the table of kernels", "", f"put {BEGIN} and {END} there, once each")
    return table


def write(path: Path, runs: Sequence[Smoke]) -> None:
    """Replace the table in a document."""
    try:
        text = path.read_text()
        old = between(text)
    except OSError as error:
        raise KflexError(f"cannot read the document: {error.strerror}", str(path)) from None
    except KflexError as error:
        raise KflexError(error.what, str(path), error.fix) from None
    new = f"{BEGIN}{old}{END}", f"{BEGIN}\n\n{markdown(runs)}\n{END}"
    write_atomically(path, text.replace(*new).encode(), "--write")
