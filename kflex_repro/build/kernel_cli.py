"""``kflex-repro build --kernel``: what it does in turn, and what it prints."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bar

from kflex_repro.build import (
    artifact_source,
    dependencies,
    kernel_build,
    kernel_config,
    kernel_needs,
    kernel_source,
    toolchain,
)
from kflex_repro.build.kernel_build import Built, Plan, Progress


@dataclass(frozen=True)
class Wish:
    """What the user asked for."""

    source: Path | None = None
    artifact: bool = False
    fragments: tuple[str, ...] = ()
    host_config: bool = False
    arch: str | None = None
    jobs: int | None = None
    allow_dropped: bool = False
    force: bool = False
    dry_run: bool = False
    as_json: bool = False


class _Display:
    """Progress on stderr: a bar on a terminal, elsewhere a line for each tenth and each stage."""

    def __init__(self, console: Console, bar: Bar | None) -> None:
        self._console, self._bar, self._tenth = console, bar, 0
        self._task: TaskID | None = None

    def note(self, line: str) -> None:
        """A stage."""
        self._console.print(f"kernel: {line}", markup=False)

    def progress(self, progress: Progress) -> None:
        """Where the compiling is."""
        left = f"about {_span(progress.left)} left" if progress.left is not None else ""
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task("", total=progress.total, left="", line="")
            self._bar.update(
                self._task, completed=progress.done, total=progress.total, left=left, line=progress.line[:60]
            )
        elif (tenth := progress.done * 10 // max(progress.total, 1)) > self._tenth:
            self._tenth = tenth
            self.note(f"{progress.done} of about {progress.total} objects{f', {left}' if left else ''}")


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@contextlib.contextmanager
def _display() -> Iterator[_Display]:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Display(console, None)
        return
    columns = (SpinnerColumn(), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, TimeElapsedColumn(), TextColumn("{task.fields[line]}"), console=console) as bar:
        yield _Display(console, bar)


def run(wish: Wish, distro: bool) -> None:
    """The command. UsageError for options that do not go together."""
    if distro and (wish.source or wish.artifact):
        raise click.UsageError("--distro is the distribution's source: no --source, no --artifact")
    with _display() as display:
        outcome = make(wish, display.note, display.progress)
    show(outcome, wish)


@dataclass(frozen=True)
class Outcome:
    """Everything there is to say; ``built`` is None for a plan."""

    plan: Plan | None
    found: tuple[dependencies.Found, ...]
    built: Built | None
    seconds: float


def make(wish: Wish, note: Callable[[str], None], progress: Callable[[Progress], None]) -> Outcome:
    """Look at tools, tree and fragments, configure, check, and build (or plan). Ctrl-C ends the compilers."""
    started = time.monotonic()
    runner = toolchain.Runner()
    try:
        arch = kernel_source.arch(wish.arch)
        files = kernel_config.select(arch, wish.fragments, wish.host_config)
        base = kernel_config.of_host() if wish.host_config else None
        wanted = kernel_config.parse(base[0]) if base else {}
        wanted |= {one.name: one.value for path in files for one in kernel_config.read(path)}
        place = _place(wish)
        found = kernel_needs.look(place is None, arch, wanted)
        if any(one.missing for one in found):
            if wish.dry_run:
                return Outcome(None, found, None, time.monotonic() - started)
            dependencies.demand(found)
        tree = kernel_source.directory(place, note) if place else kernel_source.distribution(runner, note)
        note(f"configuring {tree.version} for {arch.name}")
        config = kernel_config.make(tree, arch, files, base, kernel_needs.banners(arch), runner)
        plan = kernel_build.plan(tree, arch, config)
        if wish.dry_run:
            return Outcome(plan, found, None, time.monotonic() - started)
        if not wish.allow_dropped:
            kernel_config.demand(config)
        built = kernel_build.build(plan, runner, wish.jobs, wish.force, progress, note)
        return Outcome(plan, found, built, time.monotonic() - started)
    except BaseException:
        runner.stop()
        raise


def _place(wish: Wish) -> Path | None:
    """The directory to build from; None for the distribution's package."""
    if not wish.artifact:
        return wish.source
    return artifact_source.kernel(wish.source)


def show(outcome: Outcome, wish: Wish) -> None:
    """Print it; then, of a plan that could not be carried out, the reason as an error."""
    if wish.as_json:
        click.echo(json.dumps(_as_json(outcome), indent=2))
    else:
        _print(outcome, wish.dry_run)
    if not wish.dry_run:
        return
    dependencies.demand(outcome.found)
    if outcome.plan and not outcome.plan.cached:
        if not wish.allow_dropped:
            kernel_config.demand(outcome.plan.config)
        kernel_needs.demand_space(outcome.plan.space)


def _print(outcome: Outcome, dry_run: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    for one in outcome.found:
        if dry_run or one.missing:
            say(f"needs      {one.name}: {one.value or 'missing'}{f' ({one.note})' if one.note else ''}")
    if plan := outcome.plan:
        config = plan.config
        say(f"source     {plan.tree.origin} ({plan.tree.version}, {plan.arch.name})")
        say(f"config     {config.base} + {', '.join(config.fragments)}: {config.options} options on")
        for dropped in config.dropped:
            say(f"  dropped  {dropped}")
        if not outcome.built:
            say(_forecast(plan))
    if built := outcome.built:
        record = built.record
        state = f"built in {built.seconds:.0f} s, log {built.log}" if built.built else "from the cache"
        say(f"kernel     {record.release}, {record.objects} objects; {state}")
        say("try it:    kflex-repro vm run --kernel PATH -- uname -a")
        say(str(built.path))


def _forecast(plan: Plan) -> str:
    if plan.cached:
        return f"kernel     in the cache: {plan.path}"
    begun = f", {plan.there} of them made" if plan.there else ""
    return f"to build   about {plan.objects} objects{begun}; needs {plan.space / 1e9:.1f} GB in the cache"


def _as_json(outcome: Outcome) -> dict[str, object]:
    plan, built = outcome.plan, outcome.built
    return {
        "schema": 1,
        "path": str(built.path) if built else None,
        "image": str(built.path / "image") if built else None,
        "built": bool(built and built.built),
        "kernel": asdict(built.record) if built else None,
        "log": str(built.log) if built and built.log else None,
        "source": plan.tree.origin if plan else None,
        "version": plan.tree.version if plan else None,
        "arch": plan.arch.name if plan else None,
        "config": {
            "base": plan.config.base,
            "fragments": list(plan.config.fragments),
            "options": plan.config.options,
            "dropped": [
                {**asdict(one.asked), "got": one.value, "why": one.why} for one in plan.config.dropped
            ],
        }
        if plan
        else None,
        "plan": {
            "key": plan.key,
            "cached": plan.cached,
            "objects": plan.objects,
            "made": plan.there,
            "bytes": plan.space,
        }
        if plan
        else None,
        "dependencies": [{**asdict(one), "missing": one.missing} for one in outcome.found],
        "apt": dependencies.apt_command(outcome.found),
        "seconds": round(outcome.seconds, 3),
    }
