"""What the commands of this room share: which process, how long, where files go."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kflex_repro.errors import KflexError
from kflex_repro.probe import process
from kflex_repro.probe.process import Process

_TICK_S = 0.25


def target_options(many: bool = False) -> Callable[[Any], Any]:
    """--pid and --port; with ``many`` each may be given more than once."""

    def decorate(command: Any) -> Any:
        more = "; repeatable" if many else ""
        port = click.option(
            "--port",
            type=click.IntRange(1, 65535),
            multiple=many,
            help=f"The process that listens on this TCP port{more}.",
        )
        pid = click.option(
            "--pid", type=click.IntRange(1), multiple=many, help=f"The process with this id{more}."
        )
        return pid(port(command))

    return decorate


def chosen(pids: Sequence[int], ports: Sequence[int]) -> list[Process]:
    """The processes of --pid and --port, each once."""
    found = {pid: process.by_pid(pid) for pid in pids}
    for port in ports:
        found |= {one.pid: one for one in process.by_port(port)}
    return list(found.values())


def parent(path: Path | None) -> None:
    """KflexError unless ``path`` (None: no file) has a directory: said before the measurement, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise KflexError("no such directory", str(path.absolute().parent), "make it, or choose another place")


def run_for(
    duration: float,
    processes: Sequence[Process],
    console: Console,
    what: str = "counting",
    running: Callable[[], bool] = lambda: True,
) -> tuple[float, str]:
    """Wait: (seconds waited, why it ended: time, interrupted, process, or probe when not ``running``).

    Ctrl-C ends the measurement, not the program. KflexError if a process is gone before it begins.
    """
    began, ended = time.monotonic(), "time"
    with process.Watch(list(processes)) as watch, console.status("") as status:
        try:
            while (left := began + duration - time.monotonic()) > 0:
                status.update(f"{what}, {left:.0f} s left; Ctrl-C ends it")
                gone = watch.wait(min(left, _TICK_S))
                if gone is not None:
                    ended = "process"
                    break
                if not running():
                    ended = "probe"
                    break
        except KeyboardInterrupt:
            ended = "interrupted"
    seconds = time.monotonic() - began
    if ended == "process":
        console.print(f"{gone} ended after {seconds:.1f} s")
    return seconds, ended
