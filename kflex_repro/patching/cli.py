"""``kflex-repro patch``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kflex_repro.errors import KflexError
from kflex_repro.patching import apply as engine
from kflex_repro.patching import recipe as recipes
from kflex_repro.patching.recipe import Recipe
from kflex_repro.patching.tree import Tree

_SCHEMA = 1
_STYLE = {
    "applied": "green",
    "present": "green",
    "applicable": "",
    "outdated": "yellow",
    "edited": "yellow",
    "not applicable": "dim",
}

_source = click.option(
    "--source", type=click.Path(path_type=Path), metavar="DIR", required=True, help="The source tree."
)
_dry_run = click.option("--dry-run", is_flag=True, help="Show the diff, write nothing.")
_json = click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")


@click.group("patch")
def group() -> None:
    """Recipes that make a KFlex source tree run here: see, apply, take back.

    \b
    kflex-repro patch list                                          # the recipes, and what they are for
    kflex-repro patch status --source KFlex                         # which apply to a tree, which are in it
    kflex-repro patch apply address-search --source KFlex --dry-run # the diff
    kflex-repro patch apply address-search --source KFlex           # the change
    kflex-repro patch revert address-search --source KFlex          # byte for byte as before

    A recipe finds its places by libclang. Where one is missing, or there more often than it should be, the
    recipe says which and changes nothing. Several files change together or not at all, also if the machine
    stops in between. What a tree was before is kept in its .kflex-repro/ directory.
    """


@group.command("list")
@_json
def list_(as_json: bool) -> None:
    """The recipes there are."""
    found = [recipes.load(name) for name in recipes.names()]
    if as_json:
        click.echo(
            json.dumps({"schema": _SCHEMA, "recipes": [_as_json(recipe) for recipe in found]}, indent=2)
        )
        return
    _table(("recipe", "what it does", "for"), [(r.id, r.title, r.target) for r in found])


@group.command()
@click.argument("recipe")
@_json
def show(recipe: str, as_json: bool) -> None:
    """One recipe: why, and what it changes where."""
    found = recipes.load(recipe)
    if as_json:
        click.echo(json.dumps({"schema": _SCHEMA, **_as_json(found)}, indent=2))
        return
    click.echo(
        f"{found.id} (version {found.version}): {found.title}\nfor {found.target}\n\n{found.why.strip()}\n"
    )
    for name, parameter in found.parameters.items():
        click.echo(f"parameter {name} ({parameter.type}, default {parameter.default}): {parameter.help}")
    for number, step in enumerate(found.steps, 1):
        click.echo(f"{number}. {step.file}: {engine.label(step)}")
    if found.command:
        click.echo(f"applied by kflex-repro {found.command}")


@group.command()
@click.argument("recipe", nargs=-1, required=True)
@_source
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the recipe.")
@_dry_run
@_json
def apply(
    recipe: tuple[str, ...], source: Path, settings: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Apply recipes to a tree, each with all its files or none; what is applied already stays as it is."""
    given = _settings(settings)
    found = [recipes.load(name) for name in dict.fromkeys(recipe)]
    if given and len(found) > 1:
        raise click.UsageError("--set goes with one recipe")
    tree = Tree.open(source)
    warnings = tree.warnings()
    # All of them are planned before the first is made: an anchor that is missing stops the lot.
    plans = []
    for item in found:
        with _working(f"{item.id}: looking for its places"):
            plans.append(engine.plan(item, tree, given))
    report: list[dict[str, object]] = []
    moved: set[str] = set()
    for item, made in zip(found, plans, strict=True):
        if not dry_run and moved.intersection(made.files):
            made = engine.plan(item, tree, given)
        moved.update(made.files)
        changed = bool(made.diff) if dry_run else engine.apply(made, tree)
        report.append(
            {
                "id": item.id,
                "version": item.version,
                "changed": changed and not dry_run,
                "files": list(made.files),
                "diff": _text(made.diff),
            }
        )
        if not as_json:
            click.echo(made.diff.encode("utf-8", "surrogateescape"), nl=False)
            _say(item.id, "applied" if changed else "nothing to change: applied already", dry_run and changed)
    _end(report, warnings if any(item["diff"] for item in report) else [], tree, dry_run, as_json)


