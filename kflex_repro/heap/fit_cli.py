"""``kflex-repro fit-heap``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from kflex_repro.heap import declarations, fit, model, verify
from kflex_repro.heap.layout import layout
from kflex_repro.patching.tree import Tree

_SCHEMA = 1


@click.command("fit-heap")
@click.option("--gb", metavar="N", help="Size of every heap, in GB (2^30 bytes): a power of two.")
@click.option("--auto", is_flag=True, help="The largest size that this machine's free RAM holds.")
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The KFlex source tree.",
)
@click.option("--dry-run", is_flag=True, help="Show the diff, write nothing.")
@click.option("--revert", is_flag=True, help="Put back what was there before the first fit, byte for byte.")
@click.option(
    "--keep-capacities",
    is_flag=True,
    help="Leave the capacities in the user-space sources; refuse a size that does not hold them.",
)
@click.option(
    "--verify", "check", is_flag=True, help="Check compiled OBJECTS against --source, or against --gb."
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
@click.argument("objects", nargs=-1, type=click.Path(path_type=Path))
def fit_heap(
    gb: str | None,
    auto: bool,
    source: Path | None,
    dry_run: bool,
    revert: bool,
    keep_capacities: bool,
    check: bool,
    as_json: bool,
    objects: tuple[Path, ...],
) -> None:
    """Fit the heaps of a KFlex source tree, and the capacities that fill them, to a size.

    \b
    kflex-repro fit-heap --source KFlex --gb 4 --dry-run    # what would change
    kflex-repro fit-heap --source KFlex --gb 4              # change it; originals are kept
    kflex-repro fit-heap --source KFlex --revert            # byte for byte as before
    kflex-repro fit-heap --source KFlex --verify KFlex/bpf/*.o

    A heap's RAM is taken when its map is made, and all the program's capacity when it starts: a size that
    does not fit is refused, with the nearest that does. Every real declaration is found (by libclang, not by
    text) and rewritten at its use; nothing else changes. Run again with another --gb, it starts from the
    original.
    """
    modes = [
        name for name, given in (("--gb", gb is not None), ("--auto", auto), ("--revert", revert)) if given
    ]
    if objects and not check:
        raise click.UsageError("objects are for --verify")
    if check:
        if auto or revert or dry_run or keep_capacities:
            raise click.UsageError("--verify goes with --gb and --source only")
        _verify(objects, source, gb, as_json)
        return
    if len(modes) != 1:
        raise click.UsageError(
            f"say one of --gb, --auto and --revert{', not ' + ' and '.join(modes) if modes else ''}"
        )
    wanted = model.parse_gb(gb) if gb is not None else None
    if source is None:
        raise click.UsageError("say which tree: --source DIR")
    tree = Tree.open(source)
    if revert:
        _revert(tree, dry_run, as_json)
        return
    with _working("reading the tree"):
        machine, earlier = model.machine(), fit.before(tree)
        if wanted is None:
            made = fit.largest(tree.root, layout(), machine, keep_capacities=keep_capacities, changed=earlier)
        else:
            made = fit.plan(
                tree.root, layout(), wanted, machine, keep_capacities=keep_capacities, changed=earlier
            )
        outcome = fit.preview(tree, made)
        warnings = [*(tree.warnings() if outcome.diff else []), *fit.warnings(tree, made, machine)]
    if not dry_run:
        outcome = fit.apply(tree, made, layout().version)
    if as_json:
        click.echo(json.dumps(_as_json(tree, outcome, warnings, dry_run), indent=2))
        return
    _show(outcome, warnings)
    if not outcome.diff:
        click.echo(f"nothing to change: the heaps are {made.gb} GB already")
    elif dry_run:
        click.echo("nothing written (--dry-run)")
    else:
        click.echo(f"{outcome.files} files changed; undo: kflex-repro fit-heap --revert --source {source}")


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield


def _show(outcome: fit.Outcome, warnings: list[str]) -> None:
    rows = []
    for change in outcome.plan.changes:
        unit = "GB" if change.kind == "heap" else "objects"
        was = f"{change.before:,}" if change.before is not None else f"`{change.was}`"
        rows.append(
            (change.name, f"{change.path}:{change.line}", f"{was} -> {change.after:,} {unit}", change.notes)
        )
    for name, where, numbers, notes in rows:
        wide = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
        click.echo(f"{name:<{wide[0]}}  {where:<{wide[1]}}  {'; '.join((numbers, *notes))}")
    if any(change.kind == "capacity" for change in outcome.plan.changes):
        setting = " ".join(f"{name}={value}" for name, value in model.ENVIRONMENT.items())
        click.echo(f"start the program with {setting} in its environment (`run --artifact` does)")
    for mention in outcome.plan.left_alone:
        click.echo(f"left alone: {mention.path}:{mention.line}, {mention.why}")
    if outcome.diff:
        # Bytes that are no UTF-8 go out as they are.
        click.echo(b"\n" + outcome.diff.encode("utf-8", "surrogateescape"))
    for line in warnings:
        click.echo(f"warning: {line}", err=True)


def _revert(tree: Tree, dry_run: bool, as_json: bool) -> None:
    fitted = tree.get(fit.RECIPE) is not None
    diff = tree.diff_revert(fit.RECIPE) if fitted else ""
    if fitted and not dry_run:
        tree.revert(fit.RECIPE)
    if as_json:
        report = {
            "schema": _SCHEMA,
            "source": str(tree.root),
            "reverted": fitted and not dry_run,
            "diff": _text(diff),
        }
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(diff.encode("utf-8", "surrogateescape"), nl=False)
    if not fitted:
        click.echo("nothing to revert: this tree was not fitted")
    else:
        click.echo(
            "nothing written (--dry-run)" if dry_run else "reverted: the tree is as it was before the fit"
        )


def _verify(objects: tuple[Path, ...], source: Path | None, gb: str | None, as_json: bool) -> None:
    if not objects:
        raise click.UsageError("say which objects: --verify DIR/*.bpf.o")
    declared = None
    if source is not None:
        declared = verify.expected(declarations.find(Tree.open(source).root, layout().heaps))
    heaps = verify.verify(objects, declared, model.parse_gb(gb) if gb is not None else None)
    if as_json:
        click.echo(json.dumps({"schema": _SCHEMA, "heaps": [asdict(heap) for heap in heaps]}, indent=2))
        return
    for heap in heaps:
        click.echo(f"{heap.path}: {heap.name}, {heap.gb:g} GB, {heap.pages:,} pages")


def _text(diff: str) -> str:
    return diff.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _as_json(tree: Tree, outcome: fit.Outcome, warnings: list[str], dry_run: bool) -> dict[str, object]:
    changes = [
        {key: value for key, value in asdict(change).items() if key not in ("start", "end")}
        for change in outcome.plan.changes
    ]
    return {
        "schema": _SCHEMA,
        "source": str(tree.root),
        "gb": outcome.plan.gb,
        "changed": bool(outcome.diff) and not dry_run,
        "dry_run": dry_run,
        "heaps": [change for change in changes if change["kind"] == "heap"],
        "capacities": [change for change in changes if change["kind"] == "capacity"],
        "environment": model.ENVIRONMENT,
        "left_alone": [asdict(mention) for mention in outcome.plan.left_alone],
        "warnings": warnings,
        "diff": _text(outcome.diff),
    }
