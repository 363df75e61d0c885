"""Two network namespaces of our own, joined by a veth pair: server in one, clients in the other.

Both ends live in namespaces made here, so no address, route or interface of the host is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.offload.netns import RUN, enter
from kflex_repro.patience import patient

_NAME = "kflexb-"


def _ip(*args: str) -> None:
    try:
        done = subprocess.run(
            ["ip", *args],
            capture_output=True,
            text=True,
            timeout=patient(20),
            start_new_session=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise Unavailable("ip is not installed", fix="run `make setup` (Debian: iproute2)") from error
    except subprocess.TimeoutExpired as error:
        raise KflexError(f"`ip {' '.join(args)}` did not finish") from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        reason = said.splitlines()[-1]
        fix = "--netns needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)" if os.geteuid() != 0 else ""
        raise Unavailable(f"`ip {' '.join(args)}` failed, {reason}", fix=fix)


def _start_ticks(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def sweep() -> list[str]:
    """Delete namespaces that a killed run left behind (its process is gone); returns their names."""
    removed = []
    for entry in sorted(RUN.glob(f"{_NAME}*")) if RUN.is_dir() else ():
        owner = entry.name.split("-")[2:4]
        if len(owner) != 2 or not all(part.isdigit() for part in owner):
            continue
        if _start_ticks(int(owner[0])) != int(owner[1]):
            with suppress(KflexError):
                _ip("netns", "delete", entry.name)
                removed.append(entry.name)
    return removed


class VethPair:
    """Context manager: ``server_ns`` and ``client_ns`` (names under /run/netns), ``server_host`` and
    ``client_host``.

    Leaving it removes both namespaces, and the pair with them, also after a failure half-way.
    """

    server_host = "10.121.0.1"
    client_host = "10.121.0.2"

    def __init__(self) -> None:
        # The owner's pid and start time are in the name, so that a later run knows what a killed one left
        # behind.
        tag = f"{os.getpid()}-{_start_ticks(os.getpid())}-{os.urandom(2).hex()}"
        self.server_ns = f"{_NAME}s-{tag}"
        self.client_ns = f"{_NAME}c-{tag}"
        # An interface's name has at most 15 characters; both are made inside the namespaces.
        self._server_if, self._client_if = "kfb-s", "kfb-c"

    def __enter__(self) -> VethPair:
        for tool in ("ip", "nsenter"):
            if shutil.which(tool) is None:
                raise Unavailable(f"{tool} is not installed", fix="run `make setup`")
        try:
            for name in (self.server_ns, self.client_ns):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            pair = ["link", "add", self._server_if, "type", "veth", "peer", "name", self._client_if]
            _ip("-n", self.server_ns, *pair, "netns", self.client_ns)
            self._up(self.server_ns, self._server_if, self.server_host)
            self._up(self.client_ns, self._client_if, self.client_host)
        except BaseException:
            self._remove()
            raise
        return self

    def _up(self, netns: str, interface: str, address: str) -> None:
        _ip("-n", netns, "address", "add", f"{address}/30", "dev", interface)
        _ip("-n", netns, "link", "set", interface, "up")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (self.server_ns, self.client_ns):
            if (RUN / name).exists():
                with suppress(KflexError):
                    _ip("netns", "delete", name)

    def left_behind(self) -> Sequence[str]:
        """Which of the two namespaces still exist."""
        return [name for name in (self.server_ns, self.client_ns) if (RUN / name).exists()]


@contextmanager
def inside(name: str | None) -> Iterator[None]:
    """Run the block, in this thread and in what it starts, inside the network namespace ``name`` (None: as
    it is).

    Only the calling thread moves; threads and processes it starts meanwhile inherit the namespace.
    """
    if name is None:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(RUN / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            enter(home)
    finally:
        os.close(home)
