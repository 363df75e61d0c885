"""Which redis-servers to watch: by port, by pid, or all that run here. Nothing is asked of them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.offload import netns
from kflex_repro.patience import patient
from kflex_repro.probe import process

# The name of the program, or what it calls itself; Debian's redis-server is a link to redis-check-rdb.
_NAMES = frozenset({"redis-server", "redis-check-rdb", "redis-sentinel", "valkey-server", "keydb-server"})
_ASK_S = 2.0


@dataclass(frozen=True)
class Server:
    """A process that listens on ``port`` in the network namespace ``netns`` (its inode number)."""

    port: int
    pid: int
    netns: int
    name: str
    unix: bool = False

    @property
    def label(self) -> str:
        """``redis-server :6379 (pid 812)``."""
        return f"{self.name} :{self.port} (pid {self.pid})"


def _unix_listening(pid: int) -> set[str]:
    """Inodes of the unix sockets with a path that listen in its network namespace."""
    with contextlib.suppress(OSError):
        rows = [
            line.split() for line in Path(f"/proc/{pid}/net/unix").read_text(errors="replace").splitlines()
        ]
        # __SO_ACCEPTCON
        return {row[6] for row in rows[1:] if len(row) > 7 and int(row[3], 16) & 0x10000}
    return set()


def _name(pid: int) -> str:
    comm = Path(f"/proc/{pid}/comm").read_text().strip()
    if comm in _NAMES:
        return comm
    with contextlib.suppress(OSError):
        program = Path(f"/proc/{pid}/exe").readlink().name
        if program in _NAMES:
            return "redis-server" if program == "redis-check-rdb" else program
    return comm


def _ports(pid: int) -> list[int]:
    """What the process itself listens on, lowest first."""
    mine = process.sockets(pid)
    return sorted({port for inode, port in process.listening(pid).items() if inode in mine})


def _speaks_redis(port: int, where: netns.Namespace) -> bool:
    """Whether the answer to a PING is Redis's: only asked where the process has another name than we know."""

    def ask() -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=patient(_ASK_S)) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(64)

    try:
        answer = netns.call(where, ask)
    except OSError:
        return False
    return answer.startswith((b"+PONG", b"-NOAUTH", b"-LOADING", b"-BUSY", b"-DENIED", b"-MASTERDOWN"))


def _server(pid: int, port: int) -> Server:
    name = _name(pid)
    where = netns.of(pid)
    if name not in _NAMES and not _speaks_redis(port, where):
        raise KflexError(
            f"not a Redis: {name} (pid {pid}) listens on port {port}",
            "monitor",
            "give the --port or --pid of a redis-server",
        )
    return Server(port, pid, where.inode, name, bool(_unix_listening(pid) & process.sockets(pid)))


def by_pid(pid: int) -> list[Server]:
    """The ports of one process; its bus port is not a client's."""
    try:
        ports = _ports(pid)
    except FileNotFoundError:
        raise KflexError(f"no process {pid}", "--pid", "pids are as this host sees them: see ps") from None
    except PermissionError:
        raise KflexError(f"no permission to look at process {pid}", "--pid", "run it with sudo") from None
    if not ports:
        raise KflexError(
            f"not a Redis: {_name(pid)} (pid {pid}) listens on no TCP port", "--pid", "see `ss -ltnp`"
        )
    ports = [port for port in ports if port - 10000 not in ports]
    return [_server(pid, port) for port in ports]


def by_port(port: int) -> Server:
    """The server that listens on ``port`` of this host."""
    return _server(process.by_port(port)[0].pid, port)


def everything() -> list[Server]:
    """Every server whose program we know by name."""
    found: list[Server] = []
    for pid in process.everyone():
        with contextlib.suppress(OSError, KflexError):
            if _name(pid) in _NAMES:
                found += by_pid(pid)
    if not found:
        raise KflexError("no redis-server runs here", "", "start one, or give --port or --pid")
    return found


def choose(ports: Iterable[int], pids: Iterable[int]) -> list[Server]:
    """The servers asked for, each once; all that run if none is asked for."""
    chosen = [by_port(port) for port in ports] + [server for pid in pids for server in by_pid(pid)]
    unique = {(server.port, server.netns): server for server in chosen or everything()}
    return list(unique.values())


def successor(server: Server) -> Server | None:
    """Who listens on the server's port now, if its process is not the one we know; None without change."""
    if Path(f"/proc/{server.pid}").exists():
        return None
    with contextlib.suppress(KflexError, OSError):
        if server.netns == netns.here().inode:
            return by_port(server.port)
    return None