@group.command()
@click.argument("recipe", nargs=-1)
@_source
@click.option("--all", "every", is_flag=True, help="All that are applied, the last one first.")
@click.option("--keep-edited", is_flag=True, help="Leave what was edited by hand since as it is.")
@_dry_run
@_json
def revert(
    recipe: tuple[str, ...], source: Path, every: bool, keep_edited: bool, dry_run: bool, as_json: bool
) -> None:
    """Take recipes out of a tree, byte for byte, in any order."""
    if bool(recipe) == every:
        raise click.UsageError("say which recipes, or --all")
    tree = Tree.open(source)
    applied = [item.name for item in tree.applied()]
    names = list(dict.fromkeys(recipe)) or applied[::-1]
    for name in names:
        if name not in applied:
            known = ", ".join(applied) or "nothing"
            raise KflexError(f"{name} is not applied", str(tree.root), f"applied: {known}")
    report = []
    for name in names:
        diff = tree.diff_revert(name, keep_edited)
        if not dry_run:
            tree.revert(name, keep_edited)
        report.append({"id": name, "changed": not dry_run, "diff": _text(diff)})
        if not as_json:
            click.echo(diff.encode("utf-8", "surrogateescape"), nl=False)
            _say(name, "reverted", dry_run)
    if not names and not as_json:
        click.echo("nothing is applied")
    _end(report, [], tree, dry_run, as_json)


@group.command()
@_source
@_json
def status(source: Path, as_json: bool) -> None:
    """Which recipes a tree has, which fit it, and which were edited since.

    Exit code 1 if one that is applied was edited by hand or no longer takes.
    """
    tree = Tree.open(source)
    found = []
    known = recipes.names()
    for name in known:
        with _working(f"looking at {name}"):
            found.append(engine.status(recipes.load(name), tree))
    for item in tree.applied():
        if item.name not in known:
            edited = tree.edited(item.name)
            state = "edited" if edited else "applied"
            detail = ", ".join(edited) or "this kflex-repro has no such recipe"
            found.append(engine.Status(item.name, "", state, detail, item.version, item.when, item.files))
    if as_json:
        rows = [item.as_json() for item in found]
        report = {"schema": _SCHEMA, "source": str(tree.root), "recipes": rows, "warnings": tree.warnings()}
        click.echo(json.dumps(report, indent=2))
    else:
        _table(
            ("state", "recipe", "what it does", "detail"),
            [
                (
                    Text(item.state, _STYLE[item.state]),
                    item.id,
                    item.title,
                    item.detail or ", ".join(item.files),
                )
                for item in found
            ],
        )
        _warn(tree.warnings())
    if any(item.state == "edited" for item in found):
        sys.exit(1)


def _as_json(recipe: Recipe) -> dict[str, object]:
    return {
        **{
            key: value for key, value in asdict(recipe).items() if key in ("id", "version", "title", "target")
        },
        "why": recipe.why.strip(),
        "command": recipe.command,
        "parameters": {name: asdict(parameter) for name, parameter in recipe.parameters.items()},
        "steps": [{"file": step.file, "what": engine.label(step)} for step in recipe.steps],
    }


def _settings(given: tuple[str, ...]) -> dict[str, object]:
    found: dict[str, object] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--set {item}: say NAME=VALUE")
        found[name] = value
    return found


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield


def _table(head: tuple[str, ...], rows: list[tuple[str | Text, ...]]) -> None:
    # Piped, a table is read by people's tools: no wrapping at the width of a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    console.print(table)


def _say(name: str, what: str, dry: bool) -> None:
    click.echo(f"{name}: nothing written (--dry-run)" if dry else f"{name}: {what}")


def _warn(lines: list[str]) -> None:
    for line in lines:
        click.echo(f"warning: {line}", err=True)


def _end(report: list[dict[str, object]], warnings: list[str], tree: Tree, dry: bool, as_json: bool) -> None:
    if as_json:
        shown = {"schema": _SCHEMA, "source": str(tree.root), "dry_run": dry, "recipes": report}
        click.echo(json.dumps({**shown, "warnings": warnings}, indent=2))
    else:
        _warn(warnings)


def _text(diff: str) -> str:
    return diff.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
