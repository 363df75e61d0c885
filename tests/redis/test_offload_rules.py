"""When not to: each condition under which serving would break a promise is made true, live, and false again.

While it is true the kernel must not serve (SETs, or anything), from the very moment on in which the client
that made it true has its answer; Redis's answers must be those of a plain server; `offload status` names the
reason.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kflex_repro.redis.resp import ErrorReply, Push
from kflex_repro.redis.server import free_port
from tests.redis.harness import Conn, Sut, eventually, offloaded_server, plain_server

pytestmark = [pytest.mark.bpf, pytest.mark.emulated]

Command = tuple[str, ...]


class Rules:
    """The server under test with a served connection, one that changes things, and what is to be seen."""

    def __init__(self, sut: Sut) -> None:
        self.sut = sut
        self.conn, self.control = sut.connect(), sut.connect()
        self.control.do("SET", "k", "v")
        sut.warm(self.conn, "k")
        self.control.do("PING")
        self.both_served()

    def both_served(self) -> None:
        self.sut.must_serve(self.conn, ("SET", "k", "v"))
        self.sut.must_serve(self.conn, ("GET", "k"))

    def must_not_serve(self, sets: bool = True, gets: bool = True, rounds: int = 30) -> None:
        """From now on: neither (or only GETs); the answers are right."""
        before = self.sut.stats()
        for number in range(rounds):
            if sets:
                assert self.conn.do("SET", "k", number) == b"OK"
                assert self.conn.do("GET", "k") == b"%d" % number
            else:
                assert self.conn.do("GET", "k") == b"v"
        after = self.sut.stats()
        assert after["served_set"] == before["served_set"]
        if gets:
            assert after["served_get"] == before["served_get"]

    def reason(self, name: str) -> None:
        """The status comes to show this reason, and no other."""
        if not self.sut.offloaded:
            return
        from kflex_repro.offload import status

        session = self.sut.session
        eventually(lambda: session.rules == (name,), what=f"the rule {name}; now {session.rules}")
        assert name in status.as_dict(session)["rules"]

    def served_again(self) -> None:
        if self.sut.offloaded:
            session = self.sut.session
            eventually(lambda: session.rules == (), timeout=5.0, what=f"no rule; {session.rules}")
        self.control.do("SET", "k", "v")
        self.both_served()

    def only_gets(self, name: str) -> None:
        self.must_not_serve(gets=False)
        self.reason(name)
        self.must_not_serve(gets=False)
        self.sut.must_serve(self.conn, ("GET", "k"))

    def nothing(self, name: str) -> None:
        self.must_not_serve()
        self.reason(name)
        self.must_not_serve()


@pytest.fixture
def rules(sut: Sut) -> Rules:
    return Rules(sut)


CONFIGS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "appendfsync": (
        [("appendonly", "yes"), ("appendfsync", "always")],
        [("appendonly", "no"), ("appendfsync", "everysec")],
    ),
    "maxmemory": ([("maxmemory", "100mb")], [("maxmemory", "0")]),
    "notify": ([("notify-keyspace-events", "KEA")], [("notify-keyspace-events", "")]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["plain", "one command", "transaction"])
def test_settings_that_forbid_set(rules: Rules, name: str, how: str) -> None:
    make, undo = CONFIGS[name]

    def change(pairs: list[tuple[str, str]]) -> None:
        commands = [("CONFIG", "SET", *pair) for pair in pairs]
        if how == "plain":
            assert [rules.control.do(*command) for command in commands] == [b"OK"] * len(commands)
        elif how == "one command":
            assert rules.control.do("CONFIG", "SET", *(word for pair in pairs for word in pair)) == b"OK"
        else:
            replies = rules.control.pipeline(("MULTI",), *commands, ("EXEC",))
            assert replies[-1] == [b"OK"] * len(commands)

    change(make)
    rules.only_gets(name)
    change(undo)
    rules.served_again()


def test_appendonly_with_another_policy_is_fine(rules: Rules) -> None:
    assert rules.control.do("CONFIG", "SET", "appendonly", "yes", "appendfsync", "everysec") == b"OK"
    rules.served_again()
    assert rules.control.do("CONFIG", "SET", "appendfsync", "always") == b"OK"
    rules.only_gets("appendfsync")
    assert rules.control.do("CONFIG", "SET", "appendfsync", "no") == b"OK"
    rules.served_again()
    assert rules.control.do("CONFIG", "SET", "appendonly", "no", "appendfsync", "everysec") == b"OK"


@pytest.mark.smoke("gate")
def test_min_replicas_to_write(rules: Rules) -> None:
    """SETs are then refused, and stay refused."""
    rules.control.do("CONFIG", "SET", "min-replicas-to-write", "1")
    before = rules.sut.stats()
    for _ in range(30):
        reply = rules.conn.do("SET", "k", "w")
        assert isinstance(reply, ErrorReply)
        assert reply.code == "NOREPLICAS"
        assert rules.conn.do("GET", "k") == b"v"
    assert rules.sut.stats()["served_set"] == before["served_set"]
    rules.reason("min_replicas")
    rules.sut.must_serve(rules.conn, ("GET", "k"))
    rules.control.do("CONFIG", "SET", "min-replicas-to-write", "0")
    rules.served_again()


@pytest.mark.smoke("gate")
def test_timeout(rules: Rules) -> None:
    """Redis closes clients that it believes idle: with a timeout it must see every request."""
    rules.control.do("CONFIG", "SET", "timeout", "100")
    rules.nothing("timeout")
    rules.control.do("CONFIG", "SET", "timeout", "0")
    rules.served_again()


@pytest.mark.smoke("gate")
def test_monitor(rules: Rules) -> None:
    """A MONITOR sees every command; when it has gone the service comes back."""
    with Conn(rules.sut.port) as monitor:
        assert monitor.do("MONITOR") == b"OK"
        rules.nothing("monitor")
        assert rules.conn.do("SET", "k", "seen by MONITOR") == b"OK"
        assert b'"SET" "k" "seen by MONITOR"' in monitored(monitor, b"seen by")
    rules.served_again()


def monitored(monitor: Conn, word: bytes) -> bytes:
    """The next line with this word that a client (not the module) has caused."""
    while True:
        line = bytes(monitor.read())
        if word in line and b" ?:0]" not in line:
            return line


def test_every_command_after_monitors_ok_is_seen(sut: Sut) -> None:
    for number in range(10):
        conn = sut.connect()
        conn.do("SET", "k", "v")
        sut.warm(conn, "k")
        with Conn(sut.port) as monitor:
            assert monitor.do("MONITOR") == b"OK"
            conn.do("SET", "k", f"number {number}")
            assert b'"SET" "k" "number %d"' % number in monitored(monitor, b"SET")
            conn.do("GET", "k")
            assert b'"GET" "k"' in monitored(monitor, b"GET")


def test_tracking(rules: Rules) -> None:
    """Client-side caching: the tracking client hears of each SET; GETs of others are served."""
    with Conn(rules.sut.port, proto=3) as tracker:
        assert tracker.do("CLIENT", "TRACKING", "ON") == b"OK"
        for number in range(20):
            assert tracker.do("GET", "k") is not None
            assert rules.conn.do("SET", "k", number) == b"OK"
            message = tracker.read()
            assert isinstance(message, Push)
            assert list(message) == [b"invalidate", [b"k"]]
        rules.only_gets("tracking")
    rules.served_again()


def test_tracking_by_broadcast(rules: Rules) -> None:
    with Conn(rules.sut.port, proto=3) as tracker:
        assert tracker.do("CLIENT", "TRACKING", "ON", "BCAST") == b"OK"
        for number in range(20):
            assert rules.conn.do("SET", "k", number) == b"OK"
            assert list(tracker.read()) == [b"invalidate", [b"k"]]
    rules.served_again()


@pytest.mark.smoke("gate")
def test_pause_of_writes(rules: Rules) -> None:
    writer = rules.sut.connect()
    rules.sut.warm(writer, "k")
    assert rules.control.do("CLIENT", "PAUSE", "60000", "WRITE") == b"OK"
    before = rules.sut.stats()
    writer.send("SET", "k", "paused")
    assert writer.quiet(0.1)
    assert rules.conn.do("GET", "k") == b"v"
    assert rules.sut.stats()["served_set"] == before["served_set"]
    rules.reason("paused")
    assert rules.control.do("CLIENT", "UNPAUSE") == b"OK"
    assert writer.read() == b"OK"
    assert rules.conn.do("GET", "k") == b"paused"
    rules.served_again()


def test_pause_of_everything(rules: Rules) -> None:
    """Not even UNPAUSE is executed before its time is over."""
    assert rules.control.do("CLIENT", "PAUSE", "300", "ALL") == b"OK"
    rules.conn.send("GET", "k")
    assert rules.conn.quiet(0.1)
    assert rules.conn.read() == b"v"
    rules.served_again()


def test_a_pause_that_ends_by_itself(rules: Rules) -> None:
    assert rules.control.do("CLIENT", "PAUSE", "200", "WRITE") == b"OK"
    rules.conn.send("SET", "k", "late")
    assert rules.conn.quiet(0.05)
    assert rules.conn.read() == b"OK"
    rules.served_again()


def test_a_connected_replica(rules: Rules) -> None:
    """SETs go through Redis, so that WAIT tells the truth; without replicas they are served again."""
    with plain_server() as replica:
        upstream = replica.connect()
        assert upstream.do("REPLICAOF", "127.0.0.1", str(rules.sut.port)) == b"OK"
        eventually(
            lambda: b"master_link_status:up" in upstream.do("INFO", "replication"),
            timeout=15,
            what="replication",
        )
        rules.only_gets("replicas")
        for number in range(20):
            assert rules.conn.do("SET", "k", number) == b"OK"
            assert rules.conn.do("WAIT", "1", "5000") == 1
            assert upstream.do("GET", "k") == b"%d" % number
        upstream.do("REPLICAOF", "NO", "ONE")
    # WAIT has ended the service of that connection.
    rules.conn = rules.sut.connect()
    rules.sut.warm(rules.conn)
    rules.served_again()


def test_a_replica_gets_what_the_kernel_accepted(rules: Rules) -> None:
    """SETs up to the moment a replica attaches, and after it has gone and come back."""
    with plain_server() as replica:
        upstream = replica.connect()
        for round_ in range(3):
            for number in range(200):
                assert rules.conn.do("SET", f"key{number}", f"{round_}:{number}") == b"OK"
            upstream.do("REPLICAOF", "127.0.0.1", str(rules.sut.port))
            for number in range(200):
                assert rules.conn.do("SET", f"late{number}", f"{round_}:{number}") == b"OK"
            last = b"%d:199" % round_
            eventually(
                lambda last=last: upstream.do("GET", "late199") == last, timeout=15, what="the last key"
            )
            for number in range(200):
                for kind in ("key", "late"):
                    assert upstream.do("GET", f"{kind}{number}") == b"%d:%d" % (round_, number)
            upstream.do("REPLICAOF", "NO", "ONE")
    rules.served_again()


def test_being_a_replica(sut: Sut) -> None:
    rules = Rules(sut)
    with plain_server() as master:
        origin = master.connect()
        origin.do("SET", "k", "from the master")
        assert rules.control.do("REPLICAOF", "127.0.0.1", str(master.port)) == b"OK"
        before = sut.stats()
        eventually(lambda: rules.conn.do("GET", "k") == b"from the master", timeout=15, what="replication")
        for number in range(20):
            reply = rules.conn.do("SET", "k", "refused")
            assert isinstance(reply, ErrorReply)
            assert reply.code in ("READONLY", "LOADING", "MASTERDOWN")
            origin.do("SET", "k", number)
            eventually(
                lambda number=number: rules.conn.do("GET", "k") == b"%d" % number, what="the master's SET"
            )
        after = sut.stats()
        assert (after["served_get"], after["served_set"]) == (before["served_get"], before["served_set"])
        rules.reason("replica")
        assert rules.control.do("REPLICAOF", "NO", "ONE") == b"OK"
        rules.served_again()


def test_a_failed_save_stops_writes(tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    lost.mkdir()
    with offloaded_server(["--save", "3600 1", "--enable-protected-configs", "yes"]) as sut:
        rules = Rules(sut)
        home = rules.control.do("CONFIG", "GET", "dir")[1]
        assert rules.control.do("CONFIG", "SET", "dir", str(lost)) == b"OK"
        shutil.rmtree(lost)

        def saved(status: bytes) -> bool:
            rules.control.do("BGSAVE")
            return b"rdb_last_bgsave_status:" + status in rules.control.do("INFO", "persistence")

        eventually(lambda: saved(b"err"), what="a failed save", every=0.05)
        rules.reason("disk")
        before = sut.stats()
        for _ in range(20):
            reply = rules.conn.do("SET", "k", "w")
            assert isinstance(reply, ErrorReply)
            assert reply.code == "MISCONF"
            assert rules.conn.do("GET", "k") == b"v"
        assert sut.stats()["served_set"] == before["served_set"]
        sut.must_serve(rules.conn, ("GET", "k"))
        assert rules.control.do("CONFIG", "SET", "dir", home) == b"OK"
        eventually(lambda: saved(b"ok"), what="a save that works", every=0.05)
        rules.served_again()


@contextlib.contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(where)], check=False)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_failed_aof_write_stops_writes(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", "1m") as disk,
        offloaded_server(["--appendonly", "yes"], dir=disk) as sut,
    ):
        rules = Rules(sut)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as stream:
            while True:
                stream.write(b"x" * 4096)
                stream.flush()

        def refused() -> bool:
            reply = rules.conn.do("SET", "big", "x" * 2000)
            return isinstance(reply, ErrorReply) and reply.code == "MISCONF"

        eventually(refused, what="a refused SET")
        rules.reason("aof_error")
        before = sut.stats()
        for _ in range(20):
            assert isinstance(rules.conn.do("SET", "k", "w"), ErrorReply)
            assert rules.conn.do("GET", "k") == b"v"
        assert sut.stats()["served_set"] == before["served_set"]
        filler.unlink()
        eventually(
            lambda: rules.conn.do("SET", "k", "v") == b"OK", timeout=15, what="a SET after room was made"
        )
        rules.served_again()


MODULE = r"""
#include "redismodule.h"
int RedisModule_OnLoad(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
    (void)argv;
    (void)argc;
    return RedisModule_Init(ctx, "harmless", 1, REDISMODULE_APIVER_1);
}
int RedisModule_OnUnload(RedisModuleCtx *ctx)
{
    (void)ctx;
    return REDISMODULE_OK;
}
"""


def test_another_module(tmp_path: Path) -> None:
    """It may write into the keyspace from threads of its own, and without the events that tell what."""
    vendor = Path(__file__).resolve().parents[2] / "module" / "vendor"
    source, library = tmp_path / "harmless.c", tmp_path / "harmless.so"
    source.write_text(MODULE)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", "-I", str(vendor), str(source), "-o", str(library)], check=True
    )
    with offloaded_server(["--enable-module-command", "yes"]) as sut:
        rules = Rules(sut)
        assert rules.control.do("MODULE", "LOAD", str(library)) == b"OK"
        rules.nothing("module")
        assert rules.control.do("MODULE", "UNLOAD", "harmless") == b"OK"
        rules.served_again()


@pytest.mark.parametrize("name", ["GET", "SET", "CONFIG"])
def test_renamed_commands(name: str) -> None:
    with offloaded_server(["--rename-command", name, "HIDDEN"]) as sut:
        conn = sut.connect()
        conn.do("PING")
        for _ in range(20):
            for command in (("SET", "k", "v"), ("GET", "k")):
                reply = conn.do(*command)
                assert isinstance(reply, ErrorReply) == (command[0] == name)
        if sut.offloaded:
            # Without CONFIG nothing else is known either.
            assert "renamed" in sut.session.rules
            assert sut.served() == 0


def test_cluster_mode() -> None:
    args = ["--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--databases", "1"]
    with offloaded_server(args) as sut:
        conn = sut.connect()
        conn.do("PING")
        for _ in range(20):
            for command in (("SET", "k", "v"), ("GET", "k")):
                reply = conn.do(*command)
                assert isinstance(reply, ErrorReply)
                assert reply.code == "CLUSTERDOWN"
        if sut.offloaded:
            assert "cluster" in sut.session.rules
            assert sut.served() == 0


def test_the_modules_own_setting() -> None:
    with offloaded_server(module_args=["set-offload", "no"]) as sut:
        conn = sut.connect()
        conn.do("SET", "k", "v")
        sut.warm(conn, "k")
        for number in range(20):
            assert conn.do("SET", "k", number) == b"OK"
            assert conn.do("GET", "k") == b"%d" % number
        if sut.offloaded:
            assert sut.session.rules == ("set_setting",)
            assert sut.stats()["served_set"] == 0
            assert sut.stats()["served_get"] > 0


def test_rules_that_hold_at_the_start() -> None:
    """What is true already when the offload starts counts from the first request on."""
    with offloaded_server(["--maxmemory", "100mb", "--notify-keyspace-events", "KEA"]) as sut:
        conn = sut.connect()
        conn.do("SET", "k", "v")
        sut.warm(conn, "k")
        for number in range(20):
            conn.do("SET", "k", number)
            assert conn.do("GET", "k") == b"%d" % number
        if sut.offloaded:
            assert set(sut.session.rules) == {"maxmemory", "notify"}
            assert sut.stats()["served_set"] == 0
            assert sut.stats()["served_get"] > 0


def test_io_threads_are_fine() -> None:
    """Replies are then written by other threads, and counted there; the gate is the main thread's as ever."""
    from tests.redis import checker

    with offloaded_server(["--io-threads", "3", "--io-threads-do-reads", "yes"]) as sut:
        Rules(sut)
        report = checker.run(checker.configure("mixed", port=sut.port, ops=30_000, seed=77, seconds=20))
        assert not report.violations, str(report)
        assert sut.broken_promises() == {}


