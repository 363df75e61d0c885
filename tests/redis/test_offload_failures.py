"""Trouble: servers and toolkits killed under load, stops under load, second starts, what is not a Redis.

After each of them the machine is as it was: programs, maps, links, pins, cgroups, namespaces, processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.redis.resp import ErrorReply, encode_command
from tests.redis import checker
from tests.redis.harness import (
    PLAIN_ONLY,
    Conn,
    Snapshot,
    Sut,
    cli,
    eventually,
    kill,
    need_offload,
    offloaded_server,
)

pytestmark = [
    pytest.mark.bpf,
    pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no offload to fail"),
]

ROOT = Path(__file__).resolve().parents[2]
TABLE = 32 << 20


@pytest.fixture(autouse=True)
def as_before() -> Iterator[Snapshot]:
    """Each of these tests, not only the module, leaves nothing."""
    need_offload()
    before = Snapshot.take()
    yield before
    before.must_return()


@pytest.fixture
def server() -> Iterator[Any]:
    """A redis-server with the module, not attached yet."""
    from kflex_repro import build
    from kflex_repro.redis.server import ManagedServer

    with ManagedServer(["--enable-debug-command", "yes"], module=build.ensure().module) as managed:
        yield managed
    stop_whatever_is_left(managed)


def stop_whatever_is_left(managed: Any) -> None:
    """So that one failed test does not spoil the next."""
    from kflex_repro.offload import session as offload

    with contextlib.suppress(KflexError):
        found = offload.find(managed.port)
        if found is not None:
            found.stop(timeout=2.0, force=True)


def start(server: Any) -> Any:
    from kflex_repro.offload import attach

    return attach.start(server.port, table_bytes=TABLE)


class Load:
    """Clients of a server, in processes of their own, that check every answer until told to stop."""

    def __init__(self, port: int, profile: str = "mixed", **settings: Any) -> None:
        self.config = checker.configure(profile, port=port, ops=1 << 60, seconds=60.0, **settings)
        context = multiprocessing.get_context("fork")
        self._said, said = context.Pipe(duplex=False)
        self._go, go = context.Pipe(duplex=False)
        self._stop = go
        self.process = context.Process(target=self._run, args=(said,))
        self.process.start()
        said.close()

    def _run(self, said: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        deadline = threading.Event()

        def watch() -> None:
            with contextlib.suppress(EOFError, OSError):
                self._go.recv()
            deadline.set()

        threading.Thread(target=watch, daemon=True).start()
        said.send(checker.run(self.config, until=deadline.is_set))

    def stop(self) -> checker.Report:
        """Ends the load; what the checker says of it."""
        self._stop.send("stop")
        try:
            assert self._said.poll(60), "the load does not end"
            report: checker.Report = self._said.recv()
        finally:
            self.process.join(10)
            if self.process.is_alive():
                self.process.terminate()
        return report

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._stop.send("stop")
        self.process.join(15)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def busy(session: Any, more: int = 2000) -> None:
    """Waits until the kernel has served so many requests more."""

    def served() -> int:
        stats = session.stats()
        return int(stats["served_get"]) + int(stats["served_set"])

    goal = served() + more
    eventually(lambda: served() >= goal, timeout=20, what="load")


# -- starting and stopping --


def test_start_and_stop_leave_nothing(server: Any) -> None:
    for _ in range(3):
        before = Snapshot.take()
        with start(server) as session:
            assert session.pin_dir.exists()
            with Conn(server.port) as conn:
                conn.do("SET", "k", "v")
                assert conn.do("GET", "k") == b"v"
        assert not session.pin_dir.exists()
        before.must_return()


def test_a_second_start_is_the_first(server: Any) -> None:
    with start(server) as first:
        with Conn(server.port) as conn:
            conn.do("PING")
            conn.do("SET", "k", "v")
            after_one = Snapshot.take()
            second = start(server)
            assert second.server_id == first.server_id
            assert not after_one.difference(Snapshot.take())
            assert conn.do("GET", "k") == b"v"
            busy_before = second.stats()["served_get"]
            for _ in range(10):
                conn.do("GET", "k")
            assert first.stats()["served_get"] == second.stats()["served_get"] > busy_before
        second.close()


def test_the_command_line(server: Any) -> None:
    port = ("--port", str(server.port))
    assert cli("offload", "status", *port).returncode == 1
    dry = cli("offload", "start", *port, "--table-size", "32m", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    started = cli("offload", "start", *port, "--table-size", "32m", "--json")
    assert started.returncode == 0, started.stderr
    assert json.loads(started.stdout)["state"] == "on"
    again = cli("offload", "start", *port, "--table-size", "32m", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["server_id"] == json.loads(started.stdout)["server_id"]
    with Conn(server.port) as conn:
        for number in range(20):
            assert conn.do("SET", "k", number) == b"OK"
            assert conn.do("GET", "k") == b"%d" % number
    shown = cli("offload", "status", *port, "--json")
    (data,) = json.loads(shown.stdout)
    assert data["serves"] == ["get", "set"]
    assert data["rules"] == {}
    assert data["stats"]["served_set"] > 10
    assert "serving GET and SET" in cli("offload", "status", *port).stdout
    assert cli("offload", "stop", *port, "--dry-run").returncode == 0
    assert cli("offload", "status", *port).returncode == 0
    stopped = cli("offload", "stop", *port)
    assert stopped.returncode == 0, stopped.stderr
    assert cli("offload", "stop", *port).returncode == 0


def test_two_servers_at_once(server: Any) -> None:
    with offloaded_server() as other, start(server) as session:
        conns = [Conn(server.port), other.connect()]
        for conn, value in zip(conns, ("one", "two"), strict=True):
            for _ in range(20):
                assert conn.do("SET", "k", value) == b"OK"
                assert conn.do("GET", "k") == value.encode()
        assert session.stats()["served_get"] > 5
        assert other.stats()["served_get"] > 5
        session.stop()
        before = other.served()
        assert [conns[1].do("GET", "k") for _ in range(10)] == [b"two"] * 10
        assert other.served() > before
        conns[0].close()


# -- stopping under load --


def test_stop_under_load(server: Any) -> None:
    """Clients notice nothing: no reply is lost, none is wrong, every SET is in Redis."""
    session = start(server)
    with Load(server.port, workers=2, connections=24) as load:
        busy(session)
        session.stop()
        report = load.stop()
    assert report.ops > 1000
    assert not report.violations, str(report)


def test_on_and_off_under_load(server: Any) -> None:
    """Connections of before a start pass, those made since are served: all of it is one truth."""
    with Load(server.port, workers=2, connections=24, seed=3) as load:
        for _ in range(4):
            session = start(server)
            busy(session, 300)
            session.stop()
        report = load.stop()
    assert not report.violations, str(report)


def test_a_stop_waits_for_replies_that_nobody_has_read(server: Any) -> None:
    session = start(server)
    with Conn(server.port) as conn:
        conn.do("SET", "k", "v")
        eventually(lambda: conn.do("GET", "k") == b"v" and session.stats()["served_get"] > 0)
        served = session.stats()["served_get"]
        conn.send("GET", "k")
        assert session.stats()["served_get"] == served + 1
        with pytest.raises(KflexError, match="do not read"):
            session.stop(timeout=0.3)
        # Disabled, everything passes, in order.
        conn.send("STRLEN", "k")
        assert [conn.read(), conn.read()] == [b"v", 1]
        assert conn.do("SET", "k", "w") == b"OK"
        session.stop(timeout=5)
        assert conn.do("GET", "k") == b"w"


def test_others_start_and_stop_while_a_stop_waits(server: Any) -> None:
    session = start(server)
    with Conn(server.port) as conn, ThreadPoolExecutor(1) as pool:
        conn.do("SET", "k", "v")
        eventually(lambda: conn.do("GET", "k") == b"v" and session.stats()["served_get"] > 0)
        conn.send("GET", "k")
        assert session.unread()
        waiting = pool.submit(session.stop, timeout=60.0)
        eventually(lambda: session.disabled != "on", what="the stop under way")
        with offloaded_server() as other, other.connect() as elsewhere:
            other.must_serve(elsewhere, ("SET", "k", "other"))
        assert not waiting.done()
        assert conn.read() == b"v"
        waiting.result(timeout=30)
        assert not session.pin_dir.exists()


def test_a_forced_stop(server: Any) -> None:
    session = start(server)
    with Conn(server.port) as conn:
        conn.do("SET", "k", "v")
        eventually(lambda: conn.do("GET", "k") == b"v" and session.stats()["served_get"] > 0)
        conn.send("GET", "k")
        session.stop(timeout=0.3, force=True)
    with Conn(server.port) as conn:
        assert conn.do("GET", "k") == b"v"


def test_everything_accepted_is_in_redis_after_a_stop(server: Any) -> None:
    for round_ in range(3):
        session = start(server)
        with Conn(server.port) as conn:
            conn.do("PING")
            for number in range(300):
                assert conn.do("SET", f"k{number}", f"{round_}:{number}") == b"OK"
            assert session.stats()["served_set"] > 100
            session.stop()
            for number in range(300):
                assert conn.do("GET", f"k{number}") == b"%d:%d" % (round_, number)


# -- a server that is killed, stopped, restarted --


def test_a_killed_server(server: Any) -> None:
    """Its clients learn it at once; nothing is answered in its name; stop takes the rest away."""
    session = start(server)
    idle = Conn(server.port)
    idle.do("SET", "k", "v")
    eventually(lambda: idle.do("GET", "k") == b"v" and session.stats()["served_get"] > 0)
    with Load(server.port, workers=2, connections=24) as load:
        busy(session)
        server.kill()
        report = load.stop()
    # The load's clients lost their connections, and saw nothing else.
    for violation in report.violations:
        first = violation.splitlines()[0]
        assert any(
            word in first for word in ("closed", "reset", "failed", "refused", "Refused", "come up")
        ), violation
    before = session.stats()
    with contextlib.suppress(ConnectionError):
        reply = idle.do("GET", "k")
        raise AssertionError(f"a dead server answered {reply!r}")
    idle.close()
    after = session.stats()
    assert after["served_get"] == before["served_get"]
    assert session.disabled == "server_gone"
    session.stop()


def test_a_killed_server_comes_back(server: Any) -> None:
    """Another incarnation on the same port is another server: it has none of the old one's keys."""
    session = start(server)
    with Conn(server.port) as conn:
        for number in range(50):
            conn.do("SET", f"k{number}", "old")
    server.kill()
    server.start()
    with Conn(server.port) as conn:
        for number in range(50):
            assert conn.do("GET", f"k{number}") is None
            assert conn.do("SET", f"k{number}", "between") == b"OK"
    fresh = start(server)
    assert fresh.server_id != session.server_id
    assert not session.pin_dir.exists()
    session.close()
    with Conn(server.port) as conn:
        for number in range(50):
            assert conn.do("GET", f"k{number}") == b"between"
            assert conn.do("GET", f"k{number}") == b"between"
        assert fresh.stats()["served_get"] > 0
    fresh.stop()


