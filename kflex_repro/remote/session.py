"""One run of a probe command on a host: started, listened to, interrupted, its results fetched."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import paramiko

from kflex_repro import __version__
from kflex_repro.errors import KflexError
from kflex_repro.remote import frames
from kflex_repro.remote.frames import Garbage
from kflex_repro.remote.ssh import TRIES, Link

_CHUNK = 1 << 16
_LOST = (OSError, EOFError, paramiko.SSHException, paramiko.SFTPError)

# Where the toolkit is looked for, without --remote-command.
_PLACES = ("kflex-repro", "$HOME/kflex-repro/.venv/bin/kflex-repro", "/opt/kflex-repro/.venv/bin/kflex-repro")
_MISSING = "kflex-remote: no toolkit"
_NO_SUDO = "kflex-remote: no sudo"


class _Output(Exception):
    """What the command said cannot be printed here: not the connection's fault."""

    def __init__(self, why: OSError) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class Request:
    """What to run there. ``outputs``: a name in ``frames.WORK`` there -> the file or directory here."""

    argv: tuple[str, ...]
    outputs: Mapping[str, Path]
    window: Mapping[str, object] | None = None
    remote_command: str | None = None
    sudo: bool | None = None


@dataclass
class Session:
    """``run`` does all of it in one thread; ``interrupt`` and ``resize`` may be called from another."""

    link: Link
    request: Request
    out: Callable[[bytes], None]
    err: Callable[[bytes], None]
    state: Callable[[str], None] = lambda _: None
    pid: int | None = None
    work: str = ""
    started: threading.Event = field(default_factory=threading.Event)
    _channel: paramiko.Channel | None = None
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        """The command's exit code, its results here and verified. KflexError if there cannot be any."""
        try:
            finished = self._run()
            try:
                self._fetch(finished.get("files", []))
            finally:
                self.drop()
        finally:
            self._ended.set()
        self.state("done")
        return int(finished["exit"])

    def _run(self) -> dict[str, Any]:
        began = time.monotonic()
        self.state("starting")
        try:
            transport = self.link.client.get_transport()
            assert transport is not None
            self._channel = transport.open_session(timeout=self.link.target.connect_s)
            self._channel.settimeout(1.0)
            self._channel.exec_command(_command_line(self.request.remote_command, self.request.sudo))
            self._send(
                frames.REQUEST,
                {
                    "argv": list(self.request.argv),
                    "outputs": list(self.request.outputs),
                    "window": dict(self.request.window) if self.request.window else None,
                },
            )
            threading.Thread(target=self._beat, daemon=True).start()
            return self._listen()
        except _Output as stop:
            raise stop.why from None
        except (*_LOST, Garbage) as error:
            raise KflexError(
                f"the connection broke after {time.monotonic() - began:.1f} s ({str(error) or 'closed'})",
                self.link.target.name,
                "the command there is being ended, what it measured is lost: run it again",
            ) from None

    def _beat(self) -> None:
        """Tell the agent that we are there, also while what it says waits for its reader here."""
        while not self._ended.wait(frames.ALIVE_S):
            with contextlib.suppress(*_LOST):
                self._send(frames.ALIVE)

    def interrupt(self) -> None:
        """As Ctrl-C there: the measurement ends, and its result comes."""
        with contextlib.suppress(*_LOST):
            self._send(frames.INTERRUPT)

    def drop(self) -> None:
        """The results there are not wanted any more."""
        with contextlib.suppress(*_LOST):
            self._send(frames.DONE)

    def resize(self, window: Mapping[str, object]) -> None:
        """The terminal here has another size now."""
        with contextlib.suppress(*_LOST):
            self._send(frames.WINDOW, dict(window))

    def _send(self, kind: bytes, payload: bytes | dict[str, Any] = b"") -> None:
        with self._sending:
            if self._channel is not None:
                self._channel.sendall(frames.encode(kind, payload))

    # --- listening ----------------------------------------------------------------------------------------

    def _listen(self) -> dict[str, Any]:
        """What the agent says, until it has finished."""
        channel = self._channel
        assert channel is not None
        decoder: frames.Decoder | None = None
        before = bytearray()
        complaint = bytearray()
        heard = time.monotonic()
        while True:
            while channel.recv_stderr_ready() and len(complaint) < _CHUNK:
                complaint += channel.recv_stderr(_CHUNK)
            try:
                data = channel.recv(_CHUNK)
            except TimeoutError:
                if time.monotonic() - heard > frames.SILENCE_S:
                    raise OSError(f"nothing heard for {frames.SILENCE_S:.0f} s") from None
                continue
            heard = time.monotonic()
            if not data:
                break
            if decoder is None:
                before += data
                _, magic, rest = bytes(before).partition(frames.MAGIC)
                if not magic:
                    continue
                decoder, data = frames.Decoder(), rest
            for kind, payload in decoder.feed(data):
                if kind == frames.FINISHED:
                    return frames.decode(payload)
                self._hear(kind, payload)
            # Again: to print can have taken any time.
            heard = time.monotonic()
        if decoder is not None:
            raise EOFError("closed")
        while channel.recv_stderr_ready():
            complaint += channel.recv_stderr(_CHUNK)
        # It comes after the end of the output; a connection that broke has none.
        channel.status_event.wait(self.link.target.connect_s)
        code = channel.exit_status
        if code == -1 and not complaint:
            raise EOFError("closed")
        raise _not_started(self.link.target.name, code, complaint.decode(errors="replace"), self.request)

    def _hear(self, kind: bytes, payload: bytes) -> None:
        if kind in (frames.OUT, frames.ERR):
            try:
                (self.out if kind == frames.OUT else self.err)(payload)
            except OSError as error:
                raise _Output(error) from None
        elif kind == frames.HELLO:
            hello = frames.decode(payload)
            if hello.get("protocol") != frames.PROTOCOL or hello.get("version") != __version__:
                raise _other_version(self.link.target.name, str(hello.get("version")))
        elif kind == frames.STARTED:
            started = frames.decode(payload)
            self.pid, self.work = int(started["pid"]), str(started["work"])
            self.state("running")
            self.started.set()
        elif kind == frames.FAILED:
            what = str(frames.decode(payload).get("what"))
            raise KflexError(what, self.link.target.name, "see that host's disk and rights")

    # --- results ------------------------------------------------------------------------------------------

    def _fetch(self, files: list[dict[str, Any]]) -> None:
        """All results, verified; over a new connection if this one breaks."""
        wanted = [(str(one["path"]), int(one["size"]), str(one["sha256"]), int(one["mode"])) for one in files]
        places = [_place(path, self.request.outputs, self.link.target.name) for path, *_ in wanted]
        broken = 0
        at = 0
        while at < len(wanted):
            path, size, digest, mode = wanted[at]
            self.state(f"fetching {places[at].name}")
            try:
                with self.link.client.open_sftp() as sftp:
                    _fetch_one(sftp, f"{self.work}/{path}", places[at], size, digest, mode)
                at += 1
            except _LOST as error:
                broken += 1
                if isinstance(error, FileNotFoundError) or broken >= TRIES:
                    raise KflexError(
                        f"the results cannot be fetched: {error or 'the connection broke'}",
                        f"{self.link.target.name}:{self.work}/{path}",
                        "does sshd there have the sftp subsystem? if so, run it again",
                    ) from None
                self._channel = None
                self.link.again()
        # All is here. If this fails, the agent removes what is there by itself, later.
        with contextlib.suppress(*_LOST):
            if broken:
                with self.link.client.open_sftp() as sftp:
                    sftp.open(f"{self.work}/{frames.FETCHED}", "w").close()
            else:
                self._send(frames.DONE)
                self._until_closed()

    def _until_closed(self) -> None:
        """Until the agent has removed its directory and is gone; not for ever."""
        channel = self._channel
        deadline = time.monotonic() + frames.SILENCE_S
        while channel is not None and time.monotonic() < deadline:
            try:
                if not channel.recv(_CHUNK):
                    return
            except TimeoutError:
                continue


