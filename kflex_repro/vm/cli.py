"""``kflex-repro vm``: parse, call, print."""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn
from rich.progress import Progress as ProgressBar

from kflex_repro.errors import KflexError
from kflex_repro.vm.rootfs import Progress

if TYPE_CHECKING:
    from kflex_repro.vm import run

_UNITS = {"": 1 << 20, "M": 1 << 20, "G": 1 << 30}


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([MG]?)i?B?", str(value), re.I)
        if match is None:
            self.fail(f"{value!r} is no size such as 2G or 768M", param, ctx)
        size = int(float(match.group(1)) * _UNITS[match.group(2).upper()])
        if not 256 << 20 <= size <= 1 << 40:
            self.fail(f"{value} is not between 256M and 1T", param, ctx)
        return size & ~((1 << 20) - 1)


def _variable(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> Mapping[str, str]:
    found = {}
    for value in values:
        name, sign, text = value.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise click.BadParameter(f"{value!r} is not NAME=VALUE")
        found[name] = text
    return found


@dataclass(frozen=True)
class _Guest:
    """What every guest is asked with."""

    kernel: str
    memory: int
    cpus: int
    accel: str
    root: str
    take: tuple[Path, ...]
    env: Mapping[str, str]
    objects: bool

    def request(
        self,
        command: tuple[str, ...],
        timeout: float,
        out: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> run.Request:
        """With the kernel found, and with ``objects`` those for it built; ``env`` gives way to the user's."""
        from kflex_repro.vm import kernels, run

        kernel = kernels.find(self.kernel, _note)
        if self.objects:
            with Console(stderr=True).status("BPF objects for the guest"):
                run.prepare(kernel, _note)
        return run.Request(
            command=command,
            kernel=kernel,
            memory=self.memory,
            cpus=self.cpus,
            accel=self.accel,
            timeout=timeout,
            root=self.root,  # type: ignore[arg-type]
            cwd=Path.cwd(),
            take=self.take,
            env={**(env or {}), **self.env},
            out=out,
        )


def _asked(command: Callable[..., None]) -> Any:
    """The options of a _Guest, which ``command`` gets as its ``guest``."""

    @functools.wraps(command)
    def with_guest(**given: Any) -> None:
        guest = _Guest(**{field.name: given.pop(field.name) for field in fields(_Guest)})
        command(guest=guest, **given)

    wrapped: Any = with_guest
    for option in reversed(
        (
            click.option(
                "--kernel",
                default="stock",
                show_default=True,
                metavar="SPEC",
                help="stock (the distribution's 6.12), a series as 6.1, or the path of a bzImage, a .deb, a "
                "kernel's build tree, or what build --kernel made.",
            ),
            click.option("--mem", "memory", type=_Size(), default="2G", show_default=True, help="Memory."),
            click.option(
                "--smp", "cpus", type=click.IntRange(1, 64), default=2, show_default=True, help="CPUs."
            ),
            click.option(
                "--accel",
                type=click.Choice(["auto", "kvm", "tcg"]),
                default="auto",
                show_default=True,
                help="KVM, or emulation (TCG: 10 to 30 times slower); auto tries KVM.",
            ),
            click.option(
                "--root",
                type=click.Choice(["auto", "virtiofs", "image"]),
                default="auto",
                show_default=True,
                help="The guest's files: the host's own root, read-only (virtiofs; as much of it as you may "
                "read), or an image made of the host's packages and this checkout; auto takes what works. "
                "What the guest writes stays in the guest.",
            ),
            click.option(
                "--take",
                multiple=True,
                type=click.Path(exists=True, path_type=Path),
                metavar="PATH",
                help="Also into the image: a file or a directory (repeatable).",
            ),
            click.option(
                "--env",
                "env",
                multiple=True,
                metavar="NAME=VALUE",
                callback=_variable,
                help="A variable for the command (repeatable).",
            ),
            click.option(
                "--objects",
                is_flag=True,
                help="First build, here, the BPF objects for that kernel: kflex-repro in the guest then "
                "finds them in the cache.",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped


@click.group()
def group() -> None:
    """Small virtual machines: run a command as root on the distribution's stock 6.12 kernel, or another one.

    Nothing is installed, and nothing stays: no process, mount, image or socket, however it ends.
    """


def _note(line: str) -> None:
    print(f"kflex-repro: {line}", file=sys.stderr, flush=True)


def _write(stream: Any) -> Any:
    def write(data: bytes) -> None:
        stream.buffer.write(data)
        stream.buffer.flush()

    return write


@group.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_asked
@click.option(
    "--timeout",
    type=click.FloatRange(5, 86400),
    default=600,
    show_default=True,
    metavar="S",
    help="Seconds after which the guest is ended, whatever it does.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where files that the command writes to $KFLEX_OUT go [results/<UTC time>-vm, if there are any].",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(guest: _Guest, timeout: float, out: Path | None, command: tuple[str, ...]) -> None:
    """Run COMMAND as root in a guest, in the same directory; its output is streamed, its exit status is ours.

    \b
    kflex-repro vm run -- uname -a
    kflex-repro vm run --kernel 6.1 --objects -- kflex-repro doctor
    kflex-repro vm run --out files -- sh -c 'dmesg > $KFLEX_OUT/dmesg'
    """
    from kflex_repro.vm import run

    out = out or Path("results") / time.strftime("%Y%m%d-%H%M%S-vm", time.gmtime())
    request = guest.request(_as_here(command), timeout, out)
    outcome = run.run(request, _write(sys.stdout), _write(sys.stderr), _note, progress=progress())
    if outcome.files:
        _note(f"{len(outcome.files)} files of $KFLEX_OUT are in {out}")
    sys.exit(outcome.status)


def progress() -> Progress:
    """What shows the making of a guest's root: a bar while it lasts, or a line where there is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bars: dict[str, tuple[ProgressBar, TaskID]] = {}

    def show(name: str, done: int, total: int) -> None:
        title = f"making the guest's root, {name}"
        if name not in bars:
            bar = ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal)
            bars[name] = bar, bar.add_task(title, total=total)
            bar.start()
            if not console.is_terminal:
                _note(f"{title}: {total / 1e6:.0f} MB")
        bar, task = bars[name]
        bar.update(task, completed=done)
        if done == total:
            # What comes next on the terminal is the guest's.
            bar.stop()

    return show


def _as_here(command: tuple[str, ...]) -> tuple[str, ...]:
    """``kflex-repro`` is the one that runs, wherever it is installed."""
    if command[0] in ("kflex-repro", "python"):
        return (sys.executable, *(("-m", "kflex_repro") if command[0] == "kflex-repro" else ()), *command[1:])
    return command


@group.command("shell")
@_asked
def shell(guest: _Guest) -> None:
    """A shell as root in a guest, in the same directory. `exit` ends the guest; so does Ctrl-], always."""
    from kflex_repro.vm import run, terminal

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise KflexError("vm shell wants a terminal", "standard input or output is none", "use vm run")
    size = os.get_terminal_size()
    names = {"TERM": os.environ.get("TERM", "vt100"), "LINES": str(size.lines), "COLUMNS": str(size.columns)}
    request = guest.request(("/bin/bash", "-i"), timeout=86400, env=names)
    # While the terminal is still this one's.
    assert not isinstance(request.kernel, str)
    disks = run.layers(request, request.kernel, progress())
    sys.exit(terminal.shell(request, disks, _note))
