"""Runs a command so that what it asks of the kernel is seen: under the traced libbpf, or under strace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kflex_repro.diagnose import probes, trace
from kflex_repro.diagnose.text import Lines
from kflex_repro.errors import KflexError, Unavailable

STRACE_CALLS = "bpf,mmap,munmap,mremap,brk,clone,clone3,fork,vfork,prlimit64,setrlimit,openat,open"
_GRACE_S = 5.0


@dataclass(frozen=True)
class Ran:
    """A finished command: its log, exit status (negative: the signal), limits; whether Ctrl-C ended it."""

    command: tuple[str, ...]
    log: trace.Log
    status: int
    limits: dict[str, int | str]
    interrupted: bool


def run(command: Sequence[str], libbpf: Path | None, output_to_stderr: bool) -> Ran:
    """Run a command to its end and read what it left; Ctrl-C ends the command, not the diagnosis.

    ``libbpf`` is the directory of the traced libbpf.so.1; None: strace. What the command prints passes
    through (to standard error if asked), and what it prints on standard error is read as a log too.
    """
    if shutil.which(command[0]) is None:
        raise KflexError("no such program, or not executable", command[0])
    with tempfile.TemporaryDirectory(prefix="kflex-diagnose-") as scratch:
        record = Path(scratch) / "trace"
        environment = dict(os.environ)
        arguments = list(command)
        if libbpf is None:
            arguments = [
                _strace(),
                "-f",
                "-qq",
                "-o",
                str(record),
                "-e",
                f"trace={STRACE_CALLS}",
                "--",
                *command,
            ]
        else:
            environment.update(_environment(libbpf, record))
        collector = trace.Collector()
        child = _start(arguments, environment, output_to_stderr)
        assert child.stderr is not None
        with _ending(child, under_strace=libbpf is None):
            reader = threading.Thread(target=_copy, args=(child.stderr, collector), daemon=True)
            reader.start()
            interrupted = _wait(child, under_strace=libbpf is None)
            # Not reaped yet: the kernel still knows the limits that it ran under.
            limits = probes.limits_of(child.pid)
            status = child.wait()
            # A grandchild that lives on may hold the pipe: its words are not waited for.
            reader.join(_GRACE_S)
        if record.exists():
            with record.open("rb") as stream:
                log = trace.read(stream, collector=collector)
        else:
            log = collector.finish()
        return Ran(tuple(command), log, status, limits, interrupted)


def _strace() -> str:
    found = shutil.which("strace")
    if found is None:
        raise Unavailable("strace is not installed", "", "apt install strace")
    return found


def _environment(libbpf: Path, record: Path) -> dict[str, str]:
    """What makes a program load the traced libbpf, whatever it was linked with, and write its trace."""
    library = libbpf / "libbpf.so.1"
    paths = [str(libbpf), os.environ.get("LD_LIBRARY_PATH", "")]
    preload = [str(library), os.environ.get("LD_PRELOAD", "")]
    return {
        "KFLEX_TRACE": str(record),
        "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
        "LD_PRELOAD": ":".join(filter(None, preload)),
    }


def _start(
    arguments: list[str], environment: dict[str, str], output_to_stderr: bool
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            arguments,
            env=environment,
            stdout=sys.stderr.fileno() if output_to_stderr else None,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise KflexError(f"cannot run it: {error.strerror}", arguments[0]) from None


@contextlib.contextmanager
def _ending(child: subprocess.Popen[bytes], under_strace: bool) -> Iterator[None]:
    """Whatever happens to us, the command does not outlive it."""
    try:
        yield
    finally:
        if child.poll() is None:
            _signal(child, under_strace, signal.SIGTERM)
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                _signal(child, under_strace, signal.SIGKILL)
                child.wait()


def _signal(child: subprocess.Popen[bytes], under_strace: bool, signum: signal.Signals) -> None:
    """Send a signal to the command. strace holds signals to itself back, and killed would let it run on."""
    targets = [child.pid]
    if under_strace:
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        with contextlib.suppress(OSError):
            targets = [int(pid) for pid in children.read_text().split()] or targets
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _wait(child: subprocess.Popen[bytes], under_strace: bool) -> bool:
    """Wait for the end without reaping; True if Ctrl-C was what ended it."""
    interrupted = False
    while True:
        try:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            return interrupted
        except KeyboardInterrupt:
            # The terminal sent it to the command too; a second one means it.
            _signal(child, under_strace, signal.SIGKILL if interrupted else signal.SIGINT)
            interrupted = True
        except ChildProcessError:
            return interrupted


def _copy(stream: BinaryIO, collector: trace.Collector) -> None:
    """Pass standard error on, as it comes, and read it."""
    lines = Lines()

    def chunks() -> Iterator[bytes]:
        while chunk := os.read(stream.fileno(), 1 << 16):
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
            yield chunk

    with contextlib.suppress(OSError, ValueError):
        for number, line in trace.candidates(chunks()):
            collector.take(lines.events(line.decode("utf-8", "replace"), number))


def traced_libbpf(report: Callable[[str], None]) -> Path | None:
    """The directory of the traced libbpf, built if need be; None where it cannot be (``report`` says why)."""
    from kflex_repro.build import libbpf, toolchain

    runner = toolchain.Runner()
    try:
        place, _ = libbpf.traced(runner, report=report)
    except KflexError as error:
        report(f"no traced libbpf: {error}")
        return None
    except BaseException:
        runner.stop()
        raise
    return place / "lib"
