"""ManagedServer against the real redis-server."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.redis import server
from kflex_repro.redis.server import ManagedServer
from tests.conftest import require


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_starts_answers_and_leaves_nothing() -> None:
    with ManagedServer() as managed:
        client = managed.client()
        assert client.set("key", b"\0value") and client.get("key") == b"\0value"
        info = client.info()
        assert info["process_id"] == managed.pid
        assert client.config_get("save", "appendonly") == {"save": "", "appendonly": "no"}
        pid, home = managed.pid, managed.dir
        assert home.is_dir() and managed.log.read_text()
        with socket.create_connection(("::1", managed.port)):
            pass
    assert gone(pid) and not home.exists() and not managed.running
    managed.stop()


def test_unix_socket_and_arguments() -> None:
    with ManagedServer(["--maxclients", "77"], unix=True) as managed:
        assert managed.unix_path is not None and managed.unix_path.is_socket()
        client = redis.Redis(unix_socket_path=str(managed.unix_path))
        assert client.config_get("maxclients") == {"maxclients": "77"}


def test_a_password_is_on_no_command_line() -> None:
    secret = 'hush "\\ \tä'
    with ManagedServer(password=secret) as managed:
        assert managed.client().get("key") is None
        assert managed.client().config_get("requirepass") == {"requirepass": secret}
        with pytest.raises(redis.AuthenticationError):
            managed.client(password=None).get("key")
        assert b"hush" not in Path(f"/proc/{managed.pid}/cmdline").read_bytes()
        (holder,) = (path for path in managed.dir.iterdir() if b"requirepass" in path.read_bytes())
        assert holder.stat().st_mode & 0o777 == 0o600


def test_two_at_once_get_their_own_ports() -> None:
    with ManagedServer() as one, ManagedServer() as two:
        assert one.port != two.port
        one.client().set("key", "1")
        assert two.client().get("key") is None


def test_a_taken_port_is_said() -> None:
    with ManagedServer() as one:
        second = ManagedServer(port=one.port)
        with pytest.raises(KflexError, match="in use"):
            second.start()
        assert not second.running and one.client().ping()


def test_an_exit_shows_the_servers_words() -> None:
    with pytest.raises(KflexError, match=r"redis-server exited: .*no-such-option"):
        ManagedServer(["--no-such-option", "1"]).start()
    with pytest.raises(KflexError, match="redis-server exited"):
        ManagedServer(module=Path("/nonexistent.so")).start()


def test_restart_after_kill_keeps_port_and_directory() -> None:
    with ManagedServer(["--appendonly", "yes", "--appendfsync", "always"]) as managed:
        port, first = managed.port, managed.pid
        managed.client().set("key", "kept")
        managed.kill()
        assert not managed.running and gone(first)
        managed.start()
        assert managed.port == port and managed.pid != first
        assert managed.client().get("key") == b"kept"


def test_given_directory_stays(tmp_path: Path) -> None:
    with ManagedServer(dir=tmp_path) as managed:
        managed.client().set("key", "value")
        managed.client().save()
    assert (tmp_path / "dump.rdb").exists()


def test_stopped_server_is_ended() -> None:
    managed = ManagedServer().start()
    pid = managed.pid
    os.kill(pid, signal.SIGSTOP)
    managed.stop()
    assert gone(pid)


def test_the_server_dies_with_the_toolkit() -> None:
    script = (
        "import sys, time; from kflex_repro.redis.server import ManagedServer\n"
        "managed = ManagedServer().start(); print(managed.pid, managed.port, managed.dir, flush=True)\n"
        "sys.stdin.read()"
    )
    toolkit = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert toolkit.stdout is not None
    pid, _port, home = toolkit.stdout.readline().split()
    pidfd = os.pidfd_open(int(pid))
    try:
        toolkit.kill()
        toolkit.wait()
        assert select.select([pidfd], [], [], 10)[0], "the redis-server outlived the killed toolkit"
    finally:
        os.close(pidfd)
        if not gone(int(pid)):
            os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def test_in_a_network_namespace() -> None:
    require("root", "capabilities")
    name = f"kflex-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with ManagedServer(netns=name) as managed:
            assert managed.client().ping()
            listening = subprocess.run(
                ["ip", "netns", "identify", str(managed.pid)], check=True, capture_output=True, text=True
            )
            assert listening.stdout.strip() == name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_a_missing_network_namespace_is_said() -> None:
    with pytest.raises(KflexError, match=r"redis-server exited: .*kflex-none"):
        ManagedServer(netns="kflex-none").start()


def test_binary_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert server.redis_binary().is_file() and len(server.redis_version()) == 3
    assert server.known_good((7, 0, 15)) and not server.known_good((7, 2, 0))
    monkeypatch.setenv("KFLEX_REDIS_SERVER", str(tmp_path / "none"))
    with pytest.raises(Unavailable, match="not installed"):
        server.redis_binary()
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\necho something else\n")
    fake.chmod(0o755)
    monkeypatch.setenv("KFLEX_REDIS_SERVER", str(fake))
    with pytest.raises(KflexError, match="not a redis-server"):
        server.redis_version()
