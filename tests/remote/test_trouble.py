"""What goes wrong there or on the way: one clear line, nothing left running, no file half written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from kflex_repro import __version__
from tests.conftest import require
from tests.redis.harness import Sut, eventually, plain_server
from tests.remote.sshd import Host, free_port, gone, host

LIST = ("trace", "list", "syscalls", "--match", "read")


@pytest.fixture(scope="module")
def redis() -> Iterator[Sut]:
    """A server to watch."""
    require("root", "tp_btf")
    with plain_server() as sut:
        yield sut


@contextlib.contextmanager
def watching(there: Host, redis: Sut, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A monitor that has said something: (the process here, the pid of the one there)."""
    process = there.popen("monitor", "--port", str(redis.port), "--json", "--interval", "0.1", *words)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(b'{"'), (line, process.stderr.read() if process.stderr and not line else "")
        (pid,) = there.commands()
        yield process, pid
    finally:
        process.kill()
        process.communicate()


def ends(process: subprocess.Popen[bytes], pid: int) -> tuple[bytes, str]:
    """What the process here still said, when both have ended."""
    out, err = process.communicate(timeout=60)
    eventually(lambda: gone(pid), 20, "the process there has ended")
    return out, err.decode()


def one_line(err: str, *parts: str) -> None:
    assert err.startswith("kflex-repro: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err, err


# --- ends of all kinds ------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_measurement_there_and_its_result_comes(there: Host, redis: Sut) -> None:
    with watching(there, redis) as (process, pid):
        process.send_signal(signal.SIGINT)
        out, err = ends(process, pid)
    assert process.returncode == 0 and err.count("\n") == 1 and "ending the measurement" in err
    assert json.loads(out.splitlines()[-1])["type"] == "summary"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_process_there_ends_with_the_one_here(there: Host, redis: Sut, number: int) -> None:
    with watching(there, redis) as (process, pid):
        process.send_signal(number)
        ends(process, pid)


def test_a_broken_connection_is_said_and_ends_the_process_there(there: Host, redis: Sut, here: Path) -> None:
    with watching(there, redis, "--record", str(here / "busy.kmon")) as (process, pid):
        (session,) = there.sessions()
        os.kill(session, signal.SIGKILL)
        _, err = ends(process, pid)
    one_line(err, "the connection broke after", "is lost: run it again")
    assert process.returncode == 1
    assert not list(here.iterdir())


def test_a_killed_agent_takes_the_command_with_it(there: Host, redis: Sut) -> None:
    with watching(there, redis) as (process, pid):
        (agent,) = set(there.toolkits()) - {pid}
        os.kill(agent, signal.SIGKILL)
        _, err = ends(process, pid)
    one_line(err, "the connection broke")
    # Nobody was left to remove it.
    for left in there.there.iterdir():
        left.rmdir()


def test_the_live_table_comes_over_a_terminal(there: Host, redis: Sut) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = there.popen("monitor", "--port", str(redis.port), "--interval", "0.1", stdout=theirs)
    os.close(theirs)
    said = b""
    try:
        while b"Ctrl-C ends" not in said:
            assert select.select([ours], [], [], 30)[0], said
            said += os.read(ours, 1 << 16)
        (pid,) = there.commands()
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: it has ended
            while data := os.read(ours, 1 << 16):
                said += data
        assert "Traceback" not in ends(process, pid)[1] and process.returncode == 0
        assert b"s in all" in said
    finally:
        os.close(ours)
        process.kill()
        process.communicate()


def test_a_reader_that_goes_away_ends_it(there: Host, redis: Sut) -> None:
    with watching(there, redis) as (process, pid):
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(30) != 0
        eventually(lambda: gone(pid), 20, "the process there has ended")
        process.stdout = None


def test_a_reader_that_takes_its_time_does_not_end_it(there: Host, redis: Sut) -> None:
    # Nobody reads what it prints: pipes are full before long. The agent must not take that for silence.
    there.install(there.script(IMPATIENT))
    there.first = "from kflex_repro.remote import frames; frames.ALIVE_S = 0.2"
    try:
        with watching(there, redis) as (process, pid):
            assert process.stdout is not None
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
            pidfd = os.pidfd_open(pid)
            ended = select.select([pidfd], [], [], 5)[0]
            os.close(pidfd)
            assert not ended
            process.send_signal(signal.SIGINT)
            out, _ = ends(process, pid)
    finally:
        there.first = ""
    assert json.loads(out.splitlines()[-1])["type"] == "summary"


IMPATIENT = "from kflex_repro.remote import frames; frames.ALIVE_S, frames.SILENCE_S = 0.2, 2.0"


def test_silence_from_here_ends_the_process_there(there: Host, redis: Sut) -> None:
    there.install(there.script(IMPATIENT))
    with watching(there, redis) as (process, pid):
        process.send_signal(signal.SIGSTOP)  # as a network that swallows everything
        eventually(lambda: gone(pid), 20, "the process there has ended")
        process.send_signal(signal.SIGCONT)
        _, err = ends(process, pid)
    one_line(err, "the connection broke")


def test_silence_from_there_is_a_broken_connection(there: Host, redis: Sut) -> None:
    there.first = IMPATIENT
    try:
        with watching(there, redis) as (process, pid):
            (session,) = there.sessions()
            os.kill(session, signal.SIGSTOP)
            out, err = process.communicate(timeout=60)
            del out
            os.kill(session, signal.SIGCONT)
            ends(process, pid)
    finally:
        there.first = ""
    one_line(err.decode(), "the connection broke", "nothing heard for 2 s")


def test_a_second_ctrl_c_does_not_wait_for_the_result(there: Host, redis: Sut) -> None:
    there.install(there.script("from kflex_repro.remote import agent; agent._GRACE_S = 0.5"))
    with watching(there, redis) as (process, pid):
        os.kill(pid, signal.SIGSTOP)  # it will not answer the first
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert b"again" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        # The agent kills what does not end.
        eventually(lambda: gone(pid), 20, "the process there has ended")


def test_ctrl_c_on_many_hosts_ends_each_and_fetches(there: Host, redis: Sut, here: Path) -> None:
    inventory = here / "hosts.toml"
    inventory.write_text(
        "".join(
            f'[server.{name}]\naddresses = ["127.0.0.1:{there.port}"]\nuser = "root"\n' for name in ("a", "b")
        )
    )
    words = ("--interval", "0.1", "--hosts", inventory, "--results", here / "out")
    process = there.popen("monitor", "--port", str(redis.port), "--json", *words, host=False)
    try:
        outputs = [here / "out" / name / "output.json" for name in ("a", "b")]
        eventually(
            lambda: all(one.exists() and one.stat().st_size for one in outputs), 30, "both say something"
        )
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert [row["exit"] for row in json.loads(out)["hosts"]] == [0, 0]
        for one in outputs:
            assert json.loads(one.read_text().splitlines()[-1])["type"] == "summary"
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_while_nobody_answers(there: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"root@127.0.0.1:{silent.getsockname()[1]}"
        process = there.popen(*LIST, "--host", name, host=False)
        try:
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(64).startswith(b"SSH-2.0-")
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=30)
            assert (process.returncode, err.strip()) == (130, b"kflex-repro: interrupted")
        finally:
            process.kill()
            process.communicate()


# --- hosts that cannot ------------------------------------------------------------------------------------


def test_a_host_that_is_down(there: Host) -> None:
    ran = there.run(*LIST, "--host", f"root@127.0.0.1:{free_port()}", host=False)
    assert ran.returncode == 1
    one_line(ran.stderr, "cannot connect", "Connection refused", "is the host up")


def test_a_host_without_the_toolkit(there: Host) -> None:
    ran = there.run(*LIST, toolkit=False)
    assert ran.returncode == 1
    one_line(ran.stderr, "kflex-repro is not there", "make setup", "--remote-command")
    there.toolkit.unlink()
    ran = there.run(*LIST)
    assert ran.returncode == 1
    one_line(ran.stderr, f"kflex-repro is not there ({there.toolkit})")


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("echo \"Error: No such command 'remote-agent'.\" >&2; exit 2", "another version"),
        (
            r"""printf '\0kflex-remote\0H\0\0\0\41{"protocol": 1, "version": "0.0"}'; cat""",
            f"0.0, here {__version__}",
        ),
        ("echo ImportError: no click >&2; exit 1", "does not start (exit code 1): ImportError: no click"),
        (
            "echo 'sudo: a password is required' >&2; exit 1",
            "sudo there does not let us in without a password",
        ),
        (r"printf '\0kflex-remote\0garbage that is no frame'; cat", "the connection broke"),
    ],
)
def test_a_toolkit_that_is_not_ours(there: Host, script: str, part: str) -> None:
    there.install(script)
    ran = there.run(*LIST)
    assert ran.returncode == 1
    one_line(ran.stderr, part)