@pytest.mark.smoke("gate")
def test_a_script_that_keeps_redis_busy(rules: Rules) -> None:
    """Redis then answers BUSY from inside the script: SETs must meet that, GETs may be served."""
    assert rules.control.do("CONFIG", "SET", "busy-reply-threshold", "20") == b"OK"
    killer = rules.sut.connect()
    killer.do("PING")
    rules.control.send("EVAL", "while true do end", "0")

    def busy() -> bool:
        reply = killer.do("PING")
        return isinstance(reply, ErrorReply) and reply.code == "BUSY"

    eventually(busy, what="the script, busy")
    before = rules.sut.stats()
    for _ in range(20):
        reply = rules.conn.do("SET", "k", "w")
        assert isinstance(reply, ErrorReply)
        assert reply.code == "BUSY"
        reply = rules.conn.do("GET", "k")
        assert reply == b"v" if rules.sut.offloaded else isinstance(reply, ErrorReply)
    assert rules.sut.stats()["served_set"] == before["served_set"]
    assert killer.do("SCRIPT", "KILL") == b"OK"
    assert isinstance(rules.control.read(), ErrorReply)
    assert rules.conn.do("GET", "k") == b"v"
    rules.served_again()
    assert rules.control.do("CONFIG", "SET", "busy-reply-threshold", "5000") == b"OK"


def test_a_busy_redis_holds_sets_but_not_gets(rules: Rules) -> None:
    """While Redis is busy a GET may still be served; SETs wait for it."""
    # On a slow machine the script takes longer than Redis waits before it answers BUSY.
    assert rules.control.do("CONFIG", "SET", "busy-reply-threshold", "600000") == b"OK"
    rules.served_again()
    rules.control.send("EVAL", "local n=0 for i=1,60000000 do n=n+i end return 'done'", "0")
    replies = [rules.conn.do("GET", "k") for _ in range(20)]
    assert replies == [b"v"] * 20
    assert rules.conn.do("SET", "k", "w") == b"OK"
    assert rules.control.read() == b"done"
    assert rules.conn.do("GETRANGE", "k", 0, -1) == b"w"
    assert rules.control.do("CONFIG", "SET", "busy-reply-threshold", "5000") == b"OK"
    rules.served_again()