def test_a_server_that_shuts_down(server: Any) -> None:
    session = start(server)
    with Conn(server.port) as conn:
        conn.do("PING")
        for number in range(50):
            conn.do("SET", f"k{number}", number)
        conn.send("SHUTDOWN", "NOSAVE")
        eventually(lambda: not server.running, timeout=10)
        assert conn.closed()
    assert session.disabled in ("unloaded", "server_gone")
    session.stop()


@pytest.mark.parametrize("command", [("DEBUG", "SEGFAULT"), ("DEBUG", "PANIC")], ids=" ".join)
def test_a_server_that_crashes(server: Any, command: tuple[str, ...]) -> None:
    session = start(server)
    conns = [Conn(server.port) for _ in range(5)]
    for conn in conns:
        conn.do("SET", "k", "v")
        conn.do("GET", "k")
    conns[0].send(*command)
    eventually(lambda: not server.running, timeout=20, what="the crash")
    for conn in conns[1:]:
        with pytest.raises((ConnectionError, AssertionError)):
            for _ in range(3):
                conn.do("GET", "k")
        conn.close()
    conns[0].close()
    session.stop()


def test_a_server_that_replaces_itself(server: Any) -> None:
    """DEBUG RESTART keeps the process id, and nothing else."""
    session = start(server)
    conn = Conn(server.port)
    conn.do("SET", "k", "v")
    eventually(lambda: conn.do("GET", "k") == b"v" and session.stats()["served_get"] > 0)
    conn.send("DEBUG", "RESTART", "0")
    assert conn.closed()
    conn.close()

    def answers() -> bool:
        with contextlib.suppress(OSError, AssertionError), Conn(server.port, timeout=1) as fresh:
            return bool(fresh.do("PING") == b"PONG")
        return False

    eventually(answers, timeout=15, what="the server again")
    assert session.disabled == "server_gone"
    with Conn(server.port) as fresh:
        for _ in range(5):
            assert fresh.do("GET", "k") is None
            fresh.do("SET", "j", "w")
    again = start(server)
    with Conn(server.port) as fresh:
        fresh.do("PING")
        for number in range(20):
            assert fresh.do("SET", "k", number) == b"OK"
            assert fresh.do("GET", "k") == b"%d" % number
    session.close()
    again.stop()


