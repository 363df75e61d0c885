"""A redis-server as in a container: namespaces of its own, without a container engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kflex_repro.redis.server import ManagedServer
from tests.conftest import unavailable
from tests.redis.harness import children, eventually


class Contained(ManagedServer):
    """Started by ``wrap`` (a command that runs what follows it), by default as process 1 of a pid namespace
    with a mount namespace and a /proc of its own. ``{home}`` in it is the directory of the unix socket.
    ``pid`` is the server's as the host sees it.
    """

    def __init__(
        self,
        args: Sequence[str] = (),
        *,
        wrap: Sequence[str] = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
        **kw: Any,
    ) -> None:
        if shutil.which(wrap[0]) is None:
            unavailable(f"{wrap[0]} is not installed")
        # The unix socket is how ManagedServer finds it ready, wherever its ports are.
        super().__init__(["--enable-debug-command", "yes", *args], unix=True, **kw)
        self._wrap = list(wrap)

    @property
    def args(self) -> list[str]:
        return [*(word.replace("{home}", str(self._home)) for word in self._wrap), *super().args]

    @property
    def pid(self) -> int:
        outer = super().pid
        return next((pid for pid in sorted(children(outer)) if _is_server(pid)), outer)

    def _is_ours(self, probe: Any) -> bool:
        # Its own idea of its pid is another one; the unix socket is in a directory of ours.
        return True

    def kill(self) -> None:
        pid, outer = self.pid, super().pid
        if pid != outer:
            os.kill(pid, signal.SIGKILL)
        super().kill()

    def stop(self, timeout: float = 10.0) -> None:
        # unshare waits for its child and does not forward signals.
        if self.running and self.pid != super().pid:
            os.kill(self.pid, signal.SIGTERM)
            eventually(lambda: not self.running, timeout, "the server's end")
        super().stop(timeout)


def _is_server(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "redis-server"
    except OSError:
        return False


@contextlib.contextmanager
def public_directory(uid: int) -> Iterator[Path]:
    """A directory that everyone may enter, unlike pytest's; it belongs to this user."""
    with tempfile.TemporaryDirectory(prefix="kflex-public-") as name:
        os.chown(name, uid, -1)
        Path(name).chmod(0o755)
        yield Path(name)


def ip(netns: str, *args: str) -> None:
    """`ip` inside a network namespace."""
    subprocess.run(["ip", "-n", netns, *args], check=True, capture_output=True, text=True)


def nft(netns: str, chain: str) -> None:
    """Add an nftables chain inside a network namespace; it goes with the namespace."""
    if shutil.which("nft") is None:
        unavailable("nft is not installed (Debian: nftables)")
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{netns}", "nft", "-f", "-"],
        input=f"table ip kflex {{\nchain one {{\n{chain}\n}}\n}}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "not supported" in done.stderr:
        unavailable(f"this kernel has no nftables NAT: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
