"""What is compared by ``bench probe``: a server without a probe, with each mode of ours, with other tools.

An arm is attached for one run and taken off again; afterwards it says how many requests it saw.
"""

from __future__ import annotations

import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kflex_repro.bench.oldmonitor import TRACEFS, OldMonitor
from kflex_repro.bpf import fs
from kflex_repro.errors import KflexError
from kflex_repro.probe import latency, monitor, targets

PLAIN = "plain"
SAMPLE = 100
_FOLLOW_S = 1.0
_END_S = 30.0


@dataclass(frozen=True)
class Sight:
    """What an arm saw: requests by command; ``lost``: what it knows that it did not; None: cannot say.

    ``skipped``: requests left out on purpose (sampling); ``write_us``: the mean duration of the write call,
    which the old monitor calls latency.
    """

    commands: Mapping[str, int]
    lost: int | None = 0
    skipped: int = 0
    write_us: float | None = None


@dataclass
class Attached:
    """An arm that is on. ``end()`` takes it off; after that ``sight`` is there (None: no probe)."""

    stop: Callable[[], Sight | None] = lambda: None
    sight: Sight | None = None
    _ended: bool = field(default=False)

    def end(self) -> Sight | None:
        """Take it off and say what was seen. No error twice."""
        if not self._ended:
            self._ended = True
            self.sight = self.stop()
        return self.sight


@contextmanager
def plain() -> Iterator[Attached]:
    """No probe at all."""
    yield Attached()


@contextmanager
def ours(options: latency.Options, port: int) -> Iterator[Attached]:
    """The monitor as ``kflex-repro monitor`` runs it: events go into a recording."""
    with tempfile.TemporaryDirectory(prefix="kflex-probe-") as place:
        probe = latency.Probe([targets.by_port(port)], options)
        try:
            watch = monitor.Watch(probe)
        except BaseException:
            probe.close()
            raise
        with watch:
            writer = monitor.recorder(watch, Path(place) / "events.kmon") if options.events else None

            def keep(records: list[bytes]) -> None:
                if writer is not None:
                    writer.add(records, watch.reader.names)

            failed: list[Exception] = []

            def run() -> None:
                try:
                    monitor.run(watch, _FOLLOW_S, None, keep, lambda _interval: None)
                except Exception as error:
                    failed.append(error)

            thread = threading.Thread(target=run, name="monitor", daemon=True)
            thread.start()

            def stop() -> Sight:
                deadline = time.monotonic() + _END_S
                while thread.is_alive():
                    # Set again: once a second the thread writes what it found itself.
                    watch.ended = True
                    thread.join(0.05)
                    if time.monotonic() > deadline:
                        raise KflexError("the monitor does not end")
                if writer is not None:
                    writer.close({})
                if failed:
                    raise failed[0]
                return _sight(watch.all())

            attached = Attached(stop)
            try:
                yield attached
            finally:
                attached.end()


def _sight(seen: monitor.Interval) -> Sight:
    commands = {name: counts.calls for name, counts in seen.commands.items()}
    return Sight(commands, seen.lost, seen.totals["skipped"])


@contextmanager
def old_monitor(pid: int) -> Iterator[Attached]:
    """The old design: see oldmonitor.py."""
    with OldMonitor(pid) as running:

        def stop() -> Sight:
            seen = running.finish()
            return Sight(seen.commands, seen.lost, write_us=seen.latency_ns / 1e3)

        yield Attached(stop)


# --- bpftrace ----------------------------------------------------------------------------------------------

_READY = "attached"
_SHOWN = 64


def bpftrace_program(pid: int) -> str:
    """The old design as a one-liner: what is read and written, a line each."""
    parts = []
    for call in ("read", "write"):
        letter = call[0]
        parts += [
            f"tracepoint:syscalls:sys_enter_{call} /pid == {pid}/ {{ @{letter}[tid] = args->buf; }}",
            f"tracepoint:syscalls:sys_exit_{call} /@{letter}[tid]/ {{ if (args->ret > 0) "
            f'{{ printf("{letter} %r\\n", buf(@{letter}[tid], args->ret)); }} delete(@{letter}[tid]); }}',
        ]
    # Last of all: when it fires, the others are attached.
    return " ".join([*parts, f'interval:ms:20 {{ if (!@on) {{ printf("{_READY}\\n"); @on = 1; }} }}'])


@contextmanager
def bpftrace(pid: int) -> Iterator[Attached]:
    """bpftrace with bpftrace_program(); its lines go into a file, and are counted afterwards."""
    program = bpftrace_program(pid)
    command = ["bpftrace", "-B", "full", "-e", program]
    if TRACEFS not in fs.mounts("tracefs"):
        # It looks for tracefs in one place: mounted there, in a mount namespace that goes away with it.
        script = f'mount -t tracefs tracefs {TRACEFS} && exec "$@"'
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *command]
    if setpriv := shutil.which("setpriv"):
        command = [setpriv, "--pdeathsig", "KILL", *command]
    with tempfile.TemporaryDirectory(prefix="kflex-probe-") as place:
        out = Path(place) / "out"
        with out.open("wb") as stream:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_for(child, out)

            def stop() -> Sight:
                child.send_signal(signal.SIGINT)
                child.wait(_END_S)
                return _bpftrace_sight(out)

            yield Attached(stop)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def _wait_for(child: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + _END_S
    while _READY.encode() not in out.read_bytes():
        if child.poll() is not None or time.monotonic() > deadline:
            said = out.read_text(errors="replace").strip().splitlines()
            raise KflexError(f"bpftrace did not attach: {said[-1] if said else 'it said nothing'}")
        select.select([], [], [], 0.02)


_REQUEST = re.compile(rb"^r \*\d+\\x0d\\x0a\$\d+\\x0d\\x0a([A-Za-z]+)", re.MULTILINE)
_LOST = re.compile(rb"Lost (\d+) events")


def _bpftrace_sight(out: Path) -> Sight:
    text = out.read_bytes()
    commands: dict[str, int] = {}
    for name in _REQUEST.findall(text):
        known = name.decode().upper()
        commands[known] = commands.get(known, 0) + 1
    return Sight(commands, sum(int(count) for count in _LOST.findall(text)))


# --- by name -----------------------------------------------------------------------------------------------

PROBES = {
    "histogram": "ours: histograms",
    "events": "ours: events",
    "sampled": f"ours: events 1/{SAMPLE}",
    "old": "old design",
    "bpftrace": "bpftrace",
}
LABELS = {PLAIN: "no probe", **PROBES}
OPTIONS = {
    "histogram": latency.Options(),
    "events": latency.Options(events=True),
    "sampled": latency.Options(events=True, sample=SAMPLE),
}


def attach(name: str, pid: int, port: int) -> AbstractContextManager[Attached]:
    """The arm ``name`` on the server; its context leaves nothing attached, however it ends."""
    if name == PLAIN:
        return plain()
    if name == "old":
        return old_monitor(pid)
    if name == "bpftrace":
        return bpftrace(pid)
    return ours(OPTIONS[name], port)
