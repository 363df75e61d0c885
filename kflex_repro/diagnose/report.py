"""The diagnosis as a value, as JSON (schema 1), and as text for people."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.text import Text

from kflex_repro.diagnose.case import Case
from kflex_repro.diagnose.cause import Cause
from kflex_repro.diagnose.events import describe
from kflex_repro.diagnose.probes import Ruled

SCHEMA = 1
_STYLE = {"certain": "bold red", "likely": "yellow", "possible": "cyan"}


@dataclass(frozen=True)
class Diagnosis:
    """``causes`` ranked; ``unknown``: something failed, or may have, and no cause is at least likely.

    ``kind`` is what was looked at: log, command or machine; ``status`` the command's exit status.
    """

    kind: str
    case: Case
    causes: tuple[Cause, ...]
    tried: tuple[Ruled, ...]
    collect: tuple[str, ...]
    notes: tuple[str, ...] = ()
    status: int | None = None

    @property
    def unknown(self) -> bool:
        """Whether the cause is not known."""
        return bool(self.collect)

    @property
    def ruled_out(self) -> tuple[Ruled, ...]:
        """What cannot be the cause."""
        named = {cause.id for cause in self.causes}
        return tuple(one for one in self.tried if one.state == "out" and one.id not in named)

    @property
    def exit_code(self) -> int:
        """3: unknown; 1: a check-up that found something in the way; else 0."""
        if self.unknown:
            return 3
        return 1 if self.kind == "machine" and self.causes else 0


def as_json(found: Diagnosis) -> dict[str, object]:
    """Schema 1."""
    log = found.case.log
    return {
        "schema": SCHEMA,
        "kind": found.kind,
        "causes": [{"rank": rank, **asdict(cause)} for rank, cause in enumerate(found.causes, 1)],
        "ruled_out": [{"id": one.id, "title": one.title, "how": one.how} for one in found.ruled_out],
        "not_ruled_out": [asdict(one) for one in found.tried if one not in found.ruled_out],
        "unknown": found.unknown,
        "collect": list(found.collect),
        "notes": list(found.notes),
        "failures": [describe(event) for event in log.everything],
        "log": {
            "lines": log.lines,
            "bytes": log.size,
            "recognised": log.recognised,
            "forms": sorted(log.forms),
            "maps_created": log.created,
            "dropped": log.dropped,
        },
        "command_status": found.status,
        "host": {
            "where": found.case.where,
            "facts": {
                key: {"value": known.value, "from": known.origin} for key, known in found.case.facts.items()
            },
        },
    }


def headline(found: Diagnosis) -> str:
    """The result in one line."""
    if found.unknown:
        return (
            "Unknown: something failed, and what is here does not show why."
            if found.case.log.failed
            else ("Unknown: nothing here says what failed.")
        )
    if not found.causes:
        return (
            "Nothing stands in the artifact's way on this machine."
            if found.kind == "machine"
            else "Nothing failed: no map creation, no mapping, nothing else that stops the artifact."
        )
    if found.kind == "machine":
        count = len(found.causes)
        return f"{count} thing{'s' * (count > 1)} would stop the artifact on this machine."
    return f"{found.causes[0].title} ({found.causes[0].confidence})."


def _say(console: Console, line: str, style: str = "", bold: int = 0) -> None:
    """Print a paragraph, indented, wrapped without the blanks that rich fills lines with."""
    for number, piece in enumerate(textwrap.wrap(line, max(40, console.width - 3)) or [""]):
        text = Text(piece, style)
        if number == 0:
            text.stylize("bold", 0, bold)
        console.print(Text("   ") + text, soft_wrap=True)


def show(console: Console, found: Diagnosis) -> None:
    """For people: causes with evidence and fix, what is ruled out and how, what to collect."""
    style = "bold yellow" if found.unknown else "bold red" if found.causes else "bold green"
    console.print(Text(headline(found), style))
    for rank, cause in enumerate(found.causes, 1):
        label = (f"[{cause.confidence}]", _STYLE[cause.confidence])
        console.print(Text.assemble(f"\n{rank}. ", (cause.title, "bold"), " ", label))
        for line in cause.evidence:
            _say(console, f"- {line}")
        for number, line in enumerate(cause.fix):
            _say(console, f"{'     ' if number else 'fix: '}{line}", "green")
    if found.ruled_out:
        console.print(Text("\nRuled out, so changing it cannot help:", "bold"))
        for one in found.ruled_out:
            _say(console, f"{one.title}: {one.how}", bold=len(one.title))
    if found.collect:
        console.print(Text("\nTo find out, collect:", "bold"))
        for line in found.collect:
            _say(console, f"- {line}")
    if found.unknown and found.case.log.failed:
        console.print(Text("\nWhat failed:", "bold"))
        for event in found.case.log.everything[:20]:
            _say(console, f"- {describe(event)}")
    for note in found.notes:
        console.print(Text(f"\nNote: {note}"), soft_wrap=True)
