"""``kflex-repro doctor``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.status import Status
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


def _instead(lacking: Sequence[host.Fact]) -> str:
    """What runs the default job nevertheless; "" where a VM would lack the same."""
    if not all(fact.of_kernel for fact in lacking):
        return ""
    qemu, kvm = host.fact("qemu"), host.fact("kvm")
    if qemu.state != "ok":
        return f"make bench would run it in a VM, if QEMU were there: {qemu.fix}."
    slow = "" if kvm.state == "ok" else "; emulated, which shows that it works, not how fast"
    return f"make bench runs it in a VM instead{slow}. kflex-repro doctor --vm shows what that can do."


def _beside_a_guest(as_json: bool) -> None:
    from kflex_repro import guest_facts

    errors = Console(stderr=True, highlight=False)
    with errors.status("looking at this host") if errors.is_terminal else contextlib.nullcontext() as status:

        def say(text: str) -> None:
            if isinstance(status, Status):
                status.update(Text(text))

        def note(line: str) -> None:
            errors.print(Text(line), soft_wrap=True)

        ours = host.as_json()
        theirs = guest_facts.ask(say, note)
    if as_json:
        click.echo(json.dumps({"host": ours, "guest": theirs}, indent=2))
    else:
        _print_beside(ours, theirs)
    sys.exit(0 if theirs["ok"] else 1)


def _print_beside(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    vm = theirs["vm"]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("what", "", "this host", "", "the VM"):
        table.add_column(column, overflow="fold")
    guest = {fact["key"]: fact for fact in theirs["facts"]}
    for fact in ours["facts"]:
        cells = [Text(fact["title"])]
        for one in (fact, guest[fact["key"]]):
            cells += [Text(one["state"], _STYLE[one["state"]]), Text(one["value"])]
        table.add_row(*cells)
    how = {"kvm": "under KVM", "tcg": "emulated (TCG)"}[vm["accel"]]
    console.print(f"The VM: Linux {vm['kernel']}, {how}, up after {vm['boot_s']:.0f} s.\n")
    console.print(table)
    for where, report in (("on this host", ours), ("in the VM", theirs)):
        if report["ok"]:
            console.print(Text(f"\nThe default job can run {where}.", "green"))
        else:
            titles = {fact["key"]: fact["title"] for fact in report["facts"]}
            names = ", ".join(titles[key] for key in report["missing"])
            console.print(Text(f"\nThe default job cannot run {where}; missing: {names}.", "bold red"))
    if theirs["ok"]:
        command = "make bench" if not ours["ok"] else "kflex-repro bench redis --vm"
        console.print(f"{command} runs it there.")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option(
    "--hello",
    "say_hello",
    is_flag=True,
    help="Instead: load the smallest real BPF program and count read() calls for two seconds.",
)
@click.option(
    "--vm",
    "with_vm",
    is_flag=True,
    help="Boot a VM with the distribution's stock kernel, and show what it can do beside this host.",
)
def doctor(as_json: bool, say_hello: bool, with_vm: bool) -> None:
    """What this machine can do: one row for each fact the toolkit depends on.

    Exit code 0 only if the default job (the offload and its benchmark) can run here; with --vm, if it can in
    the VM.

    --hello is the first thing to try on a new machine: it compiles, loads and attaches a program, shows what
    it counted, and leaves nothing.
    """
    if say_hello and with_vm:
        raise click.UsageError("--hello and --vm do not go together")
    if say_hello:
        _hello(as_json)
        return
    if with_vm:
        _beside_a_guest(as_json)
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
        if line := _instead(lacking):
            console.print(Text(line), soft_wrap=True)
        sys.exit(1)
    console.print(Text("\nThe default job can run: sudo make bench.", "green"))
