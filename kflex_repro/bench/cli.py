"""``kflex-repro bench``: parse, call, print."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kflex_repro import patience
from kflex_repro.bench.mark import emulated, mark
from kflex_repro.bench.place import Place, choose
from kflex_repro.bench.progress import duration, finished_line, many, planned, progress_bar, running
from kflex_repro.bench.result import read_result
from kflex_repro.bench.run import Clock, Events, Options, Plan, Run, check_host, make_plan
from kflex_repro.bench.scenario import Scenario, estimate, load_scenarios
from kflex_repro.bench.summary import closing_line, headings, missed_targets, rows
from kflex_repro.errors import KflexError


@click.group()
def group() -> None:
    """Benchmark plain Redis against the offload, and servers with probes against servers without."""


@group.command("redis")
@click.option(
    "--attach", metavar="HOST:PORT", help="Benchmark this running server (kflex.so loaded) as it is."
)
@click.option("--quick", is_flag=True, help="GET, SET and the 90:10 mix, 3 pairs: about two minutes.")
@click.option("--list", "list_them", is_flag=True, help="List the scenarios and end.")
@click.option(
    "--scenario", "names", metavar="NAME", multiple=True, help="Only this one (repeatable; NAME* works)."
)
@click.option("--pairs", type=click.IntRange(1, 1000), help="Interleaved pairs per scenario [5; --quick: 3].")
@click.option("--seconds", type=click.FloatRange(0.5, 600), help="Seconds per run [3; --quick: 2.5].")
@click.option("--netns", is_flag=True, help="Also clients in a network namespace of their own, over veth.")
@click.option("--out", type=click.Path(path_type=Path), help="Results directory [results/<UTC time>-redis].")
@click.option(
    "--json", "as_json", is_flag=True, help="Print result.json to stdout (everything else to stderr)."
)
@click.option("--dry-run", is_flag=True, help="Say what would be run and how long it takes, and end.")
@click.option(
    "--keys", type=click.IntRange(100, 5_000_000), help="Size of the key space instead of the scenarios'."
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the offloaded server [a free one].")
@click.option(
    "--probe",
    "with_probe",
    is_flag=True,
    help="Also what requests take inside the server: queueing, execution, reply.",
)
@click.option(
    "--vm/--no-vm",
    "vm",
    default=None,
    help="In a small VM, or by no means [where this host refuses BPF, in a VM].",
)
@click.option("--raw", is_flag=True, hidden=True, help="The guest's part of --vm.")
def redis(
    attach: str | None,
    quick: bool,
    list_them: bool,
    names: tuple[str, ...],
    pairs: int | None,
    seconds: float | None,
    netns: bool,
    out: Path | None,
    as_json: bool,
    dry_run: bool,
    keys: int | None,
    port: int | None,
    with_probe: bool,
    vm: bool | None,
    raw: bool,
) -> None:
    """Compare redis-server alone with the same redis-server and GET and SET served in the kernel.

    Starts servers of its own (or uses --attach), runs every scenario in interleaved pairs against plain Redis
    over TCP and over its unix socket, checks answers all the while, and writes result.json, report.html and
    PNGs. Ctrl-C keeps what was completed.

    Where this host refuses BPF (not root, a container, an old kernel: `kflex-repro doctor`) it runs in a VM
    with the distribution's stock kernel, as any user; nothing is installed, and Ctrl-C ends it all. Without
    KVM the VM is emulated: then fewer and smaller scenarios are run, to see that all works and all answers
    are right, and no figure says how fast.

    Exit codes: 0 all answers right, 1 wrong answers or a failure, 2 usage, 3 this machine cannot, 130 Ctrl-C.
    """
    if list_them:
        _print_list(load_scenarios(), as_json)
        return
    options = Options(attach, quick, names, pairs, seconds, netns, out, keys, port, with_probe)
    options = replace(options, emulated=patience.emulated())
    plan = make_plan(options)
    if raw:
        _in_guest(options)
        return
    place = choose(vm, attach)
    if dry_run:
        _print_plan(make_plan(replace(options, emulated=True)) if place.vm else plan, place, as_json)
        return
    errors = Console(stderr=True, highlight=False)
    if place.vm:
        document = _in_vm(options, plan.out, place, errors)
    else:
        document = _here(plan, errors)
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        _print_table(document, Console(highlight=False))
    errors.print(f"report: {plan.out / 'report.html'}", soft_wrap=True)
    click.echo(closing_line(document), err=as_json)
    if any(scenario["checked"]["mismatches"] for scenario in document["scenarios"]):
        sys.exit(1)


def _here(plan: Plan, errors: Console) -> dict[str, Any]:
    check_host()
    errors.print(_announcement(plan), soft_wrap=True)
    with running(plan.estimate_s, errors) as events:
        run = Run(plan, _command(), events)
        try:
            return run.execute().to_json()
        except BaseException:
            _say_what_is_left(run, plan, errors)
            raise


def _in_guest(options: Options) -> None:
    from kflex_repro.bench import guest

    check_host()
    plan = make_plan(replace(options, out=guest.out_directory()))
    guest.say(**plan.to_json())
    events = Events(
        lambda seconds, text: guest.say(done_s=seconds, text=text),
        lambda result: guest.say(line=finished_line(result)),
    )
    run = Run(plan, _command(), events, report=False)
    run.execute()
    if run.mismatches:
        sys.exit(1)


def _in_vm(options: Options, out: Path, place: Place, errors: Console) -> dict[str, Any]:
    from kflex_repro.bench import guest

    noted: set[str] = set()

    def note(line: str) -> None:
        # Preparing boots a guest, too, and finds the same.
        if line not in noted:
            noted.add(line)
            errors.print(escape(f"  {line}"), soft_wrap=True)

    errors.print(escape(f"{place.why}: running in a VM; results in {out}"), soft_wrap=True)
    with progress_bar(errors) as bar:
        task = bar.add_task("looking for a kernel", total=1.0, left="")
        clock: Clock | None = None

        def event(said: Mapping[str, Any]) -> None:
            nonlocal clock
            if "estimate_s" in said:
                clock = Clock(said["estimate_s"])
                kind = ", emulated: to see that it works, not how fast" if said["emulated"] else ""
                text = planned(len(said["scenarios"]), said["pairs"], said["runs"], clock.left_s)
                errors.print(text + kind, soft_wrap=True)
            if "line" in said:
                errors.print(said["line"], soft_wrap=True)
            if "text" in said:
                bar.update(task, description=escape(said["text"]))
            if "done_s" in said and clock is not None:
                clock.advance(said["done_s"])
                bar.update(task, completed=clock.share, left=f"{duration(clock.left_s)} left")

        return guest.Guest(options, out, _command(), event, note).execute()


@group.command("report")
@click.argument("directory", type=click.Path(path_type=Path))
def report(directory: Path) -> None:
    """Draw report.html and the PNGs of DIRECTORY/result.json again (of `bench redis` or `bench probe`)."""
    from kflex_repro.bench import probe_report, probe_run
    from kflex_repro.bench.report import write_report

    path = directory / "result.json"
    if probe_run.is_probe_result(path):
        written = probe_report.write_report(probe_run.read_document(path), directory)
    else:
        written = write_report(read_result(path), directory)
    for path in written:
        click.echo(str(path))


@group.command("probe")
@click.option("--quick", is_flag=True, help="GET and SET, 3 short pairs, without bpftrace: about a minute.")
@click.option(
    "--op", "ops", metavar="NAME", multiple=True, help="set, update, get, delete (repeatable) [all]."
)
@click.option(
    "--arm",
    "arms",
    metavar="NAME",
    multiple=True,
    help="histogram, events, sampled, old, bpftrace (repeatable) [all].",
)
@click.option("--pairs", type=click.IntRange(1, 1000), help="Interleaved pairs of each [5; --quick: 3].")
@click.option("--seconds", type=click.FloatRange(0.2, 600), help="Seconds per run [1.1; --quick: 0.5].")
@click.option("--out", type=click.Path(path_type=Path), help="Results directory [results/<UTC time>-probe].")
@click.option(
    "--json", "as_json", is_flag=True, help="Print result.json to stdout (everything else to stderr)."
)
@click.option("--dry-run", is_flag=True, help="Say what would be run and how long it takes, and end.")
def probe(
    quick: bool,
    ops: tuple[str, ...],
    arms: tuple[str, ...],
    pairs: int | None,
    seconds: float | None,
    out: Path | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """What probes cost: throughput and latency of a redis-server without a probe and with each.

    Ours (histograms; every event; events of one request in 100), a monitor of the old design (tracepoints on
    read and write, payload copied, a perf event each), and bpftrace where it is installed. Starts a server of
    its own; nothing stays attached, also after Ctrl-C, which keeps the completed pairs.

    Writes result.json, report.html and PNGs, and judges our modes by the goals of bench/probe.toml. A missed
    goal is a finding, not a failure.

    Exit codes: 0 measured, 1 a failure, 2 usage, 3 this machine cannot, 130 Ctrl-C.
    """
    from kflex_repro.bench import probe_report, probe_run

    plan = probe_run.make_plan(probe_run.Options(quick, ops, arms, pairs, seconds, out))
    text = (
        f"{', '.join(op.name for op in plan.study.ops)}; {', '.join(plan.arms)}; "
        f"{many(plan.pairs, 'pair')}: {plan.runs} runs, about {duration(plan.estimate_s)}; results in "
        f"{plan.out}"
    )
    if dry_run:
        click.echo(json.dumps(plan.to_json(), indent=1) if as_json else text)
        return
    probe_run.check_host()
    errors = Console(stderr=True, highlight=False)
    errors.print(text, soft_wrap=True)
    with running(plan.estimate_s, errors) as events:
        run = probe_run.Run(plan, _command(), events.step)
        try:
            document = run.execute()
        except BaseException:
            if any(one.rounds for one in run.results):
                errors.print(f"what was completed: {plan.out / 'result.json'} (interrupted)", soft_wrap=True)
            raise
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        _print_probes(document, Console(highlight=False))
    if line := probe_report.doubt(document):
        errors.print(f"note: {line}", soft_wrap=True)
    errors.print(f"report: {plan.out / 'report.html'}", soft_wrap=True)
    click.echo(probe_report.verdict(document), err=as_json)


def _print_probes(document: Mapping[str, Any], console: Console) -> None:
    from kflex_repro.bench import probe_report

    if not console.is_terminal:
        console.width = 160
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(probe_report.HEADINGS):
        table.add_column(heading, justify="left" if index < 3 else "right", no_wrap=True)
    for row in probe_report.rows(document):
        table.add_row(*row)
    _print_mark(document, console)
    console.print(table)
    for goal in document["goals"]:
        what, bound, measured, met = probe_report.goal_parts(goal)
        mark = {True: "met", False: "missed", None: "not measured"}[met]
        console.print(f"{what} {bound}: {measured}: {mark}", soft_wrap=True)
    console.print()


def _command() -> str:
    return shlex.join(["kflex-repro", *sys.argv[1:]])


def _announcement(plan: Plan) -> str:
    where = f" on {plan.attach[0]}:{plan.attach[1]}" if plan.attach else " on servers of our own"
    text = planned(len(plan.scenarios), plan.pairs, plan.runs, plan.estimate_s, where)
    text += f"; results in {plan.out}"
    if plan.attach:
        text += "\nonly keys that begin with kflex:bench: are written; they are deleted afterwards"
    return text


def _say_what_is_left(run: Run, plan: Plan, console: Console) -> None:
    done = len(run.result().scenarios)
    if done:
        text = f"{done} of {len(plan.scenarios)} scenarios were completed, at least in part"
        console.print(f"{text}: {plan.out / 'result.json'} (interrupted)", soft_wrap=True)
    if run.mismatches:
        console.print(f"[bold red]WRONG ANSWERS: {run.mismatches}[/]")


def _print_table(document: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("scenario", overflow="fold")
    for heading in headings(document):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows(document):
        style = "bold red" if row.wrong else None
        table.add_row(row.name, *row.cells, style=style)
    if not console.is_terminal:
        console.width = 160
    _print_mark(document, console)
    if emulated(document):
        console.print("requests answered, and of the offload's the share answered in the kernel:")
    console.print(table)
    _print_inside(document, console)
    missed = missed_targets(document)
    if missed:
        console.print("\nexpected on the reference machine, not reached here:", style="dim")
        for line in missed:
            console.print(f"  {line}", style="dim", soft_wrap=True)
    for note in document["notes"]:
        console.print(f"note: {note}", style="dim", soft_wrap=True)
    console.print()


def _print_mark(document: Mapping[str, Any], console: Console) -> None:
    if text := mark(document):
        console.print(text, style="bold yellow" if emulated(document) else "bold", soft_wrap=True)


def _print_inside(document: Mapping[str, Any], console: Console) -> None:
    from kflex_repro.bench import inside, plot

    found = inside.rows(document, plot.ARM_NAMES)
    if not found:
        return
    table = Table(
        box=None, header_style="bold", pad_edge=False, title="\ninside the server, µs", title_justify="left"
    )
    for index, heading in enumerate(("scenario", "", *inside.HEADINGS)):
        table.add_column(heading, justify="left" if index < 3 else "right", no_wrap=True)
    for row in found:
        table.add_row(*row)
    console.print(table)


def _print_list(scenarios: tuple[Scenario, ...], as_json: bool) -> None:
    if as_json:
        listed = [
            {"name": s.name, "about": s.about, "driver": s.driver, "arms": s.arms, "quick": s.quick,
             "path": s.path, "mode": s.mode, "targets": dict(s.targets)}
            for s in scenarios
        ]  # fmt: skip
        click.echo(json.dumps(listed, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "what", "load generator", "compared with", "expected", ""):
        table.add_column(column, overflow="fold")
    for s in scenarios:
        expected = ", ".join(f"{metric} {bound:g}" for metric, bound in s.targets.items())
        marks = ("quick " if s.quick else "") + ("--netns" if s.path == "remote" else "")
        against = ", ".join(("TCP", *s.peers))
        table.add_row(s.name, s.about, s.driver, against, expected, marks)
    console.print(table)
    whole = duration(estimate(scenarios, 5, 3.0))
    console.print(f"\n{len(scenarios)} scenarios; all of them (with --netns) take about {whole}")


def _print_plan(plan: Plan, place: Place, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**plan.to_json(), "vm": place.vm}, indent=1))
        return
    if place.vm:
        click.echo(f"{place.why}: would boot a VM and run there (without KVM; with it, what a host runs)")
    click.echo(_announcement(plan))
    for scenario in plan.scenarios:
        click.echo(f"  {scenario.name}: {scenario.about} ({', '.join(scenario.arms)})")
    if plan.attach is None:
        click.echo(
            "would start two redis-servers on free ports, attach the offload to one, and stop both again"
        )
    if any(scenario.path == "remote" for scenario in plan.scenarios):
        click.echo("would create two network namespaces joined by a veth pair, and remove them again")
    if not plan.scenarios:
        raise KflexError("nothing to run", exit_code=2)
