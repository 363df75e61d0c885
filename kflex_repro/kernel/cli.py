"""`kflex-repro kernel`: list, install, remove, boot once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kflex_repro.errors import KflexError

if TYPE_CHECKING:
    from kflex_repro.kernel.place import Root
    from kflex_repro.kernel.plan import Plan

_root = click.option(
    "--root",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    metavar="DIR",
    help="Work on the system below DIR (its programs are run in a chroot), not on this one.",
)
_json = click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
_dry_run = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, file by file; change nothing."
)


@click.group("kernel")
def group() -> None:
    """Kernels of one's own beside the distribution's: install, boot once, remove.

    On Debian, Ubuntu, Fedora and openEuler layouts, with grub or boot loader entries; /boot may be vfat (no
    links, owners or modes are made there). What belongs to a package is never replaced or removed.
    """


def _open(directory: Path) -> Root:
    from kflex_repro.kernel.place import open_root

    return open_root(directory)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


@group.command("list")
@_root
@_json
def list_command(directory: Path, as_json: bool) -> None:
    """The kernels there are: whose, how large, which one runs, which is booted by default and next."""
    from kflex_repro.diagnose.events import size_text
    from kflex_repro.kernel import inventory
    from kflex_repro.kernel.record import INSTALLED, Store

    root = _open(directory)
    found = inventory.kernels(root)
    if as_json:
        _print_json([asdict(item) for item in found])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("release", "of", "image", "initramfs", "modules", "boot"):
        table.add_column(name, no_wrap=True)
    for item in found:
        marks = [
            name
            for name, is_so in (
                ("running", item.running),
                ("default", item.default),
                ("next", item.next and not item.default),
                ("no image", not item.image),
                ("not in the menu", bool(item.image) and not item.in_menu),
                ("interrupted", item.state not in ("", INSTALLED)),
            )
            if is_so
        ]
        sizes = (
            size_text(size) if size else "–"
            for size in (item.image_size, item.initrd_size, item.modules_size)
        )
        table.add_row(item.release, item.origin or "unknown", *sizes, ", ".join(marks))
    if not found:
        click.echo(f"no kernels in {root.path}")
        return
    # A release that is cut off is none: lines may be longer than the terminal's.
    width = max(Console().width, Console(width=1000).measure(table).maximum)
    Console(width=width).print(table)
    for record in Store(root).all():
        for line in record.left if record.state == INSTALLED else ():
            click.echo(f"{record.release}: was left to be run: {line}")


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "release": plan.release,
        "arch": plan.source.image.arch,
        "layout": plan.layout.name,
        "files": [{"from": str(c.source), "to": c.target, "bytes": c.size} for c in plan.copies],
        "modules": {"to": plan.modules, "bytes": plan.modules_size} if plan.modules else None,
        "entry": plan.entry[0] if plan.entry else None,
        "commands": [list(command) for command in (plan.initramfs, plan.menu) if command],
        "space": [{**asdict(item), "parts": dict(item.parts)} for item in plan.space],
        "left": list(plan.left),
        "notes": list(plan.notes),
    }


def _show_plan(plan: Plan) -> None:
    from kflex_repro.diagnose.events import size_text

    click.echo(f"would install {plan.release} ({plan.source.image.arch}, {plan.layout.name} layout)")
    if plan.modules:
        click.echo(f"would create  {plan.modules}/  ({size_text(plan.modules_size)} at most)")
    for copy in plan.copies:
        click.echo(f"would create  {copy.target}  ({size_text(copy.size)}, from {copy.source})")
    for command in (plan.initramfs, plan.menu):
        if command:
            click.echo(f"would run     {plan.root.shown(command)}")
    if plan.entry:
        click.echo(f"would create  {plan.entry[0]}  ({len(plan.entry[1].encode())} bytes)")
    for item in plan.space:
        click.echo(f"{item.place}: {size_text(item.needed)} needed, {size_text(item.free)} free")


@group.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option(
    "--modules",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where SRC is an image: its modules (…/lib/modules/RELEASE, or what holds it).",
)
@click.option("--defer", is_flag=True, help="Run no program of the system; print what is to be run.")
@_root
@_dry_run
@_json
def install(
    source: Path, modules: Path | None, defer: bool, directory: Path, dry_run: bool, as_json: bool
) -> None:
    """Install the kernel SRC beside the others: modules, image, configuration, initramfs, boot entry.

    SRC is a built kernel tree, what `build --kernel` made, an unpacked package, or an image (with --modules).
    All of it is installed, or nothing; `kernel remove` takes exactly that away again.
    """
    from kflex_repro.kernel import install as work
    from kflex_repro.kernel import plan as planning
    from kflex_repro.kernel import source as sources

    root = _open(directory)
    plan = planning.make(root, sources.find(source, modules), defer)
    planning.require_space(plan.space)
    if not dry_run:
        work.install(plan, _say)
    if as_json:
        _print_json({"dry_run": dry_run, **_plan_facts(plan)})
        return
    if dry_run:
        _show_plan(plan)
    for line in plan.notes:
        click.echo(f"note: {line}")
    for line in plan.left:
        click.echo(f"left to be done: {line}")
    if not dry_run:
        from kflex_repro.kernel import inventory

        if any(item.default and item.release == plan.release for item in inventory.kernels(root)):
            click.echo("note: it is the default now (GRUB_DEFAULT in /etc/default/grub chooses)")
        once = f"kflex-repro kernel boot-once {plan.release}"
        at = "" if root.is_host else f" --root {directory}"
        click.echo(f"{plan.release} is installed; to boot it once: {once}{at}")


@group.command()
@click.argument("release", metavar="RELEASE")
@click.option("--force", is_flag=True, help="Also if a file is not what was installed any more.")
@_root
@_dry_run
@_json
def remove(release: str, force: bool, directory: Path, dry_run: bool, as_json: bool) -> None:
    """Take away a kernel that `kernel install` brought: exactly what its record says.

    Never the running kernel, the only one, or a package's.
    """
    from kflex_repro.kernel import install as work

    root = _open(directory)
    record = work.removal(root, release, force)
    left = () if dry_run else work.remove(root, release, force, _say)
    there = [made.path for made in record.made if not dry_run or root.exists(made.path)]
    if as_json:
        _print_json({"dry_run": dry_run, "release": release, "files": there, "left": list(left)})
        return
    if dry_run:
        for path in there:
            click.echo(f"would remove  {path}")
        if record.config:
            click.echo(f"would make anew  {record.config}")
    for line in left:
        click.echo(f"left to be done: {line}")
    if not dry_run:
        click.echo(f"{release} is removed")


@group.command("boot-once")
@click.argument("release", metavar="[RELEASE]", required=False)
@click.option("--clear", is_flag=True, help="Take the choice back.")
@_root
@_dry_run
@_json
def boot_once(release: str | None, clear: bool, directory: Path, dry_run: bool, as_json: bool) -> None:
    """Boot RELEASE the next time, and only then: the boot after it is of the default kernel again.

    For a kernel that may not come up: a reset brings the usual one back.
    """
    from kflex_repro.kernel import once

    root = _open(directory)
    if clear == (release is not None):
        raise KflexError("one of RELEASE and --clear", "", "`kflex-repro kernel list` shows the releases")
    if release is None:
        was = False if dry_run else once.clear(root)
        _print_json({"dry_run": dry_run, "cleared": was}) if as_json else click.echo(
            "would take the choice back"
            if dry_run
            else "the choice is taken back"
            if was
            else "nothing was chosen"
        )
        return
    choice = once.choose(root, release)
    how = (
        root.shown(choice.command)
        if choice.command
        else f"next_entry={choice.selector} in {root.real(choice.environment)}"
    )
    if not dry_run:
        once.set_next(root, choice)
    if as_json:
        _print_json({"dry_run": dry_run, "release": release, "selector": choice.selector, "how": how})
    elif dry_run:
        click.echo(f"would set {how}")
    else:
        click.echo(f"the next boot is {release}, the one after that the default ({how})")
