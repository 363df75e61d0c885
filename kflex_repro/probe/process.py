"""The process to look at: by its pid, or as the listener of a TCP port; and whether it is still there."""

from __future__ import annotations

import contextlib
import os
import re
import select
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.offload import netns, target

_TCP_LISTEN = "0A"


@dataclass(frozen=True)
class Process:
    """A live process. ``start_time`` (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    start_time: int
    name: str

    @property
    def root(self) -> Path:
        """Its root directory as we see it: it may be in a container."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def exe(self) -> Path:
        """Its program, whatever became of the file's name."""
        return Path(f"/proc/{self.pid}/exe")

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        try:
            return target.start_time(self.pid) == self.start_time and not _zombie(self.pid)
        except KflexError:
            return False

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def by_pid(pid: int) -> Process:
    """The process with this id; KflexError if there is none, or if it is a thread or a zombie."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise KflexError(f"no process {pid}", "/proc", "did it end just now? see `pgrep -a redis`") from None
    group = int(re.search(r"^Tgid:\s+(\d+)", status, re.M)[1])  # type: ignore[index]
    if group != pid:
        raise KflexError(f"{pid} is a thread of process {group}", "/proc", f"use --pid {group}")
    name = re.search(r"^Name:\s+(.*)", status, re.M)[1]  # type: ignore[index]
    if _zombie(pid):
        raise KflexError(f"process {pid} ({name}) has ended", "/proc", "only its parent still knows it")
    return Process(pid, target.start_time(pid), name)


def by_port(port: int) -> list[Process]:
    """The processes that listen on TCP ``port`` in our network namespace (parent and children may share it).

    Nobody is asked: it works for a server that is busy, wants a password, or is no Redis.
    """
    if port not in listening().values():
        pids = netns.listeners_elsewhere(port)
        names = " or ".join(f"--pid {pid}" for pid in pids[:4])
        raise KflexError(
            "nothing listens there",
            f"port {port}",
            f"something in another network namespace (a container?) does: {names}"
            if pids
            else "give another --port, or --pid",
        )
    found = owners(port)
    if not found:
        raise KflexError(
            "cannot see whose socket that is",
            f"port {port}",
            "run as root, or give --pid (another pid namespace?)",
        )
    return [by_pid(pid) for pid in found]


def listening(pid: int | None = None) -> dict[str, int]:
    """Inode -> TCP port of everything that listens in the network namespace of ``pid`` (None: in ours)."""
    found: dict[str, int] = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid or 'self'}/net/{name}").read_text().splitlines()[1:]
            for fields in (line.split() for line in lines):
                if fields[3] == _TCP_LISTEN:
                    found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return found


def sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets. OSError where it is gone, or may not be looked at."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink())):
                found.add(match.group(1))
    return found


def everyone() -> list[int]:
    """The pids of all processes, lowest first."""
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def owners(port: int) -> list[int]:
    """The processes that listen on ``port`` in our network namespace, as far as we may look at them."""
    wanted = {inode for inode, known in listening().items() if known == port}
    found = []
    for pid in everyone() if wanted else ():
        with contextlib.suppress(OSError):
            if sockets(pid) & wanted:
                found.append(pid)
    return found


def need_host_pids() -> None:
    """Unavailable unless pids here are those that BPF programs see."""
    if os.geteuid() != 0:
        raise Unavailable("probes need root", "", "run it with sudo")
    if not netns.in_first_pid_namespace():
        raise Unavailable(
            "BPF programs see the host's process ids, this pid namespace has others",
            "/proc/self/ns/pid",
            "run it on the host; --pid there can be a container's process",
        )


class Watch:
    """Waits for time to pass or for one of the processes to end, as a context manager."""

    def __init__(self, processes: list[Process]) -> None:
        self._fds: dict[int, Process] = {}
        try:
            for process in processes:
                self._fds[os.pidfd_open(process.pid)] = process
                # Opened after the look at start_time: the number may be another's by now.
                if not process.alive:
                    raise ProcessLookupError
        except ProcessLookupError:
            self.close()
            raise KflexError(f"{process} has ended") from None

    def wait(self, seconds: float) -> Process | None:
        """The process that ended within ``seconds``, None if none did."""
        ended = select.select(list(self._fds), [], [], max(0.0, seconds))[0]
        return self._fds[ended[0]] if ended else None

    def close(self) -> None:
        """Give up the descriptors."""
        while self._fds:
            os.close(self._fds.popitem()[0])

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