def _place(path: str, outputs: Mapping[str, Path], host: str) -> Path:
    """Where a result goes. What the other side says is checked: nothing leaves the places asked for."""
    parts = PurePosixPath(path).parts
    if len(parts) < 2 or parts[0] not in outputs or any(one in ("..", "/") or "\0" in one for one in parts):
        raise KflexError(
            f"a result that nobody asked for: {path!r}", host, "is that host's toolkit to be trusted?"
        )
    # The first two parts are the option and the name it was given there.
    return outputs[parts[0]].joinpath(*parts[2:])


def _fetch_one(sftp: paramiko.SFTPClient, path: str, place: Path, size: int, digest: str, mode: int) -> None:
    """``path`` there as ``place`` here, whole or not at all; damaged: once more, then KflexError."""
    channel = sftp.get_channel()
    assert channel is not None
    channel.settimeout(frames.SILENCE_S)
    for left in (1, 0):
        with _Written(place) as file:
            got, found = _copy(sftp, path, file, size)
            if (got, found) == (size, digest):
                file.keep(mode)
                return
        if not left:
            raise KflexError(
                f"the result arrived damaged, twice: {got} bytes, sha256 {found[:12]}…; "
                f"it is {size} bytes, {digest[:12]}… there",
                str(place),
                "run it again; if it stays so, look at that host's memory and disk",
            )


