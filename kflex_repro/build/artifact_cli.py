"""``kflex-repro build --artifact``: what it prints."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from kflex_repro.build import artifact, artifact_record, artifact_source, dependencies, toolchain
from kflex_repro.build.artifact import TITLES, Artifact, Report
from kflex_repro.build.artifact_recipes import Choice, choose, verify_heaps
from kflex_repro.errors import KflexError
from kflex_repro.heap.verify import CompiledHeap
from kflex_repro.run import needs
from kflex_repro.run.needs import Check


@dataclass(frozen=True)
class Wish:
    """What the user asked for."""

    source: Path | None
    recipes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    heap_gb: str | None = None
    whole: bool = True
    force: bool = False
    jobs: int | None = None
    dry_run: bool = False
    as_json: bool = False


@dataclass(frozen=True)
class Outcome:
    """Everything there is to say."""

    source: artifact_source.Source
    found: tuple[dependencies.Found, ...]
    choice: Choice
    made: Artifact | None
    heaps: tuple[CompiledHeap, ...]
    checks: tuple[Check, ...]
    seconds: float


def make(wish: Wish, report: Report) -> Outcome:
    """Check, choose, build (or plan), verify, and look at what the running kernel lacks."""
    started = time.monotonic()
    source = artifact_source.find(wish.source)
    found = dependencies.look(source, wish.whole)
    if not wish.dry_run:
        _demand(source, found)
    ready = not any(part.required for part in source.lacking) and not any(one.missing for one in found)
    choice = choose(source, wish.recipes, wish.without, wish.heap_gb)
    made: Artifact | None = None
    heaps: tuple[CompiledHeap, ...] = ()
    if ready:
        tools = dependencies.tools(source)
        if wish.dry_run:
            made = artifact.plan(source, tools, choice.changes, wish.whole)
        else:
            made = _build(source, tools, choice, wish, report)
            heaps = verify_heaps(made, choice)
            artifact_record.keep(made, choice.recipes)
    objects = made.objects if made and made.complete else ()
    checks = (*needs.of_kernel(objects), *needs.heaps(objects))
    return Outcome(source, found, choice, made, heaps, checks, time.monotonic() - started)


def show(outcome: Outcome, wish: Wish) -> None:
    """Print it; then, of a plan that could not be carried out, the reason as an error."""
    if wish.as_json:
        click.echo(json.dumps(_as_json(outcome), indent=2))
    else:
        _print(outcome, wish.dry_run)
    _demand(outcome.source, outcome.found)


def _demand(source: artifact_source.Source, found: tuple[dependencies.Found, ...]) -> None:
    lacking = next((part for part in source.lacking if part.required), None)
    if lacking:
        raise KflexError(f"the tree has no {lacking.path} ({lacking.purpose})", str(source.root), lacking.fix)
    dependencies.demand(found)


def _build(
    source: artifact_source.Source, tools: dependencies.Tools, choice: Choice, wish: Wish, report: Report
) -> Artifact:
    runner = toolchain.Runner()
    try:
        return artifact.build(
            source,
            tools,
            runner,
            choice.changes,
            whole=wish.whole,
            jobs=wish.jobs,
            force=wish.force,
            report=report,
        )
    except BaseException:
        runner.stop()
        raise


def _print(outcome: Outcome, dry_run: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"tree      {outcome.source.root}")
    for part in outcome.source.lacking:
        console.print(f"  not there: {part.path} ({part.purpose}); {part.fix}")
    for line in outcome.choice.warnings:
        console.print(f"  {line}")
    if dry_run:
        for one in outcome.found:
            console.print(
                f"needs     {one.name}: {one.value or 'missing'}{f' ({one.note})' if one.note else ''}"
            )
    else:
        for one in outcome.found:
            if one.note:
                console.print(f"needs     {one.name}: {one.note}")
    for recipe in outcome.choice.taken:
        console.print(f"recipe    {recipe.id}: {recipe.why}")
    for recipe in outcome.choice.left:
        console.print(f"not taken {recipe.id}: {recipe.why}")
    if outcome.made:
        for step in outcome.made.steps:
            log = f", log {step.log}" if step.log else ""
            console.print(
                f"step      {step.name}: {TITLES[step.name]}; {step.state} ({step.seconds:.1f} s{log})"
            )
    for heap in outcome.heaps:
        console.print(f"heap      {Path(heap.path).name} {heap.name}: {heap.gb:g} GB, {heap.pages:,} pages")
    _print_checks(console, outcome.checks)
    if outcome.made and not dry_run:
        console.print(f"program   {outcome.made.program}")
        console.print("run it:   kflex-repro run --artifact --mode kmemcached   (--dry-run: what it serves)")


def _print_checks(console: Console, checks: tuple[Check, ...]) -> None:
    console.print("to run    it, this machine needs:")
    for check in checks:
        console.print(
            Text(f"  {check.state:<8}{check.name}: {check.value}", "" if check.state == "ok" else "yellow")
        )
    for fix in dict.fromkeys(check.fix for check in checks if check.fix):
        console.print(f"  to do   {fix}")


def _as_json(outcome: Outcome) -> dict[str, object]:
    made = outcome.made
    return {
        "schema": 1,
        "source": str(outcome.source.root),
        "lacking": [asdict(part) for part in outcome.source.lacking],
        "dependencies": [{**asdict(one), "missing": one.missing} for one in outcome.found],
        "apt": dependencies.apt_command(outcome.found),
        "recipes": {
            "taken": [asdict(recipe) for recipe in outcome.choice.taken],
            "left": [asdict(recipe) for recipe in outcome.choice.left],
            "warnings": list(outcome.choice.warnings),
        },
        "steps": [
            {
                "name": step.name,
                "title": TITLES[step.name],
                "state": step.state,
                "path": str(step.path),
                "seconds": round(step.seconds, 3),
                "log": str(step.log) if step.log else None,
            }
            for step in (made.steps if made else ())
        ],
        "program": str(made.program) if made and made.complete else None,
        "heaps": [{**asdict(heap), "gb": heap.gb} for heap in outcome.heaps],
        "checks": [asdict(check) for check in outcome.checks],
        "seconds": round(outcome.seconds, 3),
    }