def test_a_stop_of_a_stopped_server_does_not_hang(server: Any) -> None:
    """It cannot give back what it holds: one clear error in time; a stop when it runs again works."""
    session = start(server)
    with Conn(server.port) as conn:
        conn.do("PING")
        for number in range(50):
            conn.do("SET", f"k{number}", number)
        os.kill(server.pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            with pytest.raises(KflexError) as error:
                session.stop(timeout=1.0)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert time.monotonic() - began < 15
        assert "\n" not in str(error.value)
        from kflex_repro.offload import session as offload

        again = offload.find(server.port)
        assert again is not None
        again.stop()
        session.close()
        for number in range(50):
            assert conn.do("GET", f"k{number}") == b"%d" % number


def test_the_module_unloaded(tmp_path: Path) -> None:
    """MODULE UNLOAD works or is refused; either way the answers stay right."""
    with offloaded_server(["--enable-module-command", "yes"]) as sut:
        conn, control = sut.connect(), sut.connect()
        conn.do("SET", "k", "v")
        sut.warm(conn, "k")
        conn.do("SET", "k", "w")
        control.do("MODULE", "UNLOAD", "kflex")
        for number in range(20):
            assert conn.do("GET", "k") == (b"%d" % (number - 1) if number else b"w")
            assert conn.do("SET", "k", number) == b"OK"
            assert control.do("GETRANGE", "k", 0, -1) == b"%d" % number


# -- a toolkit that is killed --

STARTER = """
import sys, time
from kflex_repro.offload import attach
made = attach.start(int(sys.argv[1]), table_bytes=32 << 20)
print("started", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def toolkit(port: int) -> Iterator[subprocess.Popen[str]]:
    """A process that starts the offload and stays."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process.pid)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_killed_toolkit(server: Any) -> None:
    """The programs stay, pinned and serving; `offload stop` of another process takes them off."""
    from kflex_repro.offload import session as offload

    with toolkit(server.port) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        session = offload.find(server.port)
        assert session is not None
        with Load(server.port, workers=2, connections=24) as load:
            busy(session)
            kill(process.pid)
            process.wait()
            busy(session)
            stopped = cli("offload", "stop", "--port", str(server.port))
            assert stopped.returncode == 0, stopped.stderr
            report = load.stop()
        session.close()
        assert not report.violations, str(report)


def test_a_toolkit_killed_while_it_starts(server: Any) -> None:
    """At whatever moment: a stop then takes away all there is, and a start afterwards works."""
    generator = random.Random(11)
    for _ in range(6):
        before = Snapshot.take()
        with toolkit(server.port) as process:
            assert process.stdout is not None
            # Its start takes a few tenths of a second: each time another moment of it.
            select.select([process.stdout], [], [], generator.uniform(0.05, 0.8))
            kill(process.pid)
            process.wait()
        with Conn(server.port) as conn:
            for number in range(20):
                assert conn.do("SET", "k", number) == b"OK"
                assert conn.do("GET", "k") == b"%d" % number
        stopped = cli("offload", "stop", "--port", str(server.port))
        assert stopped.returncode == 0, stopped.stderr
        before.must_return()
    with start(server), Conn(server.port) as conn:
        assert conn.do("SET", "k", "v") == b"OK"


def test_a_start_after_a_start_that_was_killed(server: Any) -> None:
    generator = random.Random(12)
    for _ in range(3):
        with toolkit(server.port) as process:
            assert process.stdout is not None
            select.select([process.stdout], [], [], generator.uniform(0.1, 0.6))
            kill(process.pid)
            process.wait()
        with start(server) as session, Conn(server.port) as conn:
            conn.do("SET", "k", "v")
            eventually(
                lambda conn=conn, s=session: conn.do("GET", "k") == b"v" and s.stats()["served_get"] > 0
            )


# -- what cannot be started --


def refused(*args: str) -> str:
    """`offload start` with these arguments fails with one line, no traceback; the line."""
    run = cli("offload", "start", "--table-size", "32m", *args)
    assert run.returncode not in (0, 2), run.stdout
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr
    return lines[0]


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "listens" in refused("--port", str(port))


def test_a_redis_without_the_module() -> None:
    from kflex_repro.redis.server import ManagedServer

    with ManagedServer() as plain:
        assert "kflex.so" in refused("--port", str(plain.port))


@pytest.mark.parametrize(
    "says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x16", b"", None]
)
def test_something_that_is_no_redis(says: bytes | None) -> None:
    """A web server, a TLS server, one that hangs up, one that says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        ends = threading.Event()

        def answer() -> None:
            while not ends.is_set():
                with contextlib.suppress(OSError):
                    listener.settimeout(0.1)
                    peer, _ = listener.accept()
                    with peer:
                        if says is None:
                            ends.wait(10)
                        peer.settimeout(1)
                        peer.recv(100)
                        peer.sendall(says or b"")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert refused("--port", str(listener.getsockname()[1]))
        finally:
            ends.set()
            thread.join()


def test_a_server_that_wants_a_password() -> None:
    from kflex_repro import build
    from kflex_repro.redis.server import ManagedServer

    with ManagedServer(["--requirepass", "x"], module=build.ensure().module) as locked:
        assert "password" in refused("--port", str(locked.port))


def test_a_table_larger_than_the_machine(server: Any) -> None:
    run = cli("offload", "start", "--port", str(server.port), "--table-size", "100000g")
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1
    assert "Traceback" not in run.stderr


def test_bad_arguments(server: Any) -> None:
    for args in (("--table-size", "many"), ("--table-size", "-1"), ("--port", "0"), ("--port", "x")):
        run = cli("offload", "start", "--port", str(server.port), *args)
        assert run.returncode in (1, 2), args
        assert "Traceback" not in run.stderr


def test_a_server_that_is_busy(server: Any) -> None:
    """Longer than anyone wants to wait: one line."""
    with Conn(server.port) as conn:
        conn.send("DEBUG", "SLEEP", "4")
        assert "answer" in refused("--port", str(server.port))
        assert conn.read() == b"OK"


def test_without_root(server: Any) -> None:
    run = subprocess.run(
        [
            "setpriv",
            "--reuid",
            "65534",
            "--clear-groups",
            sys.executable,
            "-m",
            "kflex_repro",
            "offload",
            "start",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HOME": "/nonexistent"},
        timeout=60,
    )
    if "Permission denied" in run.stderr or "No module named" in run.stderr:
        pytest.skip("another user cannot read this installation")
    assert run.returncode == 3, run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_the_error_of_a_refused_reply(server: Any) -> None:
    """An offload that is off answers as Redis does, errors too."""
    with start(server), Conn(server.port) as conn:
        conn.send_bytes(encode_command("SET", "k"))
        assert isinstance(conn.read(), ErrorReply)


def test_only_one_server_under_test_remains() -> None:
    """The module's own helper leaves nothing either."""
    before = Snapshot.take()
    with offloaded_server() as sut:
        assert isinstance(sut, Sut)
        assert before.difference(Snapshot.take())
    before.must_return()


# -- many at once, where nobody has mounted bpffs --

ENTER = """
import multiprocessing
from kflex_repro.bpf import fs
from kflex_repro.offload import places

def enter(barrier, said):
    try:
        for _ in range(10):
            barrier.wait(60)
            with places.entered() as root:
                with open("/proc/self/mounts") as mounts:
                    assert sum(" /sys/fs/bpf " in mount for mount in mounts) == 1
                places.leave_root(root)
        said.put("")
    except BaseException as error:
        barrier.abort()
        said.put(repr(error))

barrier, said = multiprocessing.Barrier(6), multiprocessing.Queue()
processes = [multiprocessing.Process(target=enter, args=(barrier, said)) for _ in range(6)]
for process in processes:
    process.start()
print({said.get() for _ in processes}, fs.mounts("bpf"))
"""


def test_starts_that_mount_bpffs_at_once() -> None:
    """One mounts it, the last one takes it away; below a second mount, pins in the first would be hidden."""
    inside = 'while umount /sys/fs/bpf 2>/dev/null; do :; done; exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", inside, "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", ENTER],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("{''} []\n", "")
