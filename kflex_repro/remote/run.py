"""A probe command on one host, as if it ran here; or on many, with a directory and a progress row each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kflex_repro.errors import KflexError
from kflex_repro.remote import frames, inventory, ssh
from kflex_repro.remote.options import Chosen, results
from kflex_repro.remote.session import Request, Session
from kflex_repro.remote.ssh import Link, Target

_TICK_S = 0.2


@dataclass(frozen=True)
class Wanted:
    """A command line without its outputs; those as parameter -> (option, place here)."""

    name: str
    arguments: tuple[str, ...]
    outputs: Mapping[str, tuple[str, Path]]
    new: tuple[str, ...] = ()
    as_json: bool = False


def run(chosen: Chosen, wanted: Wanted) -> int:
    """The exit code: the remote command's for one host; for many 0 if all are 0."""
    if chosen.hosts is not None:
        targets = inventory.load(chosen.hosts, chosen.only)
    else:
        assert chosen.host is not None
        targets = [ssh.parse(chosen.host)]
    targets = [_completed(target, chosen) for target in targets]
    if chosen.hosts is None:
        return _one(targets[0], chosen, wanted)
    return _many(targets, chosen, wanted)


def _completed(target: Target, chosen: Chosen) -> Target:
    identities = (str(chosen.identity),) if chosen.identity else target.identities
    target = replace(target, identities=identities, connect_s=chosen.connect_timeout)
    return replace(target, password=ssh.ask_password(target)) if chosen.password_prompt else target


def _request(
    chosen: Chosen, wanted: Wanted, outputs: Mapping[str, Path], window: Mapping[str, object] | None
) -> Request:
    options = [
        f"{wanted.outputs[name][0]}={frames.WORK}/{name}/{place.name or name}"
        for name, place in outputs.items()
    ]
    # Before the arguments: those are behind a --.
    split = wanted.arguments.index("--") if "--" in wanted.arguments else len(wanted.arguments)
    argv = (*wanted.arguments[:split], *options, *wanted.arguments[split:])
    return Request(argv, outputs, window, chosen.remote_command, chosen.sudo)


# --- threads ----------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    """One host's connection and command, in a thread of its own."""

    target: Target
    request: Request
    out: Any
    err: Any
    state: str = "connecting"
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    code: int | None = None
    error: BaseException | None = None
    link: Link | None = None
    session: Session | None = None
    # Not join: interrupted once, it takes a thread for ended that is not (Python 3.11).
    ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> _Worker:
        threading.Thread(target=self._run, name=self.target.name, daemon=True).start()
        return self

    def _run(self) -> None:
        try:
            with Link(self.target) as self.link:
                self.session = Session(self.link, self.request, self.out, self.err, self._state)
                self.code = self.session.run()
        except BaseException as error:
            self.error = error
            self.state = "failed"
        self.seconds = time.monotonic() - self.began
        self.ended.set()

    def _state(self, state: str) -> None:
        self.state = state

    def close(self) -> None:
        """Have nothing left there, whatever state it is in."""
        if self.session is not None and not self.ended.is_set():
            self.session.drop()
        if self.link is not None:
            self.link.close()


def _wait(workers: Sequence[_Worker], tick: Callable[[], None], say: Callable[[str], None]) -> None:
    """Until all have ended. First Ctrl-C: measurements end, their results come; the second drops them."""
    interrupted = False
    try:
        while alive := [one for one in workers if not one.ended.is_set()]:
            try:
                alive[0].ended.wait(_TICK_S)
                tick()
            except KeyboardInterrupt:
                running = [one.session for one in alive if one.session and one.session.started.is_set()]
                if interrupted or len(running) < len(alive):
                    raise
                interrupted = True
                say("ending the measurement; Ctrl-C again does not wait for its result")
                for session in running:
                    session.interrupt()
    finally:
        for one in workers:
            one.close()


# --- one host ---------------------------------------------------------------------------------------------


