"""An sshd of the test's own on loopback, with keys made for it; the system's is not touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kflex_repro.build import cache
from tests.conftest import unavailable
from tests.redis.harness import eventually

TOP = Path(__file__).resolve().parents[2]
# Where sshd confines what it does before the login; compiled in.
PRIVILEGE_SEPARATION = Path("/run/sshd")


def keygen(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair."""
    path.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", path], check=True, stdin=subprocess.DEVNULL
    )
    return path


def fingerprint(key: Path) -> str:
    """As an operator reads it on the host."""
    line = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], check=True, capture_output=True, text=True)
    return line.stdout.split()[1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def children(pid: int) -> list[int]:
    """Of a process, now."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
        return [int(one) for one in text.split()]
    return []


def descendants(pid: int) -> list[int]:
    """All of them."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def gone(pid: int) -> bool:
    """Whether it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _program(first: str) -> str:
    return f"{first}\nimport sys; from kflex_repro.cli import main; sys.exit(main())"


@dataclass
class Host:
    """The other side: an sshd, a home here that may log in there, a directory for temporary files there."""

    base: Path
    prefix: Sequence[str] = ()
    sftp: str = "internal-sftp"
    user: str = "root"
    port: int = 0
    # Python that a process of ours here runs first.
    first: str = ""
    process: subprocess.Popen[bytes] | None = None
    env: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Of the user here."""
        return self.base / "home"

    @property
    def there(self) -> Path:
        """TMPDIR of the toolkit there."""
        return self.base / "there"

    @property
    def toolkit(self) -> Path:
        """The command there."""
        return self.base / "bin" / "kflex-repro"

    @property
    def name(self) -> str:
        """As --host."""
        return f"{self.user}@127.0.0.1:{self.port}"

    def start(self) -> Host:
        """Make the keys, start the daemon, trust its key."""
        for path in (self.home / ".ssh", self.there, self.toolkit.parent):
            path.mkdir(parents=True, exist_ok=True)
        (self.home / ".ssh").chmod(0o700)
        keygen(self.home / ".ssh" / "id_ed25519")
        shutil.copy(self.home / ".ssh" / "id_ed25519.pub", self.base / "authorized_keys")
        self.install(self.script())
        keygen(self.base / "host_ed25519")
        self.serve()
        self.trust()
        return self

    def script(self, first: str = "") -> str:
        """Runs this tree's toolkit there; ``first``: Python that it runs before."""
        return (
            f"TMPDIR={self.there} KFLEX_CACHE={cache.root()} PYTHONPATH={TOP} "
            f"exec {sys.executable} -c '{_program(first)}' \"$@\""
        )

    def install(self, script: str) -> None:
        """What the toolkit there is."""
        self.toolkit.write_text(f"#!/bin/sh\n{script}\n")
        self.toolkit.chmod(0o755)

    def serve(self) -> None:
        """Start (or start anew) the daemon, on the same port."""
        self.stop()
        self.port = self.port or free_port()
        config = self.base / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.base}/host_ed25519\nPidFile none\n"
            f"AuthorizedKeysFile {self.base}/authorized_keys\nStrictModes no\nUsePAM no\n"
            f"PermitRootLogin prohibit-password\nPasswordAuthentication no\nSubsystem sftp {self.sftp}\n"
        )
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "sshd"
        with (self.base / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sshd, "-D", "-e", "-f", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        eventually(self._listens, what=(self.base / "sshd.log").read_text())

    def _listens(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.base / "sshd.log").read_text()
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def trust(self) -> None:
        """Put the daemon's key into the known_hosts here."""
        kind, key = (self.base / "host_ed25519.pub").read_text().split()[:2]
        (self.home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def stop(self) -> None:
        """End the daemon and its sessions."""
        if self.process is not None:
            left = descendants(self.process.pid)
            self.process.terminate()
            self.process.wait()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            for pid in left:
                eventually(lambda pid=pid: gone(pid), 15, f"{pid} ends with the daemon")
            self.process = None

    def commands(self) -> list[int]:
        """Pids of the measurements that run there (the agent's children)."""
        assert self.process is not None
        return [
            pid for pid in self.toolkits() if b"remote-agent" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def toolkits(self) -> list[int]:
        """Pids of all of the toolkit's processes there."""
        assert self.process is not None
        found = []
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if b"kflex_repro" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def sessions(self) -> list[int]:
        """Pids of the daemon's processes for logged-in connections."""
        assert self.process is not None
        return children(self.process.pid)

    def environment(self) -> dict[str, str]:
        """Of the user here: another home, no agent."""
        kept = {key: value for key, value in os.environ.items() if key != "SSH_AUTH_SOCK"}
        return {**kept, "HOME": str(self.home), "PYTHONPATH": str(TOP), "COLUMNS": "200", **self.env}

    def command(self, *words: str | Path, host: bool = True, toolkit: bool = True) -> list[str]:
        """The toolkit's command here, for that host."""
        more = ["--host", self.name] if host else []
        more += ["--remote-command", str(self.toolkit)] if toolkit else []
        return [sys.executable, "-c", _program(self.first), *map(str, words), *more]

    def run(self, *words: str | Path, **how: bool) -> subprocess.CompletedProcess[str]:
        """Run it here, in the base directory, to its end."""
        return subprocess.run(
            self.command(*words, **how),
            check=False,
            capture_output=True,
            text=True,
            cwd=self.base,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            timeout=120,
        )

    def popen(
        self, *words: str | Path, stdout: int = subprocess.PIPE, host: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start it here."""
        return subprocess.Popen(
            self.command(*words, host=host),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd=self.base,
            env=self.environment(),
        )

    def nothing_left(self) -> None:
        """No process of ours there, no file."""
        eventually(lambda: not self.toolkits(), 15, "the toolkit there has ended")
        eventually(lambda: not list(self.there.iterdir()), 5, f"no temporary file there: {self.there}")


@contextlib.contextmanager
def host(base: Path, prefix: Sequence[str] = (), user: str = "root") -> Iterator[Host]:
    """A running one."""
    if not shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"):
        unavailable("no sshd: scripts/setup --tests installs it")
    # It stays until the next boot, as the system's own does: another run may be using it.
    PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    one = Host(base, prefix, user=user)
    try:
        yield one.start()
    finally:
        one.stop()
