"""``kflex-repro run``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kflex_repro.build import artifact_record, artifact_source
from kflex_repro.build.artifact_record import Record
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.run import needs, program
from kflex_repro.run.modes import IFINDEX, MODES, PORT, Mode
from kflex_repro.run.needs import Check, Interface

_STYLE = {"ok": "green", "warning": "yellow", "missing": "bold red"}


def _describe(console: Console, mode: Mode, words: list[str]) -> None:
    console.print(Text(f"--mode {mode.name}: {mode.title}", "bold"))
    lines = [("serves", line) for line in mode.serves] + [("does not", line) for line in mode.does_not]
    lines += [
        ("where", f"port {PORT}, fixed; listening threads: {mode.threads}; as root"),
        ("hooks", mode.hooks),
        ("--ifindex", IFINDEX if mode.interface else "not read in this mode"),
        (
            "command",
            " ".join([*(f"{name}={value}" for name, value in program.environment().items()), *words]),
        ),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    last = ""
    for name, line in lines:
        table.add_row("" if name == last else name, Text(line))
        last = name
    console.print(table)


def _print_checks(console: Console, checks: Iterable[Check]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("state", "what", "found", "how to get it"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(Text(check.state, _STYLE[check.state]), check.name, Text(check.value), Text(check.fix))
    console.print(table)


def _as_json(
    mode: Mode, words: list[str], checks: Iterable[Check], on: Interface | None, record: Record | None
) -> str:
    checks = list(checks)
    return json.dumps(
        {
            "schema": 1,
            "mode": {**asdict(mode), "port": PORT},
            "interface": asdict(on) if on else None,
            "source": record.source if record else None,
            "recipes": list(record.recipes) if record else [],
            "command": words,
            "environment": program.environment(),
            "can_run": all(check.state != "missing" for check in checks),
            "checks": [asdict(check) for check in checks],
        },
        indent=2,
    )


@click.command()
@click.option("--artifact", is_flag=True, required=True, help="The KFlex artifact that was built here.")
@click.option(
    "--mode",
    "name",
    type=click.Choice(sorted(MODES)),
    required=True,
    help="kredis: PING and two sorted-set commands. kmemcached: GET and SET in RESP, GET answered by a "
    "constant. kmemcache: memcached over UDP by XDP.",
)
@click.option("--ifindex", type=click.IntRange(1), help="Index of the network interface (kmemcache).")
@click.option("--interface", metavar="NAME", help="The same by name.")
@click.option(
    "--source", type=click.Path(path_type=Path), metavar="DIR", help="Which tree's build; else the last."
)
@click.option("--dry-run", is_flag=True, help="Say what the mode is and what is missing; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON; runs nothing.")
def run(
    artifact: bool,
    name: str,
    ifindex: int | None,
    interface: str | None,
    source: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Say what a mode of the KFlex artifact really serves, and run it where this kernel can.

    Needs `kflex-repro build --artifact` first. Runs in the foreground until Ctrl-C; then its maps, programs
    and, for kmemcache, its XDP program are gone. Exit code 3 if something it needs is missing here.
    """
    del artifact
    mode = MODES[name]
    on: Interface | None = None
    if mode.interface and not (dry_run and ifindex is None and interface is None):
        on = needs.interface(ifindex, interface)
    elif not mode.interface and (ifindex is not None or interface is not None):
        raise KflexError(f"--mode {name} uses no interface", "", f"leave it out: {IFINDEX}")
    built: KflexError | None = None
    record: Record | None = None
    root = artifact_source.find(source).root if source else None
    try:
        record = artifact_record.find(root)
    except KflexError as error:
        built = error
    words = program.command(record.executable if record else Path("ffkx"), mode, on)
    checks = [_built_check(record, built), *_checks(mode, record, on)]
    lacking = [check for check in checks if check.state == "missing"]
    if as_json:
        click.echo(_as_json(mode, words, checks, on, record))
        sys.exit(3 if lacking else 0)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    _describe(console, mode, words)
    _print_checks(console, checks)
    if lacking:
        names = ", ".join(check.name for check in lacking)
        raise Unavailable(f"--mode {name} cannot run here, missing: {names}", "", lacking[0].fix)
    if dry_run:
        return
    console.print(f"It says {mode.ready!r} when it is. Ctrl-C ends it.")
    sys.stdout.flush()
    sys.exit(program.run(words, on))


def _built_check(record: Record | None, error: KflexError | None) -> Check:
    if record is None:
        assert error is not None
        return Check("the build", "missing", error.what, error.fix)
    if record.stale:
        fix = f"kflex-repro build --artifact --source {record.source}"
        return Check("the build", "warning", f"{record.source} has changed since it was built", fix)
    recipes = ", ".join(record.recipes) or "no recipes"
    return Check("the build", "ok", f"of {record.source}, {recipes}")


def _checks(mode: Mode, record: Record | None, on: Interface | None) -> tuple[Check, ...]:
    if record is None:
        # Without objects there is only the kernel's own to ask.
        return needs.of_mode(mode, (), None, (), on)
    return needs.of_mode(mode, [record.object(mode.object)], record.executable, record.recipes, on)