def test_a_host_without_perf(there: Host, here: Path) -> None:
    there.install("PATH=/nowhere " + there.script())
    ran = there.run("profile", "--all", "--duration", "0.2", "--out", here / "profile")
    assert ran.returncode != 0
    one_line(ran.stderr, f"kflex-repro: {there.name}: ", "perf")
    assert not (here / "profile").exists()


def test_what_the_login_shell_prints_is_no_output(there: Host) -> None:
    there.install("echo Welcome to this machine; " + there.script())
    ran = there.run(*LIST)
    assert (ran.returncode, ran.stderr, ran.stdout.split()) == (0, "", ["0", "read"])


def test_a_full_disk_there(tmp_path: Path) -> None:
    require("root")
    require("tp_btf")
    full = tmp_path / "ssh" / "there"
    full.mkdir(parents=True)
    mounted = f'mount -t tmpfs -o size=16k none {full} && exec "$@"'
    with host(
        tmp_path / "ssh", ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounted, "sh"]
    ) as there:
        png = tmp_path / "chart.png"
        ran = there.run("trace", "syscalls", "--duration", "0.2", "--png", png)
        assert ran.returncode == 1
        last = ran.stderr.splitlines()[-1]
        assert last.startswith(f"kflex-repro: {there.name}: ") and "No space left on device" in last
        assert "Traceback" not in ran.stderr and not png.exists()
        # In the daemon's own mount namespace.
        assert there.process is not None
        assert not list(Path(f"/proc/{there.process.pid}/root{full}").iterdir())