class _Written:
    """A file that takes its place only when it is known to be right."""

    def __init__(self, place: Path) -> None:
        self.place = place
        with self._explained():
            place.parent.mkdir(parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        self._file, self._temporary = os.fdopen(fd, "wb"), Path(name)

    def write(self, data: bytes) -> None:
        """Append."""
        with self._explained():
            self._file.write(data)

    def keep(self, mode: int) -> None:
        """Now it is the file, as readable and writable as it is there."""
        with self._explained():
            os.fchmod(self._file.fileno(), 0o600 | mode & 0o066)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._temporary.replace(self.place)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        # Errors of this disk must not look like the connection's.
        try:
            yield
        except OSError as error:
            what = f"cannot write {self.place.name}: {error.strerror}"
            raise KflexError(
                what, str(self.place.parent), "free some space, or choose another place"
            ) from None


def _copy(sftp: paramiko.SFTPClient, path: str, file: _Written, size: int) -> tuple[int, str]:
    total, got = hashlib.sha256(), 0
    with sftp.open(path, "rb") as source:
        source.prefetch(size)
        while data := source.read(_CHUNK):
            total.update(data)
            got += len(data)
            file.write(data)
    return got, total.hexdigest()


# --- the other side's shell -------------------------------------------------------------------------------


def _command_line(command: str | None, sudo: bool | None) -> str:
    """The line for the login shell there: finds the toolkit, runs its agent (sudo -n: as root)."""
    words = shlex.split(command) if command else []
    places = shlex.quote(words[0]) if words else " ".join(f'"{one}"' for one in _PLACES)
    rest = " ".join(map(shlex.quote, words[1:]))
    wanted = {True: "true", False: "false", None: '[ "$(id -u)" != 0 ]'}[sudo]
    script = (
        f'for c in {places}; do p=$(command -v "$c" 2>/dev/null) && break; done; '
        f'[ -n "$p" ] || {{ echo "{_MISSING}" >&2; exit 127; }}; '
        f"if {wanted}; then "
        f'command -v sudo >/dev/null 2>&1 || {{ echo "{_NO_SUDO}" >&2; exit 127; }}; '
        f'exec sudo -n -- "$p" {rest} remote-agent; '
        f'else exec "$p" {rest} remote-agent; fi'
    )
    return f"sh -c {shlex.quote(script)}"


def _other_version(host: str, version: str) -> KflexError:
    return KflexError(
        f"the toolkit there is another version: {version}, here {__version__}",
        host,
        "install the same on both",
    )


def _not_started(host: str, code: int, said: str, request: Request) -> KflexError:
    """Why the agent did not come up, from what the shell, sudo or an old toolkit said."""
    last = " ".join(said.split())[-300:]
    if _MISSING in said or code == 127:
        if _NO_SUDO in said:
            return KflexError(
                "root is needed, and there is no sudo there", host, "log in as root, or --no-sudo"
            )
        where = request.remote_command or "on its PATH, in ~/kflex-repro and /opt/kflex-repro"
        return KflexError(
            f"kflex-repro is not there ({where})",
            host,
            "install it there (a clone, then make setup), or say where: --remote-command PATH",
        )
    if ("sudo:" in said and "password" in said) or "not in the sudoers" in said or "not allowed to" in said:
        return KflexError(
            f"sudo there does not let us in without a password: {last}",
            host,
            "allow it for `kflex-repro remote-agent` in sudoers (NOPASSWD), log in as root, or use --no-sudo",
        )
    if "No such command" in said:
        return _other_version(host, "one without remote-agent")
    return KflexError(
        f"the toolkit there does not start (exit code {code}): {last}", host, "try it there by hand"
    )
