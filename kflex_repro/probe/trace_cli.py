"""``kflex-repro trace``: parse, call, print."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from kflex_repro.errors import KflexError
from kflex_repro.probe.options import chosen, parent, run_for, target_options
from kflex_repro.remote.options import remotely

if TYPE_CHECKING:
    from kflex_repro.probe.functions import Called, Cost, FunctionTrace
    from kflex_repro.probe.process import Process
    from kflex_repro.probe.syscalls import Syscall

# From so many probed functions on, the cost is measured and said first.
MANY = 500
_CHART_ROWS = 24


@click.group()
def group() -> None:
    """Count what a process does: its system calls, its functions.

    Everything is taken off again at the end, also by Ctrl-C, which ends the measurement early and shows it.
    """


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _errors() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _common(command: Any) -> Any:
    for option in (
        click.option(
            "--png", type=click.Path(path_type=Path, dir_okay=False), help="Also a bar chart, as PNG."
        ),
        click.option("--json", "as_json", is_flag=True, help="The result as JSON."),
        click.option(
            "--top", type=click.IntRange(1), default=40, show_default=True, help="Rows of the table."
        ),
        click.option(
            "--duration",
            type=click.FloatRange(0, min_open=True),
            default=10.0,
            show_default=True,
            help="Seconds; Ctrl-C or the end of the process ends it earlier.",
        ),
    ):
        command = option(command)
    return command


def _us(ns: float | None) -> str:
    from kflex_repro.bench.summary import number

    if ns is None:
        return "–"
    for factor, unit in ((1e9, " s"), (1e6, " ms")):
        if ns >= factor:
            return number(ns / factor, unit)
    return number(ns / 1e3, " µs")


def _save_chart(png: Path | None, *arguments: Any) -> None:
    if png is None:
        return
    from kflex_repro.bench.result import write_atomically
    from kflex_repro.probe import chart

    parent(png)
    write_atomically(png, chart.bars(*arguments))
    _errors().print(f"chart: {png}")


# --- system calls -----------------------------------------------------------------------------------------


@remotely(png=None)
@group.command()
@target_options(many=True)
@_common
def syscalls(
    pid: tuple[int, ...], port: tuple[int, ...], duration: float, top: int, as_json: bool, png: Path | None
) -> None:
    """Count and time system calls, of the given processes or of all but this one.

    The time is from entry to return, so it includes waiting: epoll_wait is how long there was nothing to do.
    Calls that did not return before the end count without a time. Attached are BTF tracepoints, or raw
    tracepoints where the host refuses those.

    \b
    Example:  sudo kflex-repro trace syscalls --port 6379 --duration 5
    """
    from kflex_repro.probe.syscalls import SyscallTrace

    processes = chosen(pid, port)
    parent(png)
    trace = SyscallTrace(processes)
    try:
        with _errors().status("attaching"):
            trace.start()
        seconds, ended = run_for(duration, processes, _errors())
        trace.stop()
        found = trace.read()
    finally:
        trace.close()
    if as_json:
        click.echo(json.dumps(_syscalls_json(found, processes, seconds, ended, trace.kind), indent=2))
    else:
        _console().print(_syscalls_table(found[:top], found, seconds, _named(processes)))
    from kflex_repro.probe import chart

    shown = found[: min(top, _CHART_ROWS)]
    _save_chart(
        png,
        f"System calls of {_named(processes)}",
        f"{seconds:.1f} s",
        [one.name for one in shown],
        [
            chart.counts("calls", [one.calls for one in shown]),
            chart.Panel(
                "time in them", [one.times.ns for one in shown], [_us(one.times.ns) for one in shown]
            ),
        ],
    )


def _named(processes: Sequence[Process]) -> str:
    return ", ".join(map(str, processes)) or "all processes"


def _who(processes: Sequence[Process]) -> list[dict[str, Any]]:
    return [{"pid": one.pid, "name": one.name} for one in processes]


def _syscalls_json(
    found: Sequence[Syscall], processes: Sequence[Process], seconds: float, ended: str, kind: str
) -> dict[str, Any]:
    head = {"schema": 1, "processes": _who(processes), "seconds": seconds, "ended": ended, "probe": kind}
    return {**head, "syscalls": [one.as_dict() for one in found]}


def _syscalls_table(shown: Sequence[Syscall], found: Sequence[Syscall], seconds: float, who: str) -> Table:
    total = sum(one.times.ns for one in found) or 1
    calls, errors = sum(one.calls for one in found), sum(one.errors for one in found)
    title = f"{who}: {calls:,} system calls in {seconds:.1f} s, {errors:,} errors"
    if len(shown) < len(found):
        title += f"; {len(found) - len(shown)} more rows with --top"
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("system call")
    for column in ("calls", "calls/s", "errors", "time", "share", "p50", "p99", "longest"):
        table.add_column(column, justify="right")
    for one in shown:
        table.add_row(
            one.name,
            f"{one.calls:,}",
            f"{one.calls / seconds:,.0f}",
            f"{one.errors:,}" if one.errors else "",
            _us(one.times.ns),
            f"{one.times.ns / total:.1%}",
            *(_us(one.times.quantile(q)) for q in (0.5, 0.99)),
            _us(one.times.max_ns) if one.returned else "–",
        )
    return table


# --- functions --------------------------------------------------------------------------------------------


@remotely(png=None)
@group.command()
@target_options()
@click.option(
    "--match", multiple=True, metavar="PATTERN", help="Functions by name, e.g. 'dict*'; repeatable."
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these; repeatable.")
@click.option(
    "--library", metavar="NAME", help="Of this mapped library (part of its file name), not the program."
)
@click.option("--time", "timed", is_flag=True, help="Also the time in each: a second probe, at the return.")
@click.option("--yes", is_flag=True, help=f"Go on with {MANY} functions or more without asking.")
@click.option("--dry-run", is_flag=True, help="Say what would be probed, and what a probe costs here.")
@_common
def functions(
    pid: int | None,
    port: int | None,
    match: tuple[str, ...],
    exclude: tuple[str, ...],
    library: str | None,
    timed: bool,
    yes: bool,
    dry_run: bool,
    duration: float,
    top: int,
    as_json: bool,
    png: Path | None,
) -> None:
    """Count the calls of a process's functions (all threads; not of children it forks), by uprobes.

    A uprobe is a breakpoint: each call of a probed function enters the kernel. What that costs is measured on
    this machine, on a child of ours, and said before many functions are probed. Debian's redis-server is
    stripped but exports its functions; static ones get names from a -dbgsym package. With --time, don't probe
    programs that move their stacks (Go).

    \b
    Examples:
      sudo kflex-repro trace functions --port 6379 --match processCommand --match 'dict*'
      sudo kflex-repro trace functions --pid 4242 --match 'lookupKey*' --time
      sudo kflex-repro trace functions --port 6379 --yes          # all of them
    """
    from kflex_repro.probe import functions as probe

    processes = chosen((pid,) if pid is not None else (), (port,) if port is not None else ())
    if len(processes) != 1:
        who = _named(processes) if processes else "none is given"
        raise click.UsageError(f"functions are counted of one process ({who}): give --pid")
    process = processes[0]
    binary = probe.binary(process, library)
    wanted = probe.select(binary, match or ("*",), exclude)
    parent(png)
    cost = None
    if timed or dry_run or len(wanted) >= MANY:
        with _errors().status("measuring what a probe costs, on a child of ours"):
            cost = probe.measured_cost(timed)
    if dry_run:
        _say_dry(process, binary.path, wanted, cost, as_json)
        return
    if cost is not None and len(wanted) >= MANY:
        _warn(process, len(wanted), cost, yes)
    with _attached(process, binary.path, wanted, timed) as trace:
        seconds, ended = run_for(duration, processes, _errors())
        _detach(trace)
        found = trace.read()
        refused = [one.name for one in trace.refused]
    share = sum(one.calls for one in found) * cost.added_ns / (seconds * 1e9) if cost else None
    if as_json:
        head = {"schema": 1, "processes": _who(processes), "seconds": seconds, "ended": ended}
        costs = {"probe_added_ns": round(cost.added_ns), "probe_share_of_a_cpu": share} if cost else {}
        floor = {"probe_floor_ns": cost.floor_ns} if cost and timed else {}
        click.echo(
            json.dumps(
                {
                    **head,
                    "file": str(binary.path.resolve()),
                    "probed": len(wanted) - len(refused),
                    "refused": refused,
                    **costs,
                    **floor,
                    "functions": [one.as_dict() for one in found],
                },
                indent=2,
            )
        )
    else:
        _console().print(_functions_table(found[:top], len(found), len(wanted), seconds, process))
        _footnotes(cost, share, timed, refused)
    _functions_chart(png, found[: min(top, _CHART_ROWS)], process, seconds)


def _say_dry(process: Process, path: Path, wanted: Sequence[Any], cost: Cost | None, as_json: bool) -> None:
    added = cost.added_ns if cost else 0.0
    if as_json:
        names = [one.name for one in wanted]
        click.echo(
            json.dumps({"pid": process.pid, "file": str(path), "probe_added_ns": added, "functions": names})
        )
        return
    for one in wanted:
        click.echo(one.name)
    _errors().print(
        f"would probe {len(wanted):,} functions of {process}; each call would take up to {_us(added)} longer"
    )


def _warn(process: Process, number: int, cost: Cost, yes: bool) -> None:
    line = (
        f"{number:,} functions of {process}: each call of one takes up to {_us(cost.added_ns)} longer "
        f"(measured here), a request that makes 100 such calls {_us(cost.added_ns * 100)}"
    )
    if yes:
        _errors().print(Text(line, "yellow"))
    elif sys.stdin.isatty() and sys.stderr.isatty():
        click.confirm(f"{line}. Go on?", abort=True, err=True)
    else:
        raise KflexError(line, "", "choose fewer with --match, or go on with --yes")


@contextlib.contextmanager
def _attached(process: Process, path: Path, wanted: Sequence[Any], timed: bool) -> Iterator[FunctionTrace]:
    from kflex_repro.probe.functions import FunctionTrace

    with _bar("attaching", len(wanted) * (2 if timed else 1)) as advance:
        trace = FunctionTrace(process, path, wanted, timed=timed, attached=advance).start()
    try:
        yield trace
    finally:
        trace.close()


def _detach(trace: FunctionTrace) -> None:
    with _bar("taking the probes off", trace.probes) as advance:
        trace.stop(advance)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=_errors(), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda step: progress.advance(task, step)


def _functions_table(
    shown: Sequence[Called], called: int, probed: int, seconds: float, process: Process
) -> Table:
    title = f"{process}: {called:,} of {probed:,} probed functions were called in {seconds:.1f} s"
    if len(shown) < called:
        title += f"; {called - len(shown)} more rows with --top"
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("function")
    timed = any(one.times for one in shown)
    for column in ("calls", "calls/s", *(("own time", "time", "p50", "p99", "longest") if timed else ())):
        table.add_column(column, justify="right")
    for one in shown:
        cells = [one.function.name, f"{one.calls:,}", f"{one.calls / seconds:,.0f}"]
        if one.times is not None:
            quantiles = [_us(one.times.quantile(q)) for q in (0.5, 0.99)]
            cells += [_us(one.self_ns), _us(one.times.ns), *quantiles, _us(one.times.max_ns)]
        table.add_row(*cells)
    return table


def _footnotes(cost: Cost | None, share: float | None, timed: bool, refused: Sequence[str]) -> None:
    errors = _errors()
    if cost is not None and share is not None:
        floor = f"; a function that does nothing shows as {_us(cost.floor_ns)}" if timed else ""
        each = f"{_us(cost.added_ns)} a call, measured on a child of ours"
        errors.print(f"the probes took up to {share:.0%} of one CPU: {each}{floor}")
    if refused:
        names = ", ".join(refused[:6]) + (" …" if len(refused) > 6 else "")
        errors.print(f"{len(refused)} functions take no probe: {names}")


def _functions_chart(png: Path | None, shown: Sequence[Called], process: Process, seconds: float) -> None:
    from kflex_repro.probe import chart

    panels = [chart.counts("calls", [one.calls for one in shown])]
    if any(one.times for one in shown):
        own = [one.self_ns for one in shown]
        panels.append(chart.Panel("own time, with the probes' cost", own, [_us(ns) for ns in own]))
    names = [one.function.name for one in shown]
    _save_chart(png, f"Functions of {process}", f"{seconds:.1f} s", names, panels)


# --- list -------------------------------------------------------------------------------------------------


@remotely()
@group.command("list")
@click.argument("kind", type=click.Choice(["syscalls", "functions", "tracepoints", "libraries"]))
@target_options()
@click.option("--match", multiple=True, metavar="PATTERN", help="Names, e.g. 'epoll*'; repeatable.")
@click.option("--library", metavar="NAME", help="Functions of this mapped library, not of the program.")
@click.option("--json", "as_json", is_flag=True, help="The list as JSON.")
def list_(
    kind: str,
    pid: int | None,
    port: int | None,
    match: tuple[str, ...],
    library: str | None,
    as_json: bool,
) -> None:
    """What can be probed: system calls, tracepoints of this kernel, functions or libraries of a process."""
    patterns = match or ("*",)
    if kind == "syscalls":
        from kflex_repro.probe.syscalls import listed

        rows = [{"name": name, "number": number} for number, name in listed()]
    elif kind == "tracepoints":
        from kflex_repro.probe.tracepoints import names

        rows = [{"name": name} for name in names()]
    else:
        from kflex_repro.probe import functions as probe

        processes = chosen((pid,) if pid is not None else (), (port,) if port is not None else ())
        if len(processes) != 1:
            raise click.UsageError(f"{kind} of which process ({_named(processes)})? give --pid or --port")
        if kind == "libraries":
            rows = [{"name": str(path)} for path in probe.mapped(processes[0])[1:]]
        else:
            found = probe.binary(processes[0], library).functions
            rows = [{"name": one.name, "offset": one.offset, "bytes": one.size} for one in found]
    rows = [row for row in rows if any(fnmatch.fnmatchcase(str(row["name"]), one) for one in patterns)]
    if not rows:
        raise KflexError(
            f"no {kind} match {' or '.join(patterns)}", "", f"see `kflex-repro trace list {kind}`"
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(row["name"] if "number" not in row else f"{row['number']:>4} {row['name']}")