# --- results on their way ---------------------------------------------------------------------------------


def _sftp(there: Host, script: str) -> None:
    """What stands between the results and us."""
    path = there.base / "sftp"
    path.write_text(f"#!/bin/sh\n{script}\nexec /usr/lib/openssh/sftp-server\n")
    path.chmod(0o755)
    there.sftp = str(path)
    there.serve()


@pytest.fixture
def rerouted(there: Host) -> Iterator[Host]:
    """A host whose SFTP the test chooses."""
    yield there
    there.sftp = "internal-sftp"
    there.serve()


def test_a_result_that_is_damaged_on_the_way_replaces_nothing(rerouted: Host, here: Path) -> None:
    require("tp_btf")
    png = here / "chart.png"
    png.write_bytes(b"the old one")
    _sftp(
        rerouted,
        f"printf X | dd of=$(echo {rerouted.there}/*/png/chart.png) bs=1 seek=99 conv=notrunc status=none",
    )
    ran = rerouted.run("trace", "syscalls", "--duration", "0.2", "--png", png)
    assert ran.returncode == 1
    assert "the result arrived damaged, twice" in ran.stderr.splitlines()[-1]
    assert png.read_bytes() == b"the old one" and [one.name for one in here.iterdir()] == ["chart.png"]


def test_a_connection_that_breaks_with_the_result_unread_is_made_anew(rerouted: Host, here: Path) -> None:
    require("tp_btf")
    png, once = here / "chart.png", here / "once"
    _sftp(rerouted, f"if ! [ -e {once} ]; then : > {once}; kill -9 $PPID; exit; fi")
    ran = rerouted.run("trace", "syscalls", "--duration", "0.2", "--png", png)
    assert ran.returncode == 0, ran.stderr
    assert once.exists() and png.read_bytes().startswith(b"\x89PNG")


# --- many -------------------------------------------------------------------------------------------------


def test_many_hosts_at_once_each_with_its_own_end(there: Host, here: Path) -> None:
    require("tp_btf")
    inventory = here / "hosts.toml"
    inventory.write_text(
        f'[server.db1]\naddresses = ["127.0.0.1:{there.port}"]\nuser = "root"\n'
        f'[server.db2]\naddresses = ["127.0.0.1:{free_port()}", "127.0.0.1:{there.port}"]\nuser = "root"\n'
        f'[test.client]\naddresses = ["127.0.0.1:{free_port()}"]\nuser = "root"\n'
    )
    words = ("trace", "syscalls", "--duration", "0.3", "--json", "--png", "chart.png")
    many = ("--hosts", inventory, "--results", here / "out")
    ran = there.run(*words, *many, host=False)
    assert ran.returncode == 1, ran.stderr
    rows = {row["host"]: row for row in json.loads(ran.stdout)["hosts"]}
    assert {name: row["exit"] for name, row in rows.items()} == {"db1": 0, "db2": 0, "client": None}
    assert "cannot connect" in rows["client"]["error"]
    for name in ("db1", "db2"):
        assert json.loads((here / "out" / name / "output.json").read_text())["syscalls"]
        assert (here / "out" / name / "chart.png").read_bytes().startswith(b"\x89PNG")
    # Of these only those that are servers: then all is well, and a table says so.
    ran = there.run(*LIST, *many, "--only", "server", host=False)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[:2] for line in ran.stdout.splitlines()[1:]] == [["db1", "done"], ["db2", "done"]]
    assert (here / "out" / "db1" / "output.txt").read_text().split() == ["0", "read"]
