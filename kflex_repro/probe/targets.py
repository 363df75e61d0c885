"""Which redis-servers to watch: by port, by pid, or all that run here. Nothing is asked of them."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.offload import netns

# The name of the program, or what it calls itself; Debian's redis-server is a link to redis-check-rdb.
_NAMES = frozenset({"redis-server", "redis-check-rdb", "redis-sentinel", "valkey-server", "keydb-server"})
_LISTEN = "0A"
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


def _sockets(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink())):
                found.add(match.group(1))
    return found


def _listening(pid: int) -> dict[str, int]:
    """Inode -> port of everything that listens in the network namespace of ``pid``."""
    found: dict[str, int] = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                row = line.split()
                if row[3] == _LISTEN:
                    found[row[9]] = int(row[1].rpartition(":")[2], 16)
    return found


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
    mine = _sockets(pid)
    return sorted({port for inode, port in _listening(pid).items() if inode in mine})


def _speaks_redis(port: int, where: netns.Namespace) -> bool:
    """Whether the answer to a PING is Redis's: only asked where the process has another name than we know."""

    def ask() -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=_ASK_S) as probe:
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
    return Server(port, pid, where.inode, name, bool(_unix_listening(pid) & _sockets(pid)))


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


def owner(port: int) -> int | None:
    """The process in our network namespace that listens on ``port``; None if there is none."""
    wanted = {inode for inode, known in _listening_here().items() if known == port}
    if not wanted:
        return None
    for pid in _processes():
        with contextlib.suppress(OSError):
            if _sockets(pid) & wanted:
                return pid
    return None


def _listening_here() -> dict[str, int]:
    import os

    return _listening(os.getpid())


def _processes() -> Iterable[int]:
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def by_port(port: int) -> Server:
    """The server that listens on ``port`` of this host."""
    pid = owner(port)
    if pid is None:
        elsewhere = netns.listeners_elsewhere(port)
        names = " or ".join(f"--pid {one}" for one in elsewhere[:4])
        raise KflexError(
            "nothing listens there",
            f"port {port}",
            f"something in another network namespace (a container?) does: {names}"
            if elsewhere
            else "start redis-server, or give its --port",
        )
    return _server(pid, port)


def everything() -> list[Server]:
    """Every server whose program we know by name."""
    found: list[Server] = []
    for pid in _processes():
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
