"""The remote side: runs one probe command for a toolkit elsewhere, and leaves nothing.

The command is in a session of its own. It is ended when the connection breaks (end of input, or silence),
when the agent is terminated, and, by the kernel, when the agent is killed. Results are in a directory of
ours, which goes away when they have been fetched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

import click

import kflex_repro
from kflex_repro.build.cache import file_digest
from kflex_repro.remote import frames
from kflex_repro.remote.frames import Decoder, Garbage

# What may be asked for: who allows the agent by sudo allows these, no more.
COMMANDS = ("monitor", "profile", "trace")
# Unsent output from which on the command has to wait.
_FULL = 1 << 20
_CHUNK = 1 << 16
# From the request to take all down, to the kill.
_GRACE_S = 10.0


@click.command("remote-agent", hidden=True)
def command() -> None:
    """Serve `--host` of a toolkit elsewhere, over standard input and output."""
    if sys.stdin.isatty():
        raise click.UsageError("this is what --host starts on the other side; it is not for people")
    agent = Agent(0, 1)
    try:
        sys.exit(agent.serve())
    finally:
        agent.close()


class Agent:
    """One request, from its arrival to the removal of its results."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        for fd in (source, sink):
            os.set_blocking(fd, False)
        self._decoder = Decoder()
        self._unsent = bytearray(frames.MAGIC)
        self._heard = self._spoke = time.monotonic()
        self._broken = False
        self._request: dict[str, Any] | None = None
        self._done = False
        self._work: Path | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._streams: dict[int, bytes] = {}
        self._pidfd = -1
        self._terminal: int | None = None

    def serve(self) -> int:
        """Do it. 0 if all went to the other side, 1 if that went away."""
        self._send(frames.HELLO, {"protocol": frames.PROTOCOL, "version": kflex_repro.__version__})
        while self._request is None and not self._broken:
            self._turn()
        if self._request is None:
            return 1
        try:
            self._start(self._request)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._send(frames.FAILED, {"what": f"cannot start the command: {error}"})
            self._flush()
            return 1
        code = self._watch()
        if self._broken or self._work is None:
            return 1
        try:
            self._hand_over(self._work)
            files = _manifest(self._work, self._request["outputs"])
        except OSError as error:
            self._send(frames.FAILED, {"what": f"cannot read the results: {error}"})
            self._flush()
            return 1
        self._send(frames.FINISHED, {"exit": code, "files": files})
        while not (self._done or self._broken):
            self._turn()
        if not self._done and files:
            self._linger(self._work / frames.FETCHED)
        return 0 if self._done else 1

    def close(self) -> None:
        """End the command if it runs, remove the results."""
        if self._child is not None:
            self._end()
        for fd in self._streams:
            os.close(fd)
        self._streams.clear()
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)

    # --- the connection -----------------------------------------------------------------------------------

    def _send(self, kind: bytes, payload: bytes | dict[str, Any] = b"") -> None:
        self._unsent += frames.encode(kind, payload)

    def _turn(self, also: tuple[int, ...] = ()) -> None:
        """Wait for something to happen, at most a second, and see to it; ``also``: fds that end the wait."""
        now = time.monotonic()
        if now - self._spoke >= frames.ALIVE_S:
            self._spoke = now
            self._send(frames.ALIVE)
        sources = [] if self._broken else [self._source]
        if self._broken or len(self._unsent) < _FULL:
            sources += self._streams
        sinks = [self._sink] if self._unsent and not self._broken else []
        readable, writable, _ = select.select([*sources, *also], sinks, [], 1.0)
        if writable:
            self._write()
        for fd in readable:
            if fd == self._source:
                self._listen()
            elif fd in self._streams:
                self._forward(fd)
        if time.monotonic() - self._heard > frames.SILENCE_S:
            self._broken = True

    def _write(self) -> None:
        try:
            written = os.write(self._sink, self._unsent[:_CHUNK])
        except BlockingIOError:
            return
        except OSError:
            self._broken = True
            return
        del self._unsent[:written]

    def _flush(self) -> None:
        while self._unsent and not self._broken:
            self._turn()

    def _listen(self) -> None:
        try:
            data = os.read(self._source, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._broken = True
            return
        self._heard = time.monotonic()
        try:
            for kind, payload in self._decoder.feed(data):
                self._obey(kind, payload)
        except Garbage:
            self._broken = True

    def _obey(self, kind: bytes, payload: bytes) -> None:
        if kind == frames.REQUEST and self._request is None:
            self._request = frames.decode(payload)
        elif kind == frames.INTERRUPT:
            self._signal(signal.SIGINT)
        elif kind == frames.WINDOW and self._terminal is not None:
            _resize(self._terminal, frames.decode(payload))
            self._signal(signal.SIGWINCH)
        elif kind == frames.DONE:
            self._done = True

    def _forward(self, fd: int) -> None:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal whose other side is closed says EIO
        if not data:
            del self._streams[fd]
            os.close(fd)
            if fd == self._terminal:
                self._terminal = None
        elif not self._broken:
            self._send(self._streams[fd], data)

    # --- the command --------------------------------------------------------------------------------------

    def _start(self, request: dict[str, Any]) -> None:
        arguments = [str(one) for one in request["argv"]]
        if not arguments or arguments[0] not in COMMANDS:
            raise ValueError(f"not a command for this: {' '.join(arguments[:1])}")
        self._work = Path(tempfile.mkdtemp(prefix="kflex-remote-"))
        for name in request["outputs"]:
            (self._work / _plain(name)).mkdir()
        package = Path(kflex_repro.__file__).parent
        words = [sys.executable, "-P", "-m", package.name]
        words += [one.replace(frames.WORK, str(self._work)) for one in arguments]
        if setpriv := shutil.which("setpriv"):
            words = [setpriv, "--pdeathsig", "TERM", *words]
        environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONUNBUFFERED": "1"}
        # A shell that starts us in the background would have us ignore it, and so the command.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out: int = subprocess.PIPE
        if window := request.get("window"):
            environment["TERM"] = str(window["term"])
            self._terminal, out = _terminal(window)
        try:
            self._child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                cwd=self._work,
                env=environment,
                start_new_session=True,
            )
        finally:
            if self._terminal is not None:
                os.close(out)
        self._pidfd = os.pidfd_open(self._child.pid)
        assert self._child.stderr is not None
        streams = {frames.ERR: os.dup(self._child.stderr.fileno())}
        self._child.stderr.close()
        if self._terminal is not None:
            streams[frames.OUT] = self._terminal
        else:
            assert self._child.stdout is not None
            streams[frames.OUT] = os.dup(self._child.stdout.fileno())
            self._child.stdout.close()
        for kind, fd in streams.items():
            os.set_blocking(fd, False)
            self._streams[fd] = kind
        self._send(frames.STARTED, {"pid": self._child.pid, "work": str(self._work)})

    def _watch(self) -> int:
        """The command's exit code, when all it said is on its way."""
        assert self._child is not None
        while not (self._exited() or self._broken):
            self._turn((self._pidfd,))
        if not self._broken:
            # What it left running has no one to report to; then the pipes end, too.
            self._signal(signal.SIGKILL)
            while self._streams and not self._broken:
                self._turn()
        code = self._end()
        return code if code >= 0 else 128 - code

    def _exited(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def _signal(self, number: int) -> None:
        """To all of the command's process group, as a terminal's Ctrl-C."""
        # Only while it is not reaped: later, its number can be another's.
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    def _end(self) -> int:
        """Have the command take down what it attached; kill it if it does not. Its exit code."""
        assert self._child is not None
        if self._child.returncode is not None:
            return self._child.returncode
        if not self._exited():
            # Its last words are read and dropped: a full pipe would hold it.
            self._broken = True
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_S
            while not self._exited() and time.monotonic() < deadline:
                self._turn((self._pidfd,))
        self._signal(signal.SIGKILL)
        os.close(self._pidfd)
        return self._child.wait()

    def _hand_over(self, work: Path) -> None:
        """Under sudo, results belong to root: give them to the user who logs in again to fetch them."""
        if os.geteuid() != 0 or not (user := os.environ.get("SUDO_UID", "")).isdigit():
            return
        group = os.environ.get("SUDO_GID", "")
        for path in [work, *work.rglob("*")]:
            os.chown(path, int(user), int(group) if group.isdigit() else -1, follow_symlinks=False)

    def _linger(self, mark: Path) -> None:
        """The connection broke with results unread: keep them a while, for a second connection."""
        deadline = time.monotonic() + frames.LINGER_S
        while time.monotonic() < deadline and not mark.exists():
            time.sleep(0.2)


def _plain(name: object) -> str:
    """A name that is one component of a path. ValueError if not."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"not a name: {name!r}")
    return name


def _terminal(window: dict[str, Any]) -> tuple[int, int]:
    """A terminal of that size that changes nothing in what goes through: (our side, the command's)."""
    ours, theirs = os.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    _resize(ours, window)
    return ours, theirs


def _resize(terminal: int, window: dict[str, Any]) -> None:
    size = (max(1, min(int(window[side]), 0xFFFF)) for side in ("rows", "columns"))
    with contextlib.suppress(OSError):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


def _manifest(work: Path, outputs: list[str]) -> list[dict[str, Any]]:
    """Each result: path under ``work``, size in bytes, mode, sha256."""
    paths = [path for name in outputs for path in sorted((work / name).rglob("*"))]
    return [
        {
            "path": str(path.relative_to(work)),
            "size": path.stat().st_size,
            "mode": path.stat().st_mode,
            "sha256": file_digest(path),
        }
        for path in paths
        if path.is_file() and not path.is_symlink()
    ]
