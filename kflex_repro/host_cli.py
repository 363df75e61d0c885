"""``kflex-repro doctor``."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kflex_repro import host

_STYLE = {"ok": "green", "degraded": "yellow", "missing": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def doctor(as_json: bool) -> None:
    """What this machine can do: one row for each fact the toolkit depends on.

    Exit code 0 only if the default job (the offload and its benchmark) can run here.
    """
    lacking = host.missing()
    if as_json:
        click.echo(json.dumps(host.as_json(), indent=2))
        sys.exit(1 if lacking else 0)
    # Piped, a table is read by people's tools: no wrapping at the width of a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("state", "what", "found", "for", "how to get it"):
        table.add_column(column, overflow="fold")
    for fact in host.facts():
        if fact.required or fact.state == "ok":
            purpose = Text(fact.purpose)
        else:
            purpose = Text(f"{fact.purpose}; not for the default job")
        fix = fact.fix if fact.state != "ok" else ""
        table.add_row(Text(fact.state, _STYLE[fact.state]), fact.title, Text(fact.value), purpose, Text(fix))
    console.print(table)
    if not host.is_root():
        unseen = ", ".join(fact.title for fact in host.facts() if fact.needs_root)
        console.print(f"\nNot root: these rows can only be seen as root (sudo): {unseen}.", highlight=False)
    if lacking:
        names = ", ".join(fact.title for fact in lacking)
        console.print(Text(f"\nThe default job cannot run here; missing: {names}.", "bold red"))
        sys.exit(1)
    console.print(Text("\nThe default job can run: sudo make bench.", "green"))
