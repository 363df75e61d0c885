"""`offload install` with a real redis-server: the module loads, also under Debian's hardening.

Halves that do not fit together are refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kflex_repro import build
from kflex_repro.errors import KflexError
from kflex_repro.offload import attach, install, systemd
from kflex_repro.offload import session as offload
from kflex_repro.redis.server import ManagedServer, free_port, redis_binary
from tests.conftest import unavailable
from tests.redis import confined
from tests.redis.containers import Contained, public_directory
from tests.redis.harness import PLAIN_ONLY, Conn, Snapshot, Timeout, cli, eventually, need_offload

pytestmark = [
    pytest.mark.bpf,
    pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no offload to install"),
]

ROOT = Path(__file__).resolve().parents[2]
TABLE = 32 << 20
DATA = ROOT / "tests" / "unit" / "data"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each of these tests leaves nothing."""
    need_offload()
    before = Snapshot.take()
    yield
    before.must_return()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Debian's redis.conf as a user has it: no newline at its end, data and log in places of their own."""
    path = tmp_path / "redis.conf"
    path.write_text(f"bind 127.0.0.1\nport {free_port()}\ndir {tmp_path}\nsave ''\nlogfile {tmp_path}/log")
    return path


@contextlib.contextmanager
def running(config: Path) -> Iterator[int]:
    """A redis-server of this configuration file; its port."""
    found = {each.name: each.args for each in install.directives(config)}
    port = int(found["port"][0])
    process = subprocess.Popen(
        [redis_binary(), config, "--daemonize", "no"], stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:

        def answers() -> bool:
            assert process.poll() is None, "redis-server has ended"
            with contextlib.suppress(OSError), Conn(port) as conn:
                return conn.do("PING") == b"PONG"
            return False

        eventually(answers, 20)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def run(config: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return cli("offload", "install", "--config", str(config), "--prefix", str(config.parent / "lib"), *args)


def test_install_start_serve_revert(config: Path) -> None:
    before = config.read_bytes()
    plan = run(config, "--dry-run", "--json")
    assert plan.returncode == 0, plan.stderr
    assert {Path(each["path"]).name: each["kind"] for each in json.loads(plan.stdout)["changes"]} == {
        "kflex.so": "create",
        "used-by": "create",
        "redis.conf.before-kflex": "create",
        "redis.conf": "change",
    }
    assert [path.name for path in config.parent.iterdir()] == ["redis.conf"]
    assert config.read_bytes() == before
    done = run(config)
    assert done.returncode == 0 and "then: restart" in done.stdout, done
    again = run(config, "--json")
    assert json.loads(again.stdout)["unchanged"] is True
    with running(config) as port:
        shown = cli("offload", "install", "--port", str(port), "--prefix", f"{config.parent}/lib", "--json")
        assert json.loads(shown.stdout)["unchanged"] is True, shown
        with attach.start(port, table_bytes=TABLE) as session, Conn(port) as conn:
            conn.do("SET", "k", "v")
            eventually(lambda: conn.do("GET", "k") == b"v" and session.stats()["served_get"] > 0)
    back = run(config, "--revert")
    assert back.returncode == 0 and config.read_bytes() == before, back
    assert not (config.parent / "lib").exists()
    with running(config) as port, Conn(port) as conn:
        assert conn.do("MODULE", "LIST") == []
    assert "nothing to do" in run(config, "--revert").stdout


def test_a_configuration_that_redis_refuses(config: Path) -> None:
    """Tried before it replaces the old one: one line with Redis's words, and nothing has changed."""
    config.write_text(config.read_text() + "\nno-such-directive 1\n")
    before = config.read_bytes()
    done = run(config)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "does not start" in done.stderr
    assert config.read_bytes() == before
    assert not (config.parent / "lib").exists()


def test_data_is_not_touched_by_the_trial(config: Path) -> None:
    """Its RDB and AOF are neither read nor written, its port is not taken: the server may be running."""
    config.write_text(config.read_text() + "\nappendonly yes\naof-use-rdb-preamble no\n")
    with running(config) as port, Conn(port) as conn:
        conn.do("SET", "k", "v")
        files = {p: p.read_bytes() for p in config.parent.rglob("appendonlydir/*")}
        assert files
        assert run(config).returncode == 0
        assert {p: p.read_bytes() for p in config.parent.rglob("appendonlydir/*")} == files
        assert conn.do("GET", "k") == b"v"


@pytest.mark.parametrize("secret", ["requirepass", "acl"])
def test_a_server_with_a_password(config: Path, secret: str) -> None:
    line = "requirepass s3cr3t" if secret == "requirepass" else "user default off"
    config.write_text(config.read_text() + f"\n{line}\n")
    done = run(config)
    assert done.returncode == 0, done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr


def test_what_cannot_be_installed(config: Path) -> None:
    def says(*args: str) -> str:
        done = cli("offload", "install", *args)
        assert done.returncode not in (0,) and "Traceback" not in done.stderr, done
        return done.stderr

    assert "--config FILE or --port N" in says()
    assert "no such configuration file" in says("--config", f"{config}.old")
    assert "no such service" in says("--config", str(config), "--unit", "no-such-redis")
    assert "nothing listens" in says("--port", str(free_port()))
    with ManagedServer() as bare:
        assert "without a configuration file" in says("--port", str(bare.port))
    place = config.parent
    script = f'mount --bind {place} {place} && mount -o remount,ro,bind {place} && exec "$@"'
    read_only = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", script, "sh"),
            *(sys.executable, "-m", "kflex_repro", "offload", "install", "--config", str(config)),
            *("--prefix", f"{config.parent}/lib"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert read_only.returncode == 1 and "cannot be written" in read_only.stderr, read_only
    assert [path.name for path in config.parent.iterdir()] == ["redis.conf"]


# --- a service as Debian hardens it ------------------------------------------------------------------------


def hardened(*more: str, uid: int = 0) -> list[str]:
    """What runs a command under the filter of Debian's unit, with these further system calls."""
    if not confined.NUMBERS.exists():
        unavailable("the kernel's headers are not installed (Debian: linux-libc-dev)")
    lines = (DATA / "redis-server.syscalls").read_text().splitlines()
    names = [name for line in lines if not line.startswith("#") for name in line.split()]
    assert "epoll_wait" in names and not {"bpf", "setpriority"} & {*names}
    return [sys.executable, str(Path(confined.__file__)), str(uid), *names, *more, "--"]


def test_served_under_debians_system_call_filter() -> None:
    """Whatever the module calls must be allowed: anything else kills the server."""
    # So many clients that Redis need not ask for more files.
    with Contained(["--maxclients", "500"], wrap=hardened(), module=build.ensure().module) as server:
        with attach.start(server.port, table_bytes=TABLE) as session, Conn(server.port) as conn:
            conn.do("SET", "k", "v")

            def served() -> bool:
                assert conn.do("SET", "k", "v") == b"OK"
                assert conn.do("GET", "k") == b"v"
                stats = session.stats()
                return bool(stats["served_get"] and stats["served_set"])

            eventually(served)
            # The toolkit did for the drain thread what the filter forbids the server.
            threads = {
                (task / "comm").read_text().strip(): os.getpriority(os.PRIO_PROCESS, int(task.name))
                for task in Path(f"/proc/{server.pid}/task").iterdir()
            }
            assert threads["kflex-drain"] == -10 and threads["redis-server"] == 0
        assert server.running


def test_the_filter_is_a_filter() -> None:
    """The test above would see a forbidden call: this command makes one, and dies of it."""
    done = subprocess.run([*hardened(), "nice", "-n", "5", "true"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGSYS


def accepted_by_the_kernel_alone(server: ManagedServer) -> bytes:
    """The value of a SET that a stopped server cannot have seen, b"" if the gate was closed this time."""
    with Conn(server.port, timeout=0.3) as conn:
        assert conn.do("PING") == b"PONG"
        value = os.urandom(8).hex().encode()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert conn.do("SET", "k", value) == b"OK"
        except Timeout:
            os.kill(server.pid, signal.SIGCONT)
            return b""
        return value


@pytest.mark.parametrize("drop_in", [True, False], ids=["with the drop-in", "without"])
def test_a_service_recovers_after_a_crash(drop_in: bool) -> None:
    """As a user who cannot reach bpffs, under the filter: our drop-in is what recovery needs."""
    need = [
        each.setting
        for each in systemd.Unit(
            "x", tuple(systemd.parse((DATA / "redis-server.service").read_text()))
        ).needs(install.PREFIX)
    ]
    assert need == ["SystemCallFilter=bpf", f"BindPaths=-/sys/fs/bpf/kflex:{systemd.PINS}"]
    user = 65534
    with public_directory(user) as home:
        # BindPaths=-SOURCE:PLACE, at a place of our own; and bpffs as a systemd host shows it to users.
        place = home / Path(systemd.PINS).name
        place.mkdir()
        bind = f"mount --bind /sys/fs/bpf/kflex {place}" if drop_in else "true"
        script = f'chown {user} {{home}}; {bind} 2>/dev/null; umount -l /sys/fs/bpf 2>/dev/null; exec "$@"'
        wrap = ["unshare", "--mount", "sh", "-c", script, "sh"]
        wrap += hardened(*(["bpf"] if drop_in else []), uid=user)
        server = Contained(
            ["--maxclients", "500", "--appendonly", "yes"],
            wrap=wrap,
            module=Path(shutil.copy(build.ensure().module, home)),
            dir=home,
        )
        with server:
            session = attach.start(server.port, table_bytes=TABLE)
            value = eventually(lambda: accepted_by_the_kernel_alone(server), 20)
            server.kill()
            assert session.leftovers()
            server.start()
            with Conn(server.port) as conn:
                assert (conn.do("GET", "k") == value) == drop_in, server.log.read_text()
            assert bool(session.leftovers()) != drop_in
            session.close()
            left = offload.find(server.port)
            assert left is not None
            left.stop(force=True)


# --- halves of different versions --------------------------------------------------------------------------


def sources(tmp_path: Path, pattern: str, becomes: str) -> Path:
    """A copy of the sources of kernel half and module with another abi.h."""
    top = tmp_path / "sources"
    for name in ("bpf", "module"):
        shutil.copytree(ROOT / name, top / name)
    header = top / "bpf" / "abi.h"
    text, count = re.subn(pattern, becomes, header.read_text(), count=1)
    assert count == 1
    header.write_text(text)
    return top


NEXT_ABI = (r"KFLEX_ABI = (\d+)", "KFLEX_ABI = 99")
# A field more, and nobody thought of the number.
LARGER = (
    r"__u32 magic;\n\t__u32 abi;\n\t__u32 mode;",
    "__u32 magic;\n\t__u32 abi;\n\t__u64 more[8];\n\t__u32 mode;",
)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (NEXT_ABI, r"has ABI 99, this toolkit ABI \d+"),
        (LARGER, r"control block \d+ bytes\), the toolkit ABI"),
    ],
    ids=["number", "size"],
)
def test_a_module_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], says: str
) -> None:
    """Refused with one line that names both; the server runs on, and nothing stays."""
    with monkeypatch.context() as patch:
        patch.setenv("KFLEX_SOURCE", str(sources(tmp_path, *change)))
        other = build.ensure(only=build.objects.MODULE).module
    with ManagedServer(module=other) as server:
        refused = cli("offload", "start", "--port", str(server.port), "--table-size", "32m")
        assert refused.returncode == 1, refused
        assert re.search(says, refused.stderr) and len(refused.stderr.strip().splitlines()) == 1, (
            refused.stderr
        )
        assert offload.find(server.port) is None
        with Conn(server.port) as conn:
            assert conn.do("SET", "k", "v") == b"OK"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (NEXT_ABI, r"has ABI \d+, this toolkit ABI 99"),
        (LARGER, r"control block \d+ bytes\), the toolkit ABI"),
    ],
    ids=["number", "size"],
)
def test_a_toolkit_of_another_version(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    """The same the other way round; and it does not take the session of this version for its own."""
    env = {**os.environ, "KFLEX_SOURCE": str(sources(tmp_path, *change))}
    with ManagedServer(module=build.ensure().module) as server:
        port = str(server.port)
        refused = cli("offload", "start", "--port", port, "--table-size", "32m", env=env)
        assert refused.returncode == 1, refused
        assert re.search(says, refused.stderr) and len(refused.stderr.strip().splitlines()) == 1, (
            refused.stderr
        )
        with attach.start(server.port, table_bytes=TABLE) as session, Conn(server.port) as conn:
            shown = cli("offload", "status", "--port", port, env=env)
            assert shown.returncode == 1 and "another version" in shown.stderr, shown
            again = cli("offload", "start", "--port", port, env=env)
            assert again.returncode == 1, again
            conn.do("SET", "k", "v")
            eventually(lambda: conn.do("GET", "k") == b"v" and session.stats()["served_get"] > 0)


def test_a_dry_run_sees_the_mismatch(tmp_path: Path) -> None:
    env = {**os.environ, "KFLEX_SOURCE": str(sources(tmp_path, *NEXT_ABI))}
    with ManagedServer(module=build.ensure().module) as server:
        plan = cli("offload", "start", "--port", str(server.port), "--dry-run", env=env)
        assert plan.returncode == 1 and "ABI 99" in plan.stderr, plan
    with pytest.raises(KflexError, match="no BPF object"):
        build.ensure().object("another")
