"""``kflex-repro profile``: parse, call, print."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kflex_repro.errors import KflexError
from kflex_repro.probe.options import chosen, parent, run_for, target_options
from kflex_repro.remote.options import remotely, results

if TYPE_CHECKING:
    from kflex_repro.probe.process import Process
    from kflex_repro.probe.stacks import Profile, Stack

_SHOWN = 15


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _errors() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


@remotely(out=lambda: results("profile"))
@click.group(invoke_without_command=True)
@target_options(many=True)
@click.option("--all", "everybody", is_flag=True, help="The whole machine: all processes, and the kernel.")
@click.option(
    "--duration", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Seconds."
)
@click.option(
    "--freq",
    type=click.IntRange(1, 20000),
    default=200,
    show_default=True,
    help="Samples per second of CPU time.",
)
@click.option("--off-cpu", is_flag=True, help="Where threads wait, instead of where they compute.")
@click.option(
    "--unwind",
    type=click.Choice(["dwarf", "fp"]),
    default="dwarf",
    show_default=True,
    help="User stacks: by unwind tables (any build; 8 KiB a sample), or by frame pointers (cheap).",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Directory [results/<UTC time>-profile]."
)
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON.")
@click.pass_context
def command(
    context: click.Context,
    pid: tuple[int, ...],
    port: tuple[int, ...],
    everybody: bool,
    duration: float,
    freq: int,
    off_cpu: bool,
    unwind: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Where a process spends its time: sampled stacks, as a flame graph.

    Writes stacks.collapsed, flamegraph.html (one file, works offline: zoom, search) and profile.json.
    Sampling is perf's, by CPU cycles or, where there are no counters, by the CPU clock. --off-cpu sums in the
    kernel how long threads did not run, by the stack they left. Ctrl-C ends the measurement and shows it.

    With the offload on, BPF programs answer in the client's context: profile the clients too, or --all.

    \b
    Examples:
      sudo kflex-repro profile --port 6379 --duration 10
      sudo kflex-repro profile --all --duration 10 --out with-offload
      sudo kflex-repro profile --port 6379 --off-cpu
      kflex-repro profile diff without-offload with-offload
    """
    if context.invoked_subcommand is not None:
        return
    if not (pid or port or everybody) or (everybody and (pid or port)):
        raise click.UsageError("give --pid, --port or --all")
    from kflex_repro.probe.process import need_host_pids

    need_host_pids()
    processes = chosen(pid, port)
    place = _made(out or Path("results") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-profile")
    who = ", ".join(map(str, processes)) or "all processes"
    if off_cpu:
        profile = _off_cpu(processes, duration, who)
    else:
        profile = _on_cpu(processes, duration, freq, unwind, place, who)
    _write(profile, place, _about(profile))
    _report(profile, place, as_json)


def _made(place: Path) -> Path:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KflexError(
            f"cannot make the directory: {error.strerror}", str(place), "choose another --out"
        ) from None
    return place


def _on_cpu(
    processes: list[Process], duration: float, freq: int, unwind: str, place: Path, who: str
) -> Profile:
    from kflex_repro.probe import perf
    from kflex_repro.probe.stacks import Profile

    event = "cycles" if perf.hardware_clock() else "cpu-clock"
    request = perf.Request(tuple(processes), freq, unwind, event)
    # Beside the result, not in /tmp: it can be large. It goes away with its directory.
    with tempfile.TemporaryDirectory(prefix=".perf-", dir=place) as scratch:
        data = Path(scratch) / "perf.data"
        recording = perf.Recording(request, data)
        try:
            with _errors().status("starting perf"):
                recording.start()
            seconds, ended = run_for(duration, processes, _errors(), "sampling", lambda: recording.running)
            recording.stop()
        finally:
            recording.kill()
        size = data.stat().st_size
        with _errors().status(f"reading {size >> 20} MiB of samples"):
            stacks = perf.read(data)
    _hidden_kernel(stacks)
    if not stacks:
        raise KflexError(
            "not one sample", who, "it was idle: give it work, or see where it waits with --off-cpu"
        )
    facts = {"event": event, "freq": freq, "unwind": unwind, **_facts(processes, seconds, ended)}
    return Profile(f"{who}: on CPU", "samples", stacks, facts)


def _hidden_kernel(found: Mapping[Stack, int]) -> None:
    """Say it where the kernel's frames have no names."""
    from kflex_repro.probe.stacks import KERNEL

    hidden = sum(
        weight for stack, weight in found.items() if stack[-1].startswith("[kernel") and KERNEL in stack[-1]
    )
    if hidden * 10 > sum(found.values()):
        _errors().print(
            "kernel frames have no names: the kernel hides its addresses (sysctl kernel.kptr_restrict=1)"
        )


def _off_cpu(processes: list[Process], duration: float, who: str) -> Profile:
    from kflex_repro.probe.offcpu import OffCpuTrace
    from kflex_repro.probe.stacks import Profile

    trace = OffCpuTrace(processes)
    try:
        with _errors().status("attaching"):
            trace.start()
        seconds, ended = run_for(duration, processes, _errors(), "summing waits")
        trace.stop()
        with _errors().status("finding names"):
            waits = trace.read()
    finally:
        trace.close()
    if not waits.stacks:
        raise KflexError("no thread waited and ran again", who, "longer, with --duration?")
    if waits.lost:
        _errors().print(
            f"{waits.lost:,} of {waits.waits:,} waits have no stack, or were not counted: too many stacks"
        )
    facts = {
        "waits": waits.waits,
        "lost": waits.lost,
        "probe": trace.kind,
        **_facts(processes, seconds, ended),
    }
    return Profile(f"{who}: off CPU", "µs", waits.stacks, facts)


def _facts(processes: list[Process], seconds: float, ended: str) -> dict[str, object]:
    who = [{"pid": one.pid, "name": one.name} for one in processes]
    return {"processes": who, "seconds": seconds, "ended": ended}


def _about(profile: Profile) -> str:
    facts = profile.facts
    how = f"{facts['event']} at {facts['freq']} Hz" if "event" in facts else f"{facts['waits']:,} waits"
    amount = (
        f"{profile.total:,} samples"
        if profile.unit == "samples"
        else f"{profile.total / 1e6:.2f} s of waiting"
    )
    return f"{amount} in {facts['seconds']:.1f} s, {how}"


def _write(profile: Profile, place: Path, about: str) -> None:
    from kflex_repro.bench.result import write_atomically
    from kflex_repro.probe import flamegraph, stacks

    write_atomically(place / stacks.FILE, stacks.text(profile.stacks).encode())
    write_atomically(place / "flamegraph.html", flamegraph.page(profile, about).encode())
    write_atomically(place / "profile.json", (json.dumps(_summary(profile), indent=1) + "\n").encode())


def _summary(profile: Profile) -> dict[str, Any]:
    from kflex_repro.probe.stacks import by_function

    found = by_function(profile.stacks)
    names = sorted(found, key=lambda name: (-found[name].own, -found[name].total, name))
    functions = [{"name": name, "own": found[name].own, "total": found[name].total} for name in names]
    head = {"schema": 1, "title": profile.title, "unit": profile.unit, "total": profile.total}
    return {**head, **profile.facts, "functions": functions}


def _report(profile: Profile, place: Path, as_json: bool) -> None:
    summary = _summary(profile)
    if as_json:
        click.echo(json.dumps({**summary, "out": str(place)}, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = Text(f"{profile.title}, {_about(profile)}")
    for column in ("own", "with callees"):
        table.add_column(column, justify="right")
    table.add_column("function")
    for one in summary["functions"][:_SHOWN]:
        shares = (f"{one[part] / profile.total:.1%}" for part in ("own", "total"))
        table.add_row(*shares, Text(one["name"]))
    console = _console()
    console.print(table)
    console.print(Text(f"\nflame graph: {place / 'flamegraph.html'}"))


# --- diff -------------------------------------------------------------------------------------------------


@command.command("diff")
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("difference.html"),
    show_default=True,
    help="The flame graph.",
)
@click.option("--json", "as_json", is_flag=True, help="The functions whose share changed, as JSON.")
def diff(before: Path, after: Path, out: Path, as_json: bool) -> None:
    """What changed between two profiles: BEFORE and AFTER are directories of profile, or collapsed stacks.

    They are compared by their shares of the whole, so they may differ in length. The graph has the widths of
    AFTER (a button shows BEFORE's); red frames have a larger share than before, blue ones a smaller.
    """
    from kflex_repro.bench.result import write_atomically
    from kflex_repro.probe import flamegraph, stacks

    first, second = stacks.load(before), stacks.load(after)
    if first.unit != second.unit:
        raise KflexError(
            f"one profile is in {first.unit}, the other in {second.unit}",
            f"{before}, {after}",
            "compare on-CPU with on-CPU, off-CPU with off-CPU",
        )
    parent(out)
    write_atomically(out, flamegraph.difference(first, second).encode())
    changes = stacks.changes(first.stacks, second.stacks)
    if as_json:
        rows = [{"name": one.name, "before": one.before, "after": one.after} for one in changes]
        click.echo(
            json.dumps({"schema": 1, "unit": second.unit, "out": str(out), "own_share": rows}, indent=1)
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("before", "after", "points"):
        table.add_column(column, justify="right")
    table.add_column("function (its own share)")
    for one in changes[:_SHOWN]:
        points = 100 * (one.after - one.before)
        style = "red" if points > 0 else "blue"
        table.add_row(f"{one.before:.1%}", f"{one.after:.1%}", Text(f"{points:+.1f}", style), Text(one.name))
    console = _console()
    console.print(table)
    console.print(Text(f"\nflame graph: {out}"))
