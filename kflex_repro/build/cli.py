"""``kflex-repro build``."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from kflex_repro.build import cache, libbpf, objects, toolchain


class _Display:
    """Progress on stderr: bars on a terminal, one line for each finished step elsewhere."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self._console, self._progress = console, progress
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def step(self, name: str, state: str, seconds: float) -> None:
        with self._lock:
            if self._progress is None:
                if state != "start":
                    self._console.print(f"{name}: {state} ({seconds:.1f} s)")
            elif state == "start":
                self._tasks[name] = self._progress.add_task(name, total=1, note="")
            else:
                self._progress.update(self._tasks[name], completed=1, note=state)

    def note(self, line: str) -> None:
        with self._lock:
            if self._progress is None:
                self._console.print(line)
            else:
                task = self._tasks.setdefault("", self._progress.add_task("libbpf", total=None, note=""))
                self._progress.update(task, note=line)


@contextlib.contextmanager
def _display() -> Iterator[_Display]:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Display(console, None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield _Display(console, progress)


@click.command()
@click.option("--force", is_flag=True, help="Build again what the cache has.")
@click.option("--only", metavar="NAME", help="Only this BPF object (or kflex.so, or vmlinux.h).")
@click.option(
    "--libbpf-from-source",
    is_flag=True,
    help="Build libbpf from the distribution's kernel source and use its headers.",
)
@click.option("--jobs", type=click.IntRange(1, 256), help="Compilers at a time (default: one per CPU).")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def build(force: bool, only: str | None, libbpf_from_source: bool, jobs: int | None, as_json: bool) -> None:
    """Build the BPF objects and the Redis module into the cache; what is there and unchanged is kept.

    The cache is $KFLEX_CACHE, or kflex-repro in the user's cache directory; logs are kept in its logs/.
    """
    started = time.monotonic()
    from_source: Path | None = None
    with _display() as display:
        if libbpf_from_source:
            runner = toolchain.Runner()
            before = time.monotonic()
            try:
                from_source, fresh = libbpf.from_source(runner, force, jobs, display.note)
            except BaseException:
                runner.stop()
                raise
            display.note(f"libbpf: {'built' if fresh else 'cached'} ({time.monotonic() - before:.1f} s)")
        built = objects.ensure(only=only, force=force, jobs=jobs, libbpf=from_source, report=display.step)
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps(_as_json(built, from_source, seconds), indent=2))
        return
    fresh_steps = sum(step.built for step in built.steps)
    click.echo(f"{fresh_steps} built, {len(built.steps) - fresh_steps} from the cache, in {seconds:.1f} s")
    for step in built.steps:
        click.echo(f"  {step.path}")


def _as_json(built: objects.Built, from_source: Path | None, seconds: float) -> dict[str, object]:
    return {
        "cache": str(cache.root()),
        "seconds": round(seconds, 3),
        "libbpf": str(from_source) if from_source else None,
        "steps": [
            {
                "name": step.name,
                "path": str(step.path),
                "built": step.built,
                "seconds": round(step.seconds, 3),
                "log": str(step.log) if step.log else None,
            }
            for step in built.steps
        ],
    }