class _Stream:
    """What the command there prints, printed here; names of its results there become those here."""

    def __init__(self, stream: IO[bytes], names: Mapping[str, Path], host: str) -> None:
        self._stream, self._names, self._host = stream, names, host
        self.work = ""
        self._line = b""

    def write(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._stream.write(self._mine(line) + b"\n")
        if lines:
            self._stream.flush()

    def close(self) -> None:
        self._stream.write(self._mine(self._line))
        self._stream.flush()

    def _mine(self, line: bytes) -> bytes:
        said = b"kflex-repro: "
        if self._host and line.startswith(said):
            return said + self._host.encode() + b": " + line[len(said) :]
        if self.work:
            for name, place in self._names.items():
                there = f"{self.work}/{name}/{place.name or name}"
                line = line.replace(there.encode(), os.fsencode(place))
        return line


def _one(target: Target, chosen: Chosen, wanted: Wanted) -> int:
    outputs = {name: place for name, (_, place) in wanted.outputs.items()}
    _places(outputs, wanted)
    # Only what is shown live needs a terminal, and that is standard output.
    window = _window() if sys.stdout.isatty() and not outputs else None
    request = _request(chosen, wanted, outputs, window)
    sys.stdout.flush()
    out = _Stream(sys.stdout.buffer, outputs, "")
    err = _Stream(sys.stderr.buffer, outputs, target.name)

    def named(write: Any, stream: _Stream) -> Any:
        def write_(data: bytes) -> None:
            stream.work = worker.session.work if worker.session else ""
            write(data)

        return write_

    def raw(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    worker = _Worker(target, request, raw if window else named(out.write, out), named(err.write, err))
    console = Console(stderr=True, highlight=False)
    status = console.status(Text(f"{target.name}: connecting"))

    def tick() -> None:
        if worker.state == "running":
            status.stop()  # from here on the command itself says how it goes
        else:
            status.update(Text(f"{target.name}: {worker.state}"))

    def say(line: str) -> None:
        console.print(Text(f"{target.name}: {line}"))

    if console.is_terminal:
        status.start()
    try:
        with _resizing(worker):
            worker.start()
            _wait([worker], tick, say)
    finally:
        status.stop()
        with contextlib.suppress(BrokenPipeError):
            out.close()
            err.close()
    if worker.error is not None:
        raise worker.error
    assert worker.code is not None
    return worker.code


def _places(outputs: Mapping[str, Path], wanted: Wanted) -> None:
    """Said before the measurement, not after."""
    for name, place in outputs.items():
        if name in wanted.new and place.exists():
            raise KflexError(
                "the file exists", str(place), f"choose another name for {wanted.outputs[name][0]}"
            )
        above = place.absolute().parent
        while not above.exists():
            above = above.parent
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise KflexError("cannot write there", str(above), "choose another place")


def _window() -> dict[str, object]:
    size = shutil.get_terminal_size()
    return {"rows": size.lines, "columns": size.columns, "term": os.environ.get("TERM", "dumb")}


@contextlib.contextmanager
def _resizing(worker: _Worker) -> Iterator[None]:
    def resized(*_: object) -> None:
        if worker.session is not None and worker.request.window:
            # Not in the handler: the thread it interrupts may hold the lock that sending takes.
            threading.Thread(target=worker.session.resize, args=(_window(),), daemon=True).start()

    old = signal.signal(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, old)


# --- many hosts -------------------------------------------------------------------------------------------


def _many(targets: Sequence[Target], chosen: Chosen, wanted: Wanted) -> int:
    place = chosen.results or Path(results(wanted.name))
    files = contextlib.ExitStack()
    workers: list[_Worker] = []
    with files:
        for target in targets:
            mine = place / target.name
            _made(mine)
            outputs = {name: mine / (there.name or name) for name, (_, there) in wanted.outputs.items()}
            _places(outputs, wanted)
            out = files.enter_context(
                (mine / ("output.json" if wanted.as_json else "output.txt")).open("wb", buffering=0)
            )
            err = files.enter_context((mine / "messages.txt").open("wb", buffering=0))
            workers.append(_Worker(target, _request(chosen, wanted, outputs, None), out.write, err.write))
        for worker in workers:
            worker.start()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True, highlight=False)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            rows = [progress.add_task(one.target.name, total=1, state=one.state) for one in workers]

            def tick() -> None:
                for row, one in zip(rows, workers, strict=True):
                    progress.update(row, state=_state(one), completed=int(one.ended.is_set()))

            _wait(workers, tick, progress.console.print)
            tick()
    _summary(workers, place, wanted.as_json)
    return 0 if all(one.code == 0 for one in workers) else 1


def _made(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KflexError(
            f"cannot make it: {error.strerror}", str(place), "choose another --results"
        ) from None


def _state(worker: _Worker) -> str:
    if worker.code is not None:
        return "done" if worker.code == 0 else f"exit code {worker.code}"
    return "failed" if worker.error is not None else worker.state


def _trouble(worker: _Worker, place: Path) -> str:
    """Why a host's part failed, in one line; empty if it did not."""
    if worker.error is not None:
        return str(worker.error) or type(worker.error).__name__
    if worker.code:
        said = (place / worker.target.name / "messages.txt").read_text(errors="replace").split("\n")
        return next((one for one in reversed(said) if one.strip()), "")
    return ""


def _summary(workers: Sequence[_Worker], place: Path, as_json: bool) -> None:
    rows = [
        {
            "host": one.target.name,
            "exit": one.code,
            "seconds": round(one.seconds, 3),
            "error": _trouble(one, place),
            "out": str(place / one.target.name),
        }
        for one in workers
    ]
    if as_json:
        print(json.dumps({"schema": 1, "hosts": rows}, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "result", "time", "where, or why not"):
        table.add_column(column)
    for worker, row in zip(workers, rows, strict=True):
        table.add_row(
            Text(worker.target.name),
            _state(worker),
            f"{worker.seconds:.1f} s",
            Text(str(row["error"] or row["out"])),
        )
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 400).print(table)
