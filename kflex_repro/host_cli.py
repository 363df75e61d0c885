"""``kflex-repro doctor``."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kflex_repro import host

_STYLE = {"ok": "green", "degraded": "yellow", "missing": "bold red"}


def _hello(as_json: bool) -> None:
    from kflex_repro.probe import hello

    errors = Console(stderr=True)
    with errors.status("counting read() calls") if errors.is_terminal else contextlib.nullcontext():
        seen = hello.hello()
    if as_json:
        click.echo(json.dumps(asdict(seen), indent=2))
        return
    click.echo(f"eBPF works: {seen.calls:,} read() calls in {seen.seconds:.1f} s, seen by a {seen.how}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("calls", "pid", "process"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for reads in seen.top:
        table.add_row(f"{reads.calls:,}", str(reads.pid), Text(reads.command))
    Console(highlight=False).print(table)
    if seen.missed:
        click.echo(f"{seen.missed:,} calls of further processes were not told apart")
    click.echo("Nothing of it is left attached.")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option(
    "--hello",
    "say_hello",
    is_flag=True,
    help="Instead: load the smallest real BPF program and count read() calls for two seconds.",
)
def doctor(as_json: bool, say_hello: bool) -> None:
    """What this machine can do: one row for each fact the toolkit depends on.

    Exit code 0 only if the default job (the offload and its benchmark) can run here.

    --hello is the first thing to try on a new machine: it compiles, loads and attaches a program, shows what
    it counted, and leaves nothing.
    """
    if say_hello:
        _hello(as_json)
        return
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
