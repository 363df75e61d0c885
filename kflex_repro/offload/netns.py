"""Network namespaces: which one a server lives in, its addresses, and work done inside it.

The toolkit itself runs in the host's pid namespace; a server may have network, pid, mount and user
namespaces of its own, as in a container.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kflex_repro.errors import KflexError, os_failure

T = TypeVar("T")

RUN = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_SO_NETNS_COOKIE = 71
# include/linux/proc_ns.h: the first pid namespace has this inode number on every kernel.
_FIRST_PID_NS = 0xEFFFFFFC
_SYS_SETRESUID = {"x86_64": 117, "aarch64": 147}
_TCP_LISTEN = "0A"


@dataclass(frozen=True)
class Namespace:
    """A network namespace: a path that opens it, and its inode number, which names it while it lives."""

    path: Path
    inode: int

    @property
    def is_first(self) -> bool:
        """Whether it is the host's own: that of its kernel threads, whose parent is process 2."""
        return self.inode == _inode(Path("/proc/2/ns/net"))


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError as error:
        raise KflexError(f"no network namespace: {error.strerror}", str(path)) from None


def here() -> Namespace:
    """Ours."""
    path = Path("/proc/self/ns/net")
    return Namespace(path, _inode(path))


def of(pid: int) -> Namespace:
    """That of a process; KflexError when there is none."""
    path = Path(f"/proc/{pid}/ns/net")
    try:
        return Namespace(path, path.stat().st_ino)
    except FileNotFoundError:
        raise KflexError(f"no process {pid}", "/proc", "give a pid as this host sees it") from None
    except OSError as error:
        raise os_failure("stat", error.errno or 0, str(path)) from None


def named(name: str) -> Namespace:
    """``name`` of `ip netns list`, or a path (`/proc/PID/ns/net`, what a container engine shows)."""
    path = Path(name) if "/" in name else RUN / name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KflexError(
            "no such network namespace", str(path), "see `ip netns list`, or use --pid"
        ) from None
    except OSError as error:
        raise os_failure("open", error.errno or 0, str(path)) from None
    try:
        if not _is_netns(fd):
            raise KflexError("not a network namespace", str(path), "see `ip netns list`, or use --pid")
        return Namespace(path, os.fstat(fd).st_ino)
    finally:
        os.close(fd)


def _is_netns(fd: int) -> bool:
    import fcntl

    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


def enter(fd: int) -> None:
    """Move the calling thread into the network namespace behind ``fd``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise os_failure("setns", ctypes.get_errno())


def call(where: Namespace, work: Callable[[], T], euid: int | None = None) -> T:
    """``work()`` inside the namespace, in a thread of its own that ends there; its result or exception.

    ``euid`` is the thread's effective user: a server in a user namespace of its own does not know root.
    """
    if where.inode == here().inode and euid is None:
        return work()
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            fd = os.open(where.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_ino != where.inode:
                    raise KflexError("the network namespace has gone", str(where.path))
                enter(fd)
            finally:
                os.close(fd)
            if euid is not None:
                _become(euid)
            done.append(work())
        except FileNotFoundError:
            failed.append(KflexError("the network namespace has gone", str(where.path)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="kflex-netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def _become(euid: int) -> None:
    """The calling thread's effective user only: libc's seteuid() would change that of every thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYS_SETRESUID.get(os.uname().machine, 117)
    if libc.syscall(number, -1, euid, -1) != 0:
        raise os_failure("setresuid", ctypes.get_errno())


def cookie(where: Namespace) -> int:
    """The kernel's cookie of the namespace (SO_NETNS_COOKIE, Linux 5.14)."""

    def ask() -> int:
        with socket.socket() as probe:
            return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")

    return call(where, ask)


# --- what can be read from /proc ---------------------------------------------------------------------------


def addresses(pid: int) -> frozenset[ipaddress.IPv6Address]:
    """The local addresses in the network namespace of ``pid``, loopback left out; IPv4 ones v4-mapped."""
    base = Path(f"/proc/{pid}/net")
    try:
        trie = (base / "fib_trie").read_text()
        six = (base / "if_inet6").read_text() if (base / "if_inet6").exists() else ""
    except OSError as error:
        raise os_failure("read", error.errno or 0, str(base)) from None
    found = {ipaddress.IPv6Address(f"::ffff:{address}") for address in _local_v4(trie)}
    found |= {ipaddress.IPv6Address(int(line.split()[0], 16)) for line in six.splitlines()}
    return frozenset(one for one in found if not (one.ipv4_mapped or one).is_loopback)


def _local_v4(trie: str) -> set[str]:
    """Addresses that /proc/net/fib_trie has as local hosts."""
    return set(re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", trie))


def in_first_pid_namespace() -> bool:
    """Whether pids here are those that BPF programs see."""
    return _inode(Path("/proc/self/ns/pid")) == _FIRST_PID_NS


def monotonic_offset(pid: int) -> str:
    """The offset of the process's CLOCK_MONOTONIC, as /proc writes it ("0 0" without a time namespace)."""
    try:
        lines = Path(f"/proc/{pid}/timens_offsets").read_text().splitlines()
    except OSError:
        return "0 0"  # a kernel without time namespaces
    return next((" ".join(line.split()[1:]) for line in lines if line.startswith("monotonic")), "0 0")


def unix_names(pid: int) -> list[str]:
    """Abstract AF_UNIX names in the network namespace of ``pid``, without their ``@``."""
    try:
        lines = Path(f"/proc/{pid}/net/unix").read_text(errors="replace").splitlines()
    except OSError:
        return []
    last = (line.split(None, 7)[-1] for line in lines[1:])
    return [name[1:] for name in last if name.startswith("@")]


def user_of(pid: int) -> int | None:
    """The user that owns a process which has a user namespace other than ours; None if it has ours."""
    try:
        if Path(f"/proc/{pid}/ns/user").stat().st_ino == Path("/proc/self/ns/user").stat().st_ino:
            return None
        return int(re.search(r"^Uid:\s+\d+\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])  # type: ignore[index]
    except OSError:
        return None


def everywhere() -> list[Namespace]:
    """The network namespace of every process, each once."""
    found: dict[int, Namespace] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(KflexError):
                place = of(int(entry.name))
                found.setdefault(place.inode, place)
    return list(found.values())


def listeners_elsewhere(port: int) -> list[int]:
    """One process of each other network namespace in which something listens on TCP ``port``."""
    known = {here().inode}
    found = []
    for entry in sorted(Path("/proc").iterdir()):
        if not entry.name.isdigit():
            continue
        try:
            inode = (entry / "ns/net").stat().st_ino
            if inode in known:
                continue
            known.add(inode)
            tables = [(entry / "net" / name).read_text() for name in ("tcp", "tcp6")]
        except OSError:
            continue
        rows = (line.split() for table in tables for line in table.splitlines()[1:])
        if any(row[3] == _TCP_LISTEN and int(row[1].rpartition(":")[2], 16) == port for row in rows):
            found.append(int(entry.name))
    return found
