"""``kflex-repro diagnose``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from kflex_repro.diagnose import diagnosis, report, run, trace
from kflex_repro.diagnose.case import Where
from kflex_repro.diagnose.cause import Cause
from kflex_repro.errors import EXIT_FAILED, KflexError
from kflex_repro.heap.model import Heap


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--log", "log_path", metavar="FILE", help="Read a log instead of running a command (-: standard input)."
)
@click.option("--source", metavar="DIR", type=click.Path(path_type=Path), help="The KFlex source tree.")
@click.option(
    "--fix", is_flag=True, help="Apply what a recipe can do about the causes found to the tree (--source)."
)
@click.option("--dry-run", is_flag=True, help="With --fix: show the diffs, change nothing.")
@click.option(
    "--strace", "with_strace", is_flag=True, help="Run the command under strace, not the traced libbpf."
)
@click.option(
    "--this-machine/--other-machine",
    "this_machine",
    default=None,
    help="Whether the log is of this machine (default: unless it says otherwise, and labelled so).",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON (schema 1) on standard output.")
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path), help="Write the JSON report to a file too."
)
def diagnose(
    command: tuple[str, ...],
    log_path: str | None,
    source: Path | None,
    fix: bool,
    dry_run: bool,
    with_strace: bool,
    this_machine: bool | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Why the KFlex artifact fails: causes, ranked, with evidence and fix; what is ruled out, and how.

    \b
      kflex-repro diagnose -- ./main --kredis       runs it, traced, and says what went wrong
      kflex-repro diagnose --log FILE               reads what you have: strace, libbpf, dmesg, a trace
      kflex-repro diagnose --source DIR             no failure yet: would it work here?

    Any mixture of these texts is read, of any size, noise too. What a log says of its machine (RAM, limits,
    kernel, pasted beside it) beats what is true of this one. A command runs as it would without us; Ctrl-C
    ends it, and the report follows.

    Exit code: 0 the cause was found, or nothing failed; 3 unknown (the report says what to collect); without
    log and command: 0 nothing is in the way, 1 something is.
    """
    if command and log_path is not None:
        raise click.UsageError("give a log or a command, not both")
    if fix and source is None:
        raise click.UsageError("--fix changes a source tree: give --source DIR")
    if dry_run and not fix:
        raise click.UsageError("--dry-run goes with --fix")
    if with_strace and not command:
        raise click.UsageError("--strace goes with a command")
    heaps, applied = diagnosis.of_tree(source) if source is not None else ((), frozenset[str]())
    if source is not None and not heaps:
        raise KflexError("no heap is declared in it", str(source), "give the root of a KFlex source tree")
    if command:
        found = _of_command(command, heaps, with_strace, as_json)
    elif log_path is not None:
        where: Where = "unknown" if this_machine is None else "this" if this_machine else "other"
        found = diagnosis.of_log(_read(log_path), where, heaps)
    else:
        found = diagnosis.of_machine(heaps, applied)
    if source is not None:
        found = replace(found, causes=tuple(_addressed(cause, source) for cause in found.causes))
    if out is not None:
        _write(out, json.dumps(report.as_json(found), indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(report.as_json(found), indent=2))
    else:
        report.show(Console(width=None if sys.stdout.isatty() else 160, highlight=False), found)
    if fix and source is not None:
        repaired = _fix(found.causes, source, dry_run, as_json)
        sys.exit(found.exit_code if repaired else EXIT_FAILED)
    sys.exit(found.exit_code)


def _addressed(cause: Cause, source: Path) -> Cause:
    """The cause with commands that name the tree."""
    return replace(cause, fix=tuple(line.replace("--source DIR", f"--source {source}") for line in cause.fix))


def _of_command(
    command: tuple[str, ...], heaps: tuple[Heap, ...], with_strace: bool, as_json: bool
) -> report.Diagnosis:
    libbpf = None if with_strace else run.traced_libbpf(lambda line: click.echo(line, err=True))
    ran = run.run(command, libbpf, output_to_stderr=as_json)
    found = diagnosis.of_log(ran.log, "this", heaps, "command", ran.limits)
    ended = f"was ended by signal {-ran.status}" if ran.status < 0 else f"exited with {ran.status}"
    notes = [f"the command {'was interrupted and ' * ran.interrupted}{ended}"]
    collect = found.collect
    if libbpf is not None and "trace" not in ran.log.forms:
        notes.append("it made no map through a shared libbpf; if it has its own inside, --strace sees it")
        if ran.status and not found.causes:
            collect = ("its system calls: kflex-repro diagnose --strace -- COMMAND", *collect)
    elif ran.status and not ran.interrupted and not found.causes and not collect:
        collect = ("what it printed: it failed, but no map, no mapping and nothing else that we know did",)
    return replace(found, notes=(*notes, *found.notes), collect=tuple(collect), status=ran.status)


def _read(path: str) -> trace.Log:
    with contextlib.ExitStack() as stack:
        if path == "-":
            stream = sys.stdin.buffer
            size = None
        else:
            try:
                stream = stack.enter_context(Path(path).open("rb"))
                size = os.fstat(stream.fileno()).st_size or None
            except OSError as error:
                raise KflexError(f"cannot read the log: {error.strerror}", path) from None
        try:
            return trace.read(stream, stack.enter_context(_progress(size)))
        except OSError as error:
            raise KflexError(f"cannot read the log: {error.strerror}", path) from None


@contextlib.contextmanager
def _progress(size: int | None) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    # What is read in less than two seconds needs no bar.
    if not console.is_terminal or (size is not None and size < 64 << 20):
        yield lambda _: None
        return
    columns = (TextColumn("reading"), BarColumn(30), DownloadColumn(binary_units=True), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("log", total=size)
        yield lambda amount: progress.advance(task, amount)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise KflexError(f"cannot write the report: {error.strerror}", str(path)) from None


def _fix(causes: tuple[Cause, ...], source: Path, dry_run: bool, as_json: bool) -> bool:
    """Run the commands that the report recommends, as a user would; False if one of them could not."""
    from kflex_repro.cli import cli

    recipes = dict.fromkeys(cause.recipe for cause in causes if cause.recipe)
    repaired = True
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if not recipes:
            click.echo("\nNothing that was found can be repaired in the source tree.")
        for recipe in recipes:
            arguments = ["fit-heap", "--auto"] if recipe == "fit-heap" else ["patch", "apply", recipe]
            arguments += ["--source", str(source), *["--dry-run"] * dry_run]
            click.echo(f"\n$ kflex-repro {' '.join(arguments)}")
            try:
                cli.main(args=arguments, prog_name="kflex-repro", standalone_mode=False)
            except KflexError as error:
                # The others may still be repaired.
                click.echo(f"kflex-repro: {error}", err=True)
                repaired = False
    return repaired
