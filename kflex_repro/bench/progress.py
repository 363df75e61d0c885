"""How a benchmark says what it is doing, and what it is going to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from kflex_repro import patience
from kflex_repro.bench.result import ScenarioResult
from kflex_repro.bench.run import Clock, Events
from kflex_repro.bench.summary import number


def duration(seconds: float) -> str:
    """``2 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def many(number: int, what: str) -> str:
    """``1 pair``, ``3 pairs``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def planned(scenarios: int, pairs: int, runs: int, seconds: float, where: str = "") -> str:
    """What is going to be run, and for how long (s)."""
    what = f"{many(scenarios, 'scenario')} × {many(pairs, 'pair')}{where}"
    return f"{what}: {runs} runs, about {duration(seconds)}"


def progress_bar(console: Console) -> Progress:
    """A bar with room for how much time is left; gone when it is over."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
    )
    return Progress(*columns, console=console, transient=True)


@contextmanager
def running(estimate_s: float, console: Console) -> Iterator[Events]:
    """Shows a run that takes about so many seconds."""
    clock = Clock(estimate_s)
    with progress_bar(console) as bar:
        task = bar.add_task("starting", total=1.0, left="")

        def step(seconds: float, text: str) -> None:
            clock.advance(seconds)
            bar.update(task, completed=clock.share, description=text, left=f"{duration(clock.left_s)} left")

        def finished(result: ScenarioResult) -> None:
            bar.console.print(finished_line(result), soft_wrap=True)

        yield Events(step, finished)


def finished_line(result: ScenarioResult) -> str:
    """A scenario that is done, with rich's markup."""
    ratio = result.ratio.rps
    if patience.emulated():
        text = f"  {result.scenario.name}: {sum(result.requests.values()):,} requests answered"
    else:
        text = f"  {result.scenario.name}: "
        text += f"{number(ratio.median)}× plain Redis" if ratio else "no ratio"
    if result.served_in_kernel is not None:
        text += f", {result.served_in_kernel:.1%} in the kernel"
    if result.recovery and result.recovery.seconds:
        text += f", served share back after {number(result.recovery.seconds.median)} s"
    if result.mismatches:
        text += f", [bold red]{result.mismatches} WRONG ANSWERS[/]"
    return text
