"""What the Redis tests say in plain verbs: start a server with or without the offload, talk to it byte by
byte, wait for a condition, and compare the system before and after.

``KFLEX_TEST_SHARED=1`` leaves BPF objects, cgroups and network namespaces out of the comparison: for a
machine where others attach things at the same time.

``KFLEX_TEST_SERVER=plain`` runs every test that asks for the offloaded server against a plain redis-server
instead: the expectations on replies must hold there too, only those on what the kernel served are left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kflex_repro.patience import patient
from kflex_repro.redis.resp import Decoder, ErrorReply, Reply, encode_command, encode_pipeline
from tests.conftest import require

PLAIN_ONLY = os.environ.get("KFLEX_TEST_SERVER") == "plain"
SHARED = os.environ.get("KFLEX_TEST_SHARED") == "1"
REPLY_TIMEOUT = 10.0
# What a service manager makes and drops by itself.
FOREIGN_PROGRAMS = frozenset({"cgroup_device", "cgroup_skb", "cgroup_sysctl", "lsm"})
FOREIGN_CGROUPS = re.compile(r"/(init\.scope|[^/]*\.(slice|service|scope))(/|$)")


class Timeout(AssertionError):
    """A condition did not become true in its time, or a reply did not come."""


def eventually(
    condition: Callable[[], Any], timeout: float = 5.0, what: str = "", every: float = 0.002
) -> Any:
    """The first true value of condition(), polled until ``timeout`` seconds have gone (more where the CPU is
    emulated); else Timeout."""
    timeout = patient(timeout)
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            shown = what or getattr(condition, "__name__", "the condition")
            raise Timeout(f"not within {timeout} s: {shown}; last seen: {value!r}")
        time.sleep(every)


# -- connections --


class Conn:
    """A raw connection: what is written is what is sent, in exactly these send() calls.

    ``proto`` 3 says HELLO 3 first. Replies come decoded (``read``), or as bytes (``read_bytes``).
    """

    def __init__(
        self,
        port: int,
        host: str = "127.0.0.1",
        *,
        proto: int = 2,
        timeout: float = REPLY_TIMEOUT,
        hello: bool = True,
    ) -> None:
        self.sock = socket.create_connection((host, port), timeout=patient(timeout))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.decoder = Decoder()
        self.raw = b""
        if proto == 3 and hello:
            reply = self.do("HELLO", "3")
            assert not isinstance(reply, ErrorReply), reply

    def send_bytes(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send(self, *args: bytes | str | int) -> None:
        self.sock.sendall(encode_command(*args))

    def read(self) -> Reply:
        """The next reply; Timeout when none comes, ConnectionError when the server has closed."""
        while True:
            reply = self.decoder.pop()
            if reply is not Decoder.INCOMPLETE:
                return reply
            try:
                data = self.sock.recv(1 << 16)
            except TimeoutError:
                raise Timeout(f"no reply; {self.decoder.pending} bytes of one have come") from None
            if not data:
                raise ConnectionError("closed by the server")
            self.decoder.feed(data)

    def read_bytes(self, count: int) -> bytes:
        """Exactly so many bytes."""
        out = b""
        while len(out) < count:
            data = self.sock.recv(count - len(out))
            if not data:
                raise ConnectionError(f"closed by the server after {out!r}")
            out += data
        return out

    def do(self, *args: bytes | str | int) -> Reply:
        """One command and its reply."""
        self.send(*args)
        return self.read()

    def pipeline(self, *commands: Sequence[bytes | str | int]) -> list[Reply]:
        """Several commands in one send(), and their replies."""
        self.sock.sendall(encode_pipeline(commands))
        return [self.read() for _ in commands]

    def split(self, data: bytes, *at: int) -> None:
        """The bytes in several send() calls, cut at these offsets."""
        cuts = [0, *at, len(data)]
        for start, end in itertools.pairwise(cuts):
            if end > start:
                self.sock.send(data[start:end])

    def quiet(self, seconds: float = 0.0) -> bool:
        """Whether nothing is there to read within so many seconds."""
        return not self.decoder.pending and not select.select([self.sock], [], [], seconds)[0]

    def closed(self, timeout: float = 5.0) -> bool:
        """Whether the server closes the connection in time, with nothing more to read."""
        self.sock.settimeout(patient(timeout))
        try:
            return self.sock.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    def unread(self) -> int:
        """Bytes in the receive queue (FIONREAD: replies injected by the kernel programs are not in it)."""
        return int(struct.unpack("i", fcntl.ioctl(self.sock, termios.FIONREAD, b"\0\0\0\0"))[0])

    def local_port(self) -> int:
        return int(self.sock.getsockname()[1])

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def __enter__(self) -> Conn:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- the server under test --


@dataclass
class Sut:
    """The server under test: a redis-server, and the offload's session if it has one."""

    server: Any
    session: Any = None
    connections: list[Conn] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.server.port)

    @property
    def offloaded(self) -> bool:
        return self.session is not None

    def connect(self, host: str = "127.0.0.1", **kw: Any) -> Conn:
        conn = Conn(self.port, host, **kw)
        self.connections.append(conn)
        return conn

    def hang_up(self) -> None:
        """Close every connection made by ``connect``."""
        for conn in self.connections:
            conn.close()
        self.connections.clear()

    def stats(self) -> dict[str, int]:
        """The session's counters; of a plain server everything reads as 0."""
        return dict(self.session.stats()) if self.session is not None else _Zeros()

    def served(self) -> int:
        stats = self.stats()
        return stats["served_get"] + stats["served_set"]

    def info(self) -> dict[str, str]:
        """INFO kflex, without the module's prefix; empty on a plain server."""
        with Conn(self.port) as conn:
            if self.server.password is not None:
                assert conn.do("AUTH", self.server.password) == b"OK"
            text = conn.do("INFO", "kflex")
        assert isinstance(text, bytes)
        pairs = (line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
        return {name.removeprefix("kflex_"): value for name, value in pairs}

    def broken_promises(self) -> dict[str, int]:
        """The module's own counters of things that must never happen, where they are not 0."""
        info = self.info()
        return {name: int(info[name]) for name in ("open_commands", "refused") if int(info.get(name, 0))}

    def warm(self, conn: Conn, *keys: bytes | str) -> None:
        """Makes the connection eligible (its first request is answered) and each key, if it exists,
        resident."""
        assert conn.do("PING") in (b"PONG", [b"pong", b""])
        if not self.offloaded:
            return
        for key in keys:
            eventually(lambda key=key: self.serves_get(conn, key), what=f"{key!r} resident", timeout=5.0)

    def serves_get(self, conn: Conn, key: bytes | str) -> bool:
        """Whether a GET of the key is answered in the kernel now (one attempt; on a quiet server)."""
        return self.serves(conn, ("GET", key))

    def serves_set(self, conn: Conn, key: bytes | str, value: bytes | str) -> bool:
        return self.serves(conn, ("SET", key, value))

    def must_serve(self, conn: Conn, *commands: Sequence[bytes | str | int], timeout: float = 5.0) -> None:
        """This message is served in the kernel, now or soon (the gate may be closed for a moment). On a plain
        server it is only sent."""
        if not self.offloaded:
            conn.pipeline(*commands)
            return
        eventually(lambda: self.serves(conn, *commands), timeout, what=f"{commands} served in the kernel")

    def serves(self, conn: Conn, *commands: Sequence[bytes | str | int]) -> bool:
        """Whether this one message is served in the kernel (on a quiet server); its replies are thrown
        away."""
        before = self.served()
        conn.pipeline(*commands)
        return self.served() - before == len(commands)


class _Zeros(dict[str, int]):
    def __missing__(self, name: str) -> int:
        return 0


BASE_ARGS = ("--enable-debug-command", "yes", "--databases", "2", "--repl-diskless-sync-delay", "0")


def _managed(args: Iterable[str], module: Path | None, **kw: Any) -> Any:
    from kflex_repro.redis.server import ManagedServer

    return ManagedServer([*BASE_ARGS, *args], module=module, **kw)


@contextlib.contextmanager
def plain_server(args: Iterable[str] = (), **kw: Any) -> Iterator[Sut]:
    """A redis-server alone."""
    with _managed(args, None, **kw) as server:
        sut = Sut(server)
        try:
            yield sut
        finally:
            sut.hang_up()


@contextlib.contextmanager
def offloaded_server(
    args: Iterable[str] = (),
    *,
    defines: Mapping[str, str] | None = None,
    table_bytes: int | None = 64 << 20,
    **kw: Any,
) -> Iterator[Sut]:
    """A redis-server with the module, and the offload started on it (of a build with these defines)."""
    if PLAIN_ONLY:
        if defines:
            import pytest

            pytest.skip("a plain server has no broken build")
        with plain_server(args, **kw) as sut:
            yield sut
        return
    need_offload()
    from kflex_repro import build
    from kflex_repro.offload import attach
    from kflex_repro.offload.target import Login

    built = build.ensure(defines=dict(defines or {}))
    with _managed(args, built.module, **kw) as server:
        login = None if server.password is None else Login(password=server.password)
        session = attach.start(server.port, table_bytes=table_bytes, built=built, login=login)
        sut = Sut(server, session)
        try:
            yield sut
        finally:
            sut.hang_up()
            session.stop()


def need_offload() -> None:
    """Skips, or fails under KFLEX_REQUIRE_BPF=1, where the offload cannot run."""
    require("root")
    for feature in ("sockops", "sk_msg", "tp_btf", "cgroup2"):
        with contextlib.suppress(KeyError):
            require(feature)


# -- the system, before and after --


def _bpftool(*what: str) -> list[dict[str, Any]]:
    if not have("bpftool"):
        return []
    run = subprocess.run(["bpftool", "-j", *what, "show"], capture_output=True, check=False)
    if run.returncode or not run.stdout.strip():
        return []
    found = json.loads(run.stdout)
    return found if isinstance(found, list) else []


def _mounts(kind: str) -> list[Path]:
    lines = Path("/proc/mounts").read_text().splitlines()
    return [Path(line.split()[1]) for line in lines if line.split()[2] == kind]


def _tree(root: Path, dirs_only: bool = False) -> set[str]:
    out: set[str] = set()
    for path, dirs, files in os.walk(root):
        out.update(str(Path(path, name)) for name in (dirs if dirs_only else [*dirs, *files]))
    return out


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def children(of: int) -> set[int]:
    """Every living process below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = _parent(int(entry.name))
    found: set[int] = set()
    grew = {of}
    while grew:
        grew = {pid for pid, parent in parents.items() if parent in grew} - found
        found |= grew
    return found


def _processes() -> set[str]:
    out = set()
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if command and not command.startswith("bpftool "):
                out.add(f"{pid} {command.strip()}")
    return out


@dataclass(frozen=True)
class Snapshot:
    """Everything on the machine that the offload could leave behind."""

    programs: frozenset[str]
    maps: frozenset[str]
    links: frozenset[str]
    bpffs: frozenset[str]
    cgroups: frozenset[str]
    netns: frozenset[str]
    processes: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        def named(kind: str) -> frozenset[str]:
            return frozenset(
                f"{each['id']} {each.get('type')} {each.get('name', '')}"
                for each in _bpftool(kind)
                if each.get("type") not in FOREIGN_PROGRAMS
            )

        processes = frozenset(_processes())
        if SHARED:
            nothing: frozenset[str] = frozenset()
            return cls(nothing, nothing, nothing, nothing, nothing, nothing, processes)
        netns = Path("/var/run/netns")
        return cls(
            programs=named("prog"),
            maps=named("map"),
            links=named("link"),
            bpffs=frozenset().union(*(_tree(mount) for mount in _mounts("bpf"))),
            cgroups=frozenset(
                path
                for mount in _mounts("cgroup2")
                for path in _tree(mount, dirs_only=True)
                if not FOREIGN_CGROUPS.search(path)
            ),
            netns=frozenset(each.name for each in netns.iterdir()) if netns.is_dir() else frozenset(),
            processes=processes,
        )

    def difference(self, later: Snapshot) -> dict[str, dict[str, list[str]]]:
        """What appeared and what went, by kind; empty when the two are the same.

        Kernel objects that went are not counted: those of an earlier probe are freed a moment after it.
        """
        out = {}
        for name in self.__dataclass_fields__:
            old, new = getattr(self, name), getattr(later, name)
            if name in ("programs", "maps", "links", "processes"):
                old = old & new
            if old != new:
                out[name] = {"new": sorted(new - old), "gone": sorted(old - new)}
        return out

    def must_return(self, timeout: float = 10.0) -> None:
        """Waits until the system is as it was here (the kernel frees maps and programs a moment after their
        last user has gone); AssertionError with the difference if it does not become so."""
        deadline = time.monotonic() + patient(timeout)
        while True:
            left = self.difference(Snapshot.take())
            if not left:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"left behind: {json.dumps(left, indent=1)}")
            time.sleep(0.05)


# -- processes of our own --


def cli(*args: str, timeout: float = 60.0, **kw: Any) -> subprocess.CompletedProcess[str]:
    """`kflex-repro ARGS`, in a process of its own."""
    import sys

    return subprocess.run(
        [sys.executable, "-m", "kflex_repro", *args],
        capture_output=True,
        text=True,
        timeout=patient(timeout),
        check=False,
        cwd=Path(__file__).resolve().parents[2],
        **kw,
    )


def kill(pid: int) -> None:
    """kill -9 of one process of ours, by its id."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def have(program: str) -> bool:
    return shutil.which(program) is not None


def rng(*seed: object) -> random.Random:
    """A random generator that depends on these values only."""
    return random.Random("/".join(map(str, seed)))
