"""A redis-server of our own: started on a free port, waited for, gone afterwards with all it made."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.patience import patient
from kflex_repro.redis.resp import encode_command

# Versions whose event loop was read and found to order module events, commands and replies as the gate needs.
KNOWN_GOOD = frozenset({(7, 0)})

_ATTEMPTS = 5
_POLL_S = 0.005


def redis_binary() -> Path:
    """The redis-server program: KFLEX_REDIS_SERVER, else of the PATH; Unavailable where there is none."""
    chosen = os.environ.get("KFLEX_REDIS_SERVER")
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/bin:/usr/bin:/usr/sbin"
    found = shutil.which(chosen or "redis-server", path=path)
    if found is None:
        raise Unavailable("redis-server is not installed", chosen or "", "apt install redis-server")
    return Path(found)


@functools.cache
def _version_of(binary: Path) -> tuple[int, int, int]:
    try:
        out = subprocess.run(
            [binary, "--version"],
            capture_output=True,
            text=True,
            timeout=patient(20),
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KflexError(f"cannot run redis-server: {error}", str(binary)) from None
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", out)
    if match is None:
        raise KflexError(f"not a redis-server: {out.strip()[:80]}", str(binary))
    return int(match.group(1)), int(match.group(2)), int(match.group(3))


def redis_version() -> tuple[int, int, int]:
    """(major, minor, patch) of redis_binary()."""
    return _version_of(redis_binary())


def known_good(version: tuple[int, ...]) -> bool:
    """Whether the offload may work with this version of Redis."""
    return version[:2] in KNOWN_GOOD


def free_port() -> int:
    """A TCP port that nobody listens on at this moment (another process may take it: callers try again)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ManagedServer:
    """A redis-server process, as a context manager.

    ``args`` are appended to the command line (``["--appendonly", "yes"]``) and override ours: no RDB, no AOF,
    no daemon. ``port`` None picks a free one. ``unix`` adds a unix socket. In a ``netns`` it is reached over
    its unix socket, which does not care about network namespaces. ``dir`` is kept; without it the server
    works in a temporary directory that stop() removes. ``password`` is the default user's; the server reads
    it from a file of mode 0600. It is sent SIGTERM if the thread that started it dies.
    """

    def __init__(
        self,
        args: Sequence[str] = (),
        module: Path | None = None,
        module_args: Sequence[str] = (),
        port: int | None = None,
        unix: bool = False,
        netns: str | None = None,
        bind: str = "127.0.0.1 -::1",
        dir: Path | None = None,
        password: str | None = None,
    ) -> None:
        self.password = password
        self._args = list(args)
        self._module, self._module_args = module, list(module_args)
        self._fixed_port, self._port = port, port
        self._unix = unix or netns is not None
        self._netns, self._bind, self._dir = netns, bind, dir
        self._home: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # --- what it is ----------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The TCP port (0 if ``port=0``: no TCP at all)."""
        if self._port is None:
            raise KflexError("the redis-server was not started")
        return self._port

    @property
    def pid(self) -> int:
        """The server's process id (and its main thread's)."""
        if self._process is None:
            raise KflexError("the redis-server was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def dir(self) -> Path:
        """The server's working directory."""
        if self._home is None:
            raise KflexError("the redis-server was not started")
        return self._dir or self._home

    @property
    def unix_path(self) -> Path | None:
        """The unix socket, None without one."""
        return self._home / "redis.sock" if self._unix and self._home else None

    @property
    def log(self) -> Path:
        """What the server printed; empty log lines of an earlier start are kept. Gone after stop()."""
        if self._home is None:
            raise KflexError("the redis-server was not started")
        return self._home / "redis.log"

    @property
    def args(self) -> list[str]:
        """The command line it is started with."""
        command = [
            *(str(redis_binary()), *([str(self._secrets)] if self.password else [])),
            *("--port", str(self._port), "--bind", *self._bind.split()),
            *("--dir", str(self.dir), "--save", "", "--appendonly", "no", "--daemonize", "no"),
        ]
        if self.unix_path:
            command += ["--unixsocket", str(self.unix_path), "--unixsocketperm", "700"]
        if self._module:
            command += ["--loadmodule", str(self._module), *self._module_args]
        return [*command, *self._args]

    @property
    def _secrets(self) -> Path:
        """What must not be on a command line, as a redis.conf."""
        assert self._home is not None
        return self._home / "secret.conf"

    # --- life ----------------------------------------------------------------------------------------------

    def start(self, timeout: float | None = None) -> ManagedServer:
        """Start, and wait until PING is answered. After kill() it starts again: same port, directory, log.

        KflexError, with the server's last words, if it exits or takes longer than ``timeout`` [20] seconds.
        """
        if self.running:
            raise KflexError("the redis-server runs already", f"pid {self.pid}")
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix="kflex-redis-"))
            if self.password is not None:
                self._secrets.touch(mode=0o600)
                self._secrets.write_text(f"requirepass {_quoted(self.password)}\n")
        for attempt in range(_ATTEMPTS):
            # Only a first start may choose: clients of an earlier one know the port.
            if self._port is None or (attempt and self._fixed_port is None):
                self._port = free_port()
            self._spawn()
            try:
                self._wait_ready(patient(20.0) if timeout is None else timeout)
                return self
            except _PortTaken:
                if self._fixed_port is not None:
                    self.stop()
                    raise KflexError(f"port {self._port} is in use", "redis-server") from None
            except BaseException:
                self.stop()
                raise
        self.stop()
        raise KflexError("no free port found", "redis-server")

    def _spawn(self) -> None:
        command = self.args
        if self._netns:
            # Not `ip netns exec`: it remounts /sys, which needs more rights and fails in a chroot.
            command = ["nsenter", f"--net=/run/netns/{self._netns}", *command]
        # A killed toolkit must not leave servers; setpriv and nsenter become the server by exec, same pid.
        if setpriv := shutil.which("setpriv"):
            command = [setpriv, "--pdeathsig", "TERM", *command]
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )

    def _wait_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        pidfd = os.pidfd_open(self.pid)
        try:
            while not self._answers():
                if select.select([pidfd], [], [], _POLL_S)[0]:
                    words = self._last_words()
                    if "Address already in use" in words or "Failed listening on port" in words:
                        raise _PortTaken
                    raise KflexError(f"redis-server exited: {words}", f"port {self._port}")
                if time.monotonic() > deadline:
                    raise KflexError(
                        f"redis-server does not answer after {timeout:g} s: {self._last_words()}",
                        f"port {self._port}",
                    )
        finally:
            os.close(pidfd)

    def _answers(self) -> bool:
        try:
            with self._connect() as probe:
                probe.settimeout(patient(1))
                if self.password is not None:
                    probe.sendall(encode_command("AUTH", self.password))
                    if not probe.recv(64).startswith(b"+OK"):
                        return False
                probe.sendall(b"PING\r\n")
                reply = probe.recv(64)
                if reply.startswith(b"+PONG"):
                    return self._is_ours(probe)
        except OSError:
            return False
        # A password that we do not know also means that it is up; -LOADING does not.
        return reply.startswith(b"-NOAUTH")

    def _is_ours(self, probe: socket.socket) -> bool:
        """Whether the answer comes from our process: ours may be about to find its port taken."""
        probe.sendall(b"INFO server\r\n")
        reply = b""
        while part := probe.recv(1 << 16):
            reply += part
            if match := re.search(rb"process_id:(\d+)\r", reply):
                return int(match.group(1)) == self.pid
        return False

    def _connect(self) -> socket.socket:
        if self.unix_path:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.unix_path))
            except OSError:
                connection.close()
                raise
            return connection
        # The server binds to what it was told: ask where it listens, not always on 127.0.0.1.
        return socket.create_connection((self._host(), self.port), timeout=patient(1))

    def _host(self) -> str:
        first = self._bind.split()[0].lstrip("-")
        return {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "::*": "::1"}.get(first, first)

    def _last_words(self, count: int = 3) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        # Its banner is drawn with characters: only lines with a time stamp or a complaint say something.
        said = [line.strip() for line in lines if re.match(r"\d+:[A-Z] |\*\*\*|>>>|.*[Ee]rror|'", line)]
        return " | ".join((said or [line.strip() for line in lines])[-count:])

    def client(self, **kw: Any) -> redis.Redis:
        """A redis-py client: bytes in and out, nothing sent twice; over the unix socket in a netns.

        It logs in as the default user if there is a password, and no ``username`` or ``password`` is given.
        """
        if "username" not in kw:
            kw.setdefault("password", self.password)
        kw.setdefault("retry", Retry(NoBackoff(), 0))
        kw.setdefault("socket_timeout", patient(30))
        kw.setdefault("decode_responses", False)
        if self._netns:
            return redis.Redis(unix_socket_path=str(self.unix_path), **kw)
        return redis.Redis(host=self._host(), port=self.port, **kw)

    def kill(self) -> None:
        """SIGKILL and reap; the directory stays, for a start() that has to find what a crash leaves."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()

    def stop(self, timeout: float | None = None) -> None:
        """SIGTERM, after ``timeout`` [10] seconds SIGKILL; then remove what was temporary. No error twice."""
        if self._process is not None and self._process.poll() is None:
            # A stopped (SIGSTOP) server would sit on its SIGTERM.
            for signum in (signal.SIGTERM, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signum)
            try:
                self._process.wait(patient(10.0) if timeout is None else timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def __enter__(self) -> ManagedServer:
        return self if self.running else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _quoted(text: str) -> str:
    """A word for redis.conf, whatever is in it (sdssplitargs)."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


class _PortTaken(Exception):
    """Somebody took the port between our look and the server's bind."""
