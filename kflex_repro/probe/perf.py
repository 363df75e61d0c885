"""CPU samples with stacks by perf: recorded to a file that goes away, read as a stream, collapsed."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import toolchain
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.probe import stacks
from kflex_repro.probe.process import Process

# Bytes of stack that perf copies with each sample, to unwind code without frame pointers (distributions').
_STACK_BYTES = 8192
_START_S = 60.0
_FIELDS = "comm,pid,tid,time,event,ip,sym,dso"
# Symbols and file names may both hold brackets; a file's name begins in one of these ways.
_FRAME = re.compile(r"^\s+([0-9a-f]+) (.*?) \((?=[/\[]|bpf_|memfd:|anon_inode|inlined)(.*)\)$")
_HEADER = re.compile(r"^(\S.*?)\s+(-?\d+)/(-?\d+)\s")
_BPF_SYMBOL = re.compile(r"^bpf_prog_[0-9a-f]{16}_?(.*)$")


def hardware_clock() -> bool:
    """Whether perf can sample CPU cycles here: virtual machines often have no counters."""
    command = [toolchain.perf().path, "stat", "-x,", "-e", "cycles", "--", "true"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode == 0 and "<not" not in done.stderr


@dataclass(frozen=True)
class Request:
    """What to record: ``processes`` empty is the whole machine; ``unwind`` is ``dwarf`` or ``fp``."""

    processes: tuple[Process, ...]
    freq: int
    unwind: str = "dwarf"
    event: str = "cpu-clock"

    def command(self, out: Path, control: str) -> list[str]:
        """perf's command line: it waits to be switched on by the pipes of ``control``."""
        graph = f"dwarf,{_STACK_BYTES}" if self.unwind == "dwarf" else "fp"
        whom = ["-p", ",".join(str(one.pid) for one in self.processes)] if self.processes else ["-a"]
        options = ["-F", str(self.freq), "-e", self.event, "--call-graph", graph, *whom]
        return [toolchain.perf().path, "record", *options, "-D", "-1", "--control", control, "-o", str(out)]


class Recording:
    """perf record, from its first sample (after ``start()``) to ``stop()``, as a context manager."""

    def __init__(self, request: Request, out: Path) -> None:
        self._request, self._out = request, out
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: list[int] = []

    def start(self) -> Recording:
        """Start perf and wait until it samples; KflexError, in perf's words, if it does not."""
        # Both stay open: perf ends with an error when the other end of its control is gone.
        ours, theirs = os.pipe(), os.pipe()
        self._pipes = [ours[1], theirs[0]]
        try:
            command = self._request.command(self._out, f"fd:{ours[0]},{theirs[1]}")
            # It must not outlive us, and Ctrl-C is for us alone to hear.
            if setpriv := shutil.which("setpriv"):
                command = [setpriv, "--pdeathsig", "INT", *command]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(ours[0], theirs[1]),
                start_new_session=True,
            )
            os.write(ours[1], b"enable\n")
            self._await(theirs[0])
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(ours[0])
            os.close(theirs[1])
        return self

    def _await(self, answer: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while not select.select([answer], [], [], 0.02)[0]:
            if self._process.poll() is not None:
                raise self._failure()
            if time.monotonic() > deadline:
                raise KflexError(f"perf record did not start within {_START_S:.0f} s")

    def _failure(self) -> KflexError:
        """Why it ended, in its words."""
        assert self._process is not None and self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").splitlines()
        words = " ".join(line.strip() for line in lines if not line.startswith("[ perf record:"))
        code = self._process.returncode
        if "No permission" in words or "Permission denied" in words or "not permitted" in words:
            return Unavailable("perf may not sample", words[:200], "run as root")
        if "No space left" in words:
            return KflexError("no space for perf's samples", str(self._out.parent), "choose another --out")
        return KflexError(f"perf record failed: {words[:300] or f'exit code {code}'}")

    @property
    def running(self) -> bool:
        """Whether perf still records (it ends with the process)."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the recording and wait until the file is whole."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise KflexError("perf record does not end") from None
        if code not in (0, -signal.SIGINT) or not self._out.exists():
            raise self._failure()

    def kill(self) -> None:
        """End perf at once, whatever it wrote."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process is not None and self._process.stderr is not None:
            self._process.stderr.close()
        while self._pipes:
            os.close(self._pipes.pop())

    def __enter__(self) -> Recording:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


# --- reading ----------------------------------------------------------------------------------------------


def _frame(symbol: str, place: str) -> str:
    if match := _BPF_SYMBOL.match(symbol):
        # The kernel's own BPF programs (a dispatcher, a trampoline) have no name behind the tag.
        return stacks.clean(match.group(1) or symbol) + stacks.BPF
    kernel = place.startswith("[") and place not in ("[vdso]", "[unknown]", "[heap]", "[stack]", "[anon]")
    if symbol == "[unknown]":
        name = place.strip("[]").rpartition("/")[2] or "unknown"
        return f"[{stacks.clean(name)}]" + (stacks.KERNEL if kernel else "")
    # Versions of symbols say nothing about where time goes.
    return stacks.clean(symbol.partition("@@")[0]) + (stacks.KERNEL if kernel else "")


def collapse(lines: Iterable[str]) -> Iterator[stacks.Stack]:
    """The stack of each sample in perf script's output, root first, as the lines come."""
    root: str | None = None
    frames: list[str] = []
    for line in lines:
        if match := _FRAME.match(line):
            frames.append(_frame(match.group(2), match.group(3)))
        elif match := _HEADER.match(line):
            if root is not None:
                yield _stack(root, frames)
            root, frames = stacks.clean(match.group(1)), []
    if root is not None:
        yield _stack(root, frames)


def _stack(root: str, frames: list[str]) -> stacks.Stack:
    found = [root]
    for frame in reversed(frames):
        # Runs of code without a symbol say no more than one of them.
        if not (frame.startswith("[") and frame == found[-1]):
            found.append(frame)
    return tuple(found)


def read(data: Path) -> dict[stacks.Stack, int]:
    """Samples of each stack in a recording, streamed through ``perf script``; KflexError if it fails."""
    # Inlined functions need debug symbols and addr2line for each address: minutes, for names of the compiler.
    command = [toolchain.perf().path, "script", "-i", str(data), "--no-inline", "-F", _FIELDS]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        try:
            assert process.stdout is not None
            found = Counter(collapse(line.decode(errors="replace") for line in process.stdout))
            code = process.wait()
        finally:
            process.kill()
            process.communicate()
        if code != 0:
            log.seek(0)
            words = " ".join(log.read().decode(errors="replace").split())
            raise KflexError(f"perf script failed: {words[-300:] or f'exit code {code}'}", str(data))
    return dict(found)
