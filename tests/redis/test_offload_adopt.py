"""Connections that are older than the offload: taken over at rest, else left alone; never a wrong reply."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from kflex_repro import build
from kflex_repro.bpf import probe
from kflex_repro.bpf.libbpf import AttachType, MapType, ProgType
from kflex_repro.bpf.maps import Map
from kflex_repro.errors import KflexError
from kflex_repro.offload import adopt, clients, connections, target
from kflex_repro.offload import attach as attaching
from kflex_repro.offload import session as offload
from kflex_repro.redis.resp import ErrorReply, encode_command
from kflex_repro.redis.server import ManagedServer
from tests.redis.harness import (
    PLAIN_ONLY,
    Conn,
    Snapshot,
    Sut,
    cli,
    eventually,
    need_offload,
    rng,
)

pytestmark = [
    pytest.mark.bpf,
    pytest.mark.skipif(PLAIN_ONLY, reason="a plain server adopts nobody"),
]

TABLE = 32 << 20
ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def early_server(args: Sequence[str] = (), **kw: Any) -> Iterator[Sut]:
    """A redis-server with the module that nothing is attached to yet."""
    need_offload()
    if adopt.this_kernel():
        from tests.conftest import unavailable

        unavailable(adopt.this_kernel())
    base = ["--enable-debug-command", "yes", "--databases", "2", *args]
    with ManagedServer(base, module=build.ensure().module, **kw) as server:
        sut = Sut(server)
        try:
            yield sut
        finally:
            sut.hang_up()
            # First: stop waits, up to three seconds, until nobody has the programs any more.
            if sut.session is not None:
                sut.session.close()
            found = offload.find(server.port)
            if found is not None:
                found.stop(force=True)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = Snapshot.take()
    yield
    before.must_return()


@pytest.fixture
def early() -> Iterator[Sut]:
    with early_server() as sut:
        yield sut
        if sut.session is not None and sut.session.server_alive:
            assert sut.broken_promises() == {}


def attach(sut: Sut, **kw: Any) -> adopt.Adoption:
    """`offload start`, first or again."""
    made = attaching.start(sut.port, table_bytes=TABLE, **kw)
    if sut.session is not None:
        sut.session.close()
    sut.session = made
    assert made.adoption is not None
    assert made.adoption.unavailable == ""
    return made.adoption


def state(sut: Sut, conn: Conn) -> connections.Connection:
    """What `offload status --connections` says of a connection."""
    host, port = conn.sock.getsockname()[:2]
    wanted = clients.unpacked(clients.packed(host), port)
    found = [row for row in connections.read(sut.session) if row.client == wanted]
    assert len(found) == 1, found
    return found[0]


def must_be_served(sut: Sut, conn: Conn, key: str = "k") -> None:
    """Adopted, and after its first request served: SET and GET, with the right replies."""
    assert state(sut, conn).adopted
    assert conn.do("SET", key, "first") == b"OK"
    sut.must_serve(conn, ("SET", key, "second"))
    assert conn.do("GET", key) == b"second"
    sut.must_serve(conn, ("GET", key))
    assert state(sut, conn).state == connections.SERVED
    assert state(sut, conn).served >= 2


# -- at rest --


@pytest.mark.parametrize("proto", [2, 3])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_pool_at_rest_is_adopted(proto: int, host: str) -> None:
    with early_server() as sut:
        pool = [sut.connect(host, proto=proto) for _ in range(10)]
        for number, conn in enumerate(pool):
            assert conn.do("SET", f"k{number}", "v") == b"OK"
        done = attach(sut)
        assert done.adopted == 10, str(done)
        assert not done.passing
        for number, conn in enumerate(pool):
            assert state(sut, conn).why == "new: its first request always passes"
            must_be_served(sut, conn, f"k{number}")


def test_the_first_request_passes_and_the_next_are_served(early: Sut) -> None:
    conn = early.connect()
    assert conn.do("SET", "k", "v") == b"OK"
    attach(early)
    assert not early.serves_get(conn, "k")
    early.must_serve(conn, ("GET", "k"), ("GET", "k"))


def test_an_ipv4_address_in_an_ipv6_socket(early: Sut) -> None:
    conn = early.connect("::ffff:127.0.0.1")
    conn.do("PING")
    assert attach(early).adopted == 1
    must_be_served(early, conn)


def test_a_connection_that_was_never_used(early: Sut) -> None:
    conn = early.connect()
    eventually(lambda: len(list(clients.everyone(run_id(early), offload.layouts()))) == 1)
    assert attach(early).adopted == 1
    must_be_served(early, conn)


def run_id(sut: Sut) -> str:
    with Conn(sut.port) as conn:
        text = conn.do("INFO", "server")
    assert isinstance(text, bytes)
    return next(line.split(":")[1] for line in text.decode().split("\r\n") if line.startswith("run_id:"))


def test_new_and_adopted_connections_see_each_other(early: Sut) -> None:
    old = early.connect()
    old.do("SET", "k", 0)
    attach(early)
    new = early.connect()
    early.warm(new, "k")
    early.warm(old, "k")
    for number in range(1, 200, 2):
        assert old.do("SET", "k", number) == b"OK"
        assert new.do("GET", "k") == b"%d" % number
        assert new.do("INCR", "k") == number + 1
        assert old.do("GET", "k") == b"%d" % (number + 1)


def test_a_watch_from_before_still_watches(early: Sut) -> None:
    """WATCH is Redis's affair: an adopted connection keeps it, and a SET of the kernel's breaks it."""
    watcher, other = early.connect(), early.connect()
    watcher.do("SET", "w", 1)
    watcher.do("WATCH", "w")
    other.do("PING")
    assert attach(early).adopted == 2
    other.do("PING")
    early.must_serve(other, ("SET", "w", 2))
    assert watcher.do("MULTI") == b"OK"
    assert watcher.do("SET", "w", 3) == b"QUEUED"
    assert watcher.do("EXEC") is None
    assert watcher.do("GET", "w") == b"2"
    must_be_served(early, watcher)


def test_stop_gives_them_back_and_a_second_start_takes_them_again(early: Sut) -> None:
    pool = [early.connect() for _ in range(5)]
    for _ in range(3):
        assert attach(early).adopted == 5
        for conn in pool:
            must_be_served(early, conn)
        early.session.stop()
        assert pool[0].do("GET", "k") == b"second"
        assert offload.find(early.port) is None
        for conn in pool:
            assert conn.do("SET", "k", "plain") == b"OK"
            assert conn.do("GET", "k") == b"plain"


def test_a_second_start_finds_nothing_to_do(early: Sut) -> None:
    pool = [early.connect() for _ in range(5)]
    for conn in pool:
        conn.do("PING")
    assert attach(early).adopted == 5
    again = attach(early)
    assert (again.adopted, again.already) == (0, 5)
    for conn in pool:
        must_be_served(early, conn)


def test_parked_and_demoted_ones_are_adopted_by_another_start(early: Sut) -> None:
    attach(early)
    parked, demoted = early.connect(), early.connect()
    for _ in range(600):
        assert parked.do("INCR", "n")
    # A command name cut in two cannot be followed.
    demoted.split(encode_command("GET", "k"), 10)
    assert demoted.read() is None
    assert state(early, parked).why.startswith("parked")
    assert state(early, demoted).why.startswith("demoted")
    for _ in range(3):
        assert attach(early).adopted == 2
        must_be_served(early, parked)
        must_be_served(early, demoted)
        for _ in range(600):
            assert parked.do("INCR", "n")
        demoted.split(encode_command("GET", "k"), 10)
        assert demoted.read() == b"second"


# -- not at rest --


def subscribed(conn: Conn) -> Callable[[], None]:
    conn.do("SUBSCRIBE", "news")

    def after() -> None:
        with Conn(conn.sock.getpeername()[1]) as other:
            assert other.do("PUBLISH", "news", "x") == 1
        assert conn.read() == [b"message", b"news", b"x"]
        assert conn.do("UNSUBSCRIBE", "news") == [b"unsubscribe", b"news", 0]

    return after


def in_multi(conn: Conn) -> Callable[[], None]:
    conn.do("MULTI")
    conn.do("SET", "m", 1)

    def after() -> None:
        assert conn.do("GET", "m") == b"QUEUED"
        assert conn.do("EXEC") == [b"OK", b"1"]

    return after


def monitoring(conn: Conn) -> Callable[[], None]:
    conn.do("MONITOR")

    def after() -> None:
        with Conn(conn.sock.getpeername()[1]) as other:
            other.do("ECHO", "heard")
        line = conn.read()
        while b"heard" not in line:  # type: ignore[operator]
            line = conn.read()
        # Nothing is served while it is there.
        conn.sock.close()

    return after


def blocked(conn: Conn) -> Callable[[], None]:
    conn.send("BLPOP", "list", 0)

    def after() -> None:
        with Conn(conn.sock.getpeername()[1]) as other:
            other.do("RPUSH", "list", "x")
        assert conn.read() == [b"list", b"x"]

    return after


def tracking(conn: Conn) -> Callable[[], None]:
    conn.do("HELLO", 3)
    conn.do("CLIENT", "TRACKING", "ON")

    def after() -> None:
        assert conn.do("CLIENT", "TRACKING", "OFF") == b"OK"

    return after


def database_1(conn: Conn) -> Callable[[], None]:
    conn.do("SELECT", 1)
    conn.do("SET", "k", "of 1")

    def after() -> None:
        assert conn.do("GET", "k") == b"of 1"
        assert conn.do("SELECT", 0) == b"OK"

    return after


def half_a_request(conn: Conn) -> Callable[[], None]:
    data = encode_command("SET", "half", "v" * 100)
    conn.send_bytes(data[:-20])

    def after() -> None:
        conn.send_bytes(data[-20:])
        assert conn.read() == b"OK"

    return after


@pytest.mark.parametrize(
    ("become", "flags", "why"),
    [
        (subscribed, "flags=P", "not adopted: subscribed"),
        (in_multi, "flags=x", "not adopted: in MULTI"),
        (monitoring, "flags=O", "not adopted: a MONITOR client"),
        (blocked, "flags=b", "not adopted: blocked"),
        (tracking, "flags=t", "not adopted: tracks keys"),
        (database_1, "db=1", "not adopted: in database 1"),
        (half_a_request, "argv-mem=7 ", "not adopted: a request is half sent"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_who_is_not_at_rest_is_left_alone(
    early: Sut, become: Callable[[Conn], Callable[[], None]], flags: str, why: str
) -> None:
    """It goes on as if nothing had happened; when it is at rest again, another start adopts it."""
    conn, other = early.connect(), early.connect()
    after = become(conn)
    eventually(lambda: flags.encode() in other.do("CLIENT", "LIST"))  # type: ignore[operator]
    done = attach(early, budget=0.1)
    assert done.adopted == 1
    assert dict(done.passing) == {why.removeprefix("not adopted: "): 1}
    assert state(early, conn).why in (why, "forbidden by monitor")
    after()
    if become is monitoring:
        return
    if not early.session.allow:
        eventually(lambda: early.session.allow)
    assert attach(early).adopted == 1
    must_be_served(early, conn)
    assert other.do("PING") == b"PONG"
    # A tracking client forbids SETs until its leaving is noticed.
    eventually(lambda: early.session.rules == ())


def test_a_request_under_way(early: Sut) -> None:
    conn, other = early.connect(), early.connect()
    conn.do("SET", "k", "v")
    # The client reads nothing: its last reply stays in the receive queue.
    conn.send("GET", "k")
    eventually(lambda: conn.unread() == 7)
    done = attach(early, budget=0.1)
    assert done.adopted == 1
    assert dict(done.passing) == {"never at rest": 1}
    assert conn.read() == b"v"
    assert attach(early).adopted == 1
    must_be_served(early, conn)
    must_be_served(early, other)


@pytest.mark.parametrize("cut", range(1, len(encode_command("SET", "k", "vw"))))
def test_a_request_cut_anywhere(shared: Sut, cut: int) -> None:
    """What Redis does not show of a half-sent request (``*3`` alone) is found at the next byte."""
    sut = shared
    data = encode_command("SET", "k", "vw")
    conn = sut.connect()
    conn.do("PING")
    conn.send_bytes(data[:cut])
    attach(sut, budget=0.05)
    conn.send_bytes(data[cut:])
    assert conn.read() == b"OK"
    for number in range(20):
        assert conn.do("SET", "k", number) == b"OK"
        assert conn.do("GET", "k") == b"%d" % number
        assert conn.do("STRLEN", "k") == len(str(number))


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Sut]:
    with early_server() as sut:
        yield sut


@pytest.fixture
def shared(shared_server: Sut) -> Iterator[Sut]:
    yield shared_server
    shared_server.hang_up()
    shared_server.session.stop()


def test_replies_switched_off(early: Sut) -> None:
    """CLIENT LIST does not show it: no reply is counted, so nothing is served until they are on again."""
    conn = early.connect()
    conn.do("SET", "k", "v")
    conn.send("CLIENT", "REPLY", "OFF")
    conn.send("SET", "k", 1)
    with Conn(early.port) as other:
        eventually(lambda: other.do("GET", "k") == b"1")
    attach(early)
    for number in range(20):
        conn.send("SET", "k", number)
        conn.send("GET", "k")
    assert conn.do("CLIENT", "REPLY", "ON") == b"OK"
    for number in range(20):
        assert conn.do("SET", "k", number) == b"OK"
        assert conn.do("GET", "k") == b"%d" % number


def test_a_reader_that_waits_in_recv_while_it_happens(early: Sut) -> None:
    """One thread waits for replies inside the kernel, where the socket is changed under it."""
    conn = early.connect()
    conn.do("SET", "k", "v")
    conn.sock.settimeout(None)
    got: list[object] = []

    def read() -> None:
        for _ in range(401):
            got.append(conn.read())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    eventually(lambda: sleeping_in_recv(reader), what="the reader in recv()")
    assert attach(early).adopted == 1
    conn.send("PING")
    eventually(lambda: len(got) == 1)
    for number in range(200):
        conn.send("SET", "k", number)
        conn.send("GET", "k")
    reader.join(10)
    assert got == [b"PONG", *(reply for number in range(200) for reply in (b"OK", b"%d" % number))]
    assert early.served() > 0


def sleeping_in_recv(thread: threading.Thread) -> bool:
    """Whether a thread of ours is in recvfrom (system call 45)."""
    text = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text()
    return text.startswith("45 ")


def test_who_reads_by_splice_is_never_served(early: Sut) -> None:
    reader = early.connect()
    reader.do("SET", "k", "v")
    assert attach(early).adopted == 1
    out, into = os.pipe()
    try:
        for _ in range(20):
            reader.send("GET", "k")
            got = b""
            while len(got) < 7:
                assert select.select([reader.sock], [], [], 5.0)[0]
                got += os.read(out, os.splice(reader.sock.fileno(), into, 100))
            assert got == b"$1\r\nv\r\n"
    finally:
        os.close(out)
        os.close(into)
    assert state(early, reader).why.startswith("demoted")
    assert early.served() == 0


def test_a_unix_socket_is_none_of_ours() -> None:
    with early_server(unix=True) as sut:
        client = redis.Redis(unix_socket_path=str(sut.server.unix_path))
        client.set("k", "v")
        done = attach(sut)
        assert done.adopted == 0
        assert dict(done.passing) == {"on a unix socket": 1}
        assert client.get("k") == b"v"
        assert [row.why for row in connections.read(sut.session)] == ["not adopted: on a unix socket"]
        client.close()


def test_a_socket_in_the_sockmap_of_another(early: Sut) -> None:
    conn, free = early.connect(), early.connect()
    conn.do("SET", "k", "v")
    with (
        Map.create(MapType.SOCKMAP, 4, 8, 1, name="kflex_other") as other,
        probe._load(ProgType.SK_MSG, 1) as program,
    ):
        program.attach_map(other, AttachType.SK_MSG_VERDICT)
        other.update(b"\0\0\0\0", conn.sock.fileno().to_bytes(8, "little"))
        done = attach(early)
        assert done.adopted == 1
        assert dict(done.passing) == {"its socket is in a sockmap of another program": 1}
        for _ in range(20):
            assert conn.do("GET", "k") == b"v"
        must_be_served(early, free)
        other.delete(b"\0\0\0\0")
        program.detach_map(other, AttachType.SK_MSG_VERDICT)
    assert attach(early).adopted == 1
    must_be_served(early, conn)


def test_the_numbers_run_out(early: Sut) -> None:
    pool = [early.connect() for _ in range(10)]
    for conn in pool:
        conn.do("PING")
    attaching.start(early.port, table_bytes=TABLE, take_over=False).close()
    early.session = offload.find(early.port)
    taken = [early.session.take_number() for _ in range(16384)]
    for number in taken[:4]:
        early.session.give_number(number)
    done = attach(early)
    assert done.adopted == 4
    assert dict(done.passing) == {"all 16384 connection numbers are taken": 6}
    late = early.connect()
    for conn in [*pool, late]:
        assert conn.do("SET", "k", "v") == b"OK"
        assert conn.do("GET", "k") == b"v"
    for number in taken[4:]:
        early.session.give_number(number)
    assert attach(early).adopted == 7
    for conn in [*pool, late]:
        must_be_served(early, conn)


# -- under load --


class Load:
    """Connections that exist already, each used by a thread of its own: a key of their own whose every reply
    is known, and one register that all see, whose versions must never go back."""

    def __init__(self, sut: Sut, count: int, proto: int = 2, think: float = 0.0) -> None:
        self.sut, self.think = sut, think
        self.stop = threading.Event()
        self.failures: list[str] = []
        self.operations = 0
        self.floor = 0
        self.conns = [sut.connect(proto=proto) for _ in range(count)]
        self.conns[0].do("SET", "shared", 0)
        for number, conn in enumerate(self.conns):
            conn.do("SET", f"own{number}", "")
        self.threads = [
            threading.Thread(target=self._guard, args=(number, conn), daemon=True)
            for number, conn in enumerate(self.conns)
        ]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(20)
        if exc[0] is None:
            assert not any(thread.is_alive() for thread in self.threads)
            assert self.failures == []

    def _guard(self, number: int, conn: Conn) -> None:
        try:
            self._run(number, conn)
        except BaseException as error:
            if not self.stop.is_set() or not isinstance(error, OSError):
                self.failures.append(f"{number}: {type(error).__name__} {error}")

    def _run(self, number: int, conn: Conn) -> None:
        generator = rng("adopt", number)
        own, value, version = f"own{number}", b"", 0
        while not self.stop.is_set():
            roll = generator.random()
            self.operations += 1
            if number == 0 and roll < 0.5:
                # The only writer of the register, in all the ways there are.
                version += 1
                if roll < 0.4:
                    expect(conn.do("SET", "shared", version), b"OK")
                else:
                    expect(conn.do("INCR", "shared"), version)
                self.floor = version
            elif roll < 0.3:
                floor = self.floor
                seen = int(conn.do("GET", "shared"))  # type: ignore[arg-type]
                if seen < max(floor, version):
                    raise AssertionError(f"shared went back to {seen} from {max(floor, version)}")
                version = max(version, seen) if number else version
            elif roll < 0.55:
                value = b"%d" % generator.randrange(10**9)
                expect(conn.do("SET", own, value), b"OK")
            elif roll < 0.8:
                expect(conn.do("GET", own), value)
            elif roll < 0.85:
                value += b"x"
                expect(conn.do("APPEND", own, "x"), len(value))
            elif roll < 0.9:
                expect(conn.pipeline(("SET", own, "p"), ("GET", own), ("STRLEN", own)), [b"OK", b"p", 1])
                value = b"p"
            elif roll < 0.95:
                expect(conn.pipeline(("MULTI",), ("GET", own), ("EXEC",)), [b"OK", b"QUEUED", [value]])
            else:
                data = encode_command("GET", own)
                conn.split(data, generator.randrange(1, 8), generator.randrange(8, len(data)))
                expect(conn.read(), value)
            if self.think:
                self.stop.wait(self.think * generator.random())


def expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise AssertionError(f"{got!r} instead of {wanted!r}")


@pytest.mark.parametrize(
    ("proto", "args"),
    [(2, []), (3, []), (2, ["--io-threads", "3", "--io-threads-do-reads", "yes"])],
    ids=["resp2", "resp3", "io-threads"],
)
def test_every_reply_is_right_while_a_busy_pool_is_adopted(proto: int, args: list[str]) -> None:
    with early_server(args) as sut, Load(sut, 12, proto, think=0.02) as load:
        eventually(lambda: load.operations > 200)
        for _ in range(3):
            # A split name demotes: starting again takes those over too, in the middle of their work.
            for _ in range(4):
                before = load.operations
                done = attach(sut)
                assert done.adopted + done.already + sum(done.passing.values()) == 12, str(done)
                eventually(lambda before=before: load.operations > before + 200 or load.failures, 20)
            assert sut.stats()["paired"] > 0
            assert sut.served() > 0
            assert sut.broken_promises() == {}
            sut.session.stop()
            before = load.operations
            eventually(lambda before=before: load.operations > before + 100 or load.failures, 20)


def test_a_pool_that_never_rests(early: Sut) -> None:
    """Closed loop, no pause: what can be taken is, the rest passes; every reply is right."""
    with Load(early, 8) as load:
        eventually(lambda: load.operations > 500)
        attach(early)
        for _ in range(3):
            before = load.operations
            done = attach(early, budget=0.5)
            assert done.adopted + done.already + sum(done.passing.values()) == 8, str(done)
            eventually(lambda before=before: load.operations > before + 500 or load.failures, 20)


def test_connections_come_and_go_while_it_happens(early: Sut) -> None:
    """Sockets close at every moment of it, and their addresses return: no number is lost or given twice."""
    stop = threading.Event()
    failures: list[str] = []

    def churn(seed: int) -> None:
        generator = rng("churn", seed)
        try:
            while not stop.is_set():
                with Conn(early.port) as conn:
                    value = b"%d" % generator.randrange(10**6)
                    for _ in range(generator.randrange(6)):
                        expect(conn.do("SET", f"c{seed}", value), b"OK")
                        expect(conn.do("GET", f"c{seed}"), value)
                    if generator.random() < 0.5:
                        conn.reset()
        except BaseException as error:
            failures.append(f"{type(error).__name__} {error}")

    # Enrolled from the start, or adopted: both kinds come and go.
    threads = [threading.Thread(target=churn, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert attach(early).unavailable == ""
    early.session.stop()
    for _ in range(5):
        assert attach(early).unavailable == ""
    stop.set()
    for thread in threads:
        thread.join(20)
    assert failures == []
    if early.session.adoption.deaf:
        return
    # Nobody is connected: all numbers are free.
    eventually(lambda: early.session.connections() == [], what="all connection numbers given back")
    numbers = [early.session.take_number() for _ in range(16384)]
    assert sorted(numbers) == list(range(16384))
    assert early.session.take_number() is None
    for number in numbers:
        early.session.give_number(number)


def test_thousands(early: Sut) -> None:
    """In batches: Redis stands still for each of them only."""
    pool = [early.connect() for _ in range(2500)]
    for conn in pool:
        conn.do("PING")
    done = attach(early)
    assert done.adopted == 2500, str(done)
    assert 0 < done.gil_ms_max < done.gil_ms
    print(done)
    for conn in pool[::100]:
        must_be_served(early, conn)
    assert len(connections.read(early.session)) == 2500
    assert (attach(early).already, len(early.session.connections())) == (2500, 2500)


# -- clients people have --


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_redis_py_pool(early: Sut, protocol: int) -> None:
    with contextlib.closing(
        redis.Redis(port=early.port, protocol=protocol, max_connections=8, socket_timeout=10)
    ) as client:
        held = [client.connection_pool.get_connection() for _ in range(8)]
        for conn in held:
            client.connection_pool.release(conn)
        assert attach(early).adopted == 8

        def work(number: int) -> list[object]:
            wrong: list[object] = []
            for turn in range(200):
                client.set(f"p{number}", turn)
                if (got := client.get(f"p{number}")) != b"%d" % turn:
                    wrong.append((turn, got))
                with client.pipeline() as pipe:
                    if pipe.incr(f"p{number}").get(f"p{number}").execute() != [turn + 1, b"%d" % (turn + 1)]:
                        wrong.append(turn)
            return wrong

        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [[]] * 8
        assert early.served() > 0
        assert len(early.session.connections()) == 8


def test_an_asyncio_pool(early: Sut) -> None:
    async def story() -> None:
        client = redis.asyncio.Redis(port=early.port, protocol=3, socket_timeout=10)
        try:
            await asyncio.gather(*(client.set(f"a{n}", n) for n in range(10)))
            done = await asyncio.to_thread(attach, early)
            assert done.adopted >= 1
            for turn in range(100):
                await asyncio.gather(*(client.set(f"a{n}", turn * n) for n in range(10)))
                got = await asyncio.gather(*(client.get(f"a{n}") for n in range(10)))
                assert got == [b"%d" % (turn * n) for n in range(10)]
        finally:
            await client.aclose()

    asyncio.run(story())
    assert early.served() > 0


# -- trouble --


def die_between(port: int, call: int) -> None:
    """A toolkit that is killed at the given listing of the clients: 1 before anything, 2 half-way."""
    real, count = clients.batch, 0

    def batch(*args: Any, **kw: Any) -> clients.Batch:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)

    clients.batch = batch
    attaching.start(port, table_bytes=TABLE)


def kill_a_toolkit(port: int, call: int) -> None:
    program = f"from tests.redis.test_offload_adopt import die_between; die_between({port}, {call})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=90, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("call", [1, 2])
def test_the_toolkit_is_killed_in_the_middle(early: Sut, call: int) -> None:
    pool = [early.connect() for _ in range(5)]
    for conn in pool:
        conn.do("SET", "k", "v")
    kill_a_toolkit(early.port, call)
    # Nobody is held up, nothing is served that should not be.
    for conn in pool:
        assert conn.do("SET", "k", "w") == b"OK"
        assert conn.do("GET", "k") == b"w"
    assert early.served() == 0
    pool.pop().close()
    assert attach(early).adopted == 4
    for conn in pool:
        must_be_served(early, conn)
    early.hang_up()
    if not early.session.adoption.deaf:
        eventually(lambda: early.session.connections() == [])


def test_it_is_killed_in_the_middle_and_then_stopped(early: Sut) -> None:
    conn = early.connect()
    conn.do("SET", "k", "v")
    kill_a_toolkit(early.port, 2)
    found = offload.find(early.port)
    assert found is not None
    found.stop()
    assert conn.do("GET", "k") == b"v"
    assert attach(early).adopted == 1
    must_be_served(early, conn)


def test_the_server_is_stopped_and_does_not_answer(early: Sut) -> None:
    """It costs the adoption, not the offload."""
    conn = early.connect()
    conn.do("SET", "k", "v")
    attaching.start(early.port, table_bytes=TABLE, take_over=False).close()
    early.session = offload.find(early.port)
    os.kill(early.server.pid, signal.SIGSTOP)
    try:
        done = adopt.adopt(early.session, answer_within=0.2)
    finally:
        os.kill(early.server.pid, signal.SIGCONT)
    assert "does not answer" in done.unavailable
    assert done.adopted == 0
    assert conn.do("GET", "k") == b"v"
    assert attach(early).adopted == 1
    must_be_served(early, conn)


def test_the_server_dies_afterwards(early: Sut) -> None:
    conn = early.connect()
    attach(early)
    must_be_served(early, conn)
    early.server.kill()
    with pytest.raises((ConnectionError, OSError)):
        conn.do("GET", "k")
    eventually(lambda: not early.session.server_alive)
    assert {row.why for row in connections.read(early.session)} <= {"the server is gone"}
    early.session.stop()


def test_a_kernel_that_refuses_the_programs(early: Sut, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offload works, and says why nobody was adopted."""
    old = early.connect()
    old.do("SET", "k", "v")

    class Refused(adopt.Object):
        def load(self) -> None:
            raise KflexError("the kernel refused program kflex_adopt_server: not today")

    monkeypatch.setattr(adopt, "Object", Refused)
    session = attaching.start(early.port, table_bytes=TABLE)
    early.session = session
    assert session.adoption is not None
    assert str(session.adoption) == "not adopted: the kernel refused program kflex_adopt_server: not today"
    new = early.connect()
    early.warm(new, "k")
    early.must_serve(new, ("SET", "k", "w"))
    assert old.do("GET", "k") == b"w"
    assert state(early, new).state == connections.SERVED
    assert not state(early, old).adopted
    again = attaching.start(early.port, table_bytes=TABLE)
    assert again.adoption is not None
    assert again.adoption.unavailable
    again.close()


def test_a_module_loaded_into_a_running_server() -> None:
    """Nobody told it of the clients that were there before it."""
    need_offload()
    with ManagedServer(["--enable-module-command", "yes"]) as server:
        sut = Sut(server)
        old = [sut.connect() for _ in range(3)]
        for conn in old:
            conn.do("SET", "k", "v")
        assert old[0].do("MODULE", "LOAD", str(build.ensure().module)) == b"OK"
        try:
            assert attach(sut).adopted == 3
            for conn in old:
                must_be_served(sut, conn)
        finally:
            sut.hang_up()
            if sut.session is not None:
                sut.session.stop()


def test_clients_that_pass_by_a_renamed_command() -> None:
    """Where CLIENT is renamed the module cannot ask: nobody is adopted, the rest works as the rules allow."""
    with early_server(["--rename-command", "CLIENT", "KUNDE"]) as sut:
        conn = sut.connect()
        conn.do("SET", "k", "v")
        sut.session = attaching.start(sut.port, table_bytes=TABLE)
        assert sut.session.adoption is not None
        assert "does not answer CLIENT LIST" in sut.session.adoption.unavailable
        assert conn.do("GET", "k") == b"v"


# -- the command line --


def test_the_command_line(early: Sut) -> None:
    conn, other = early.connect(), early.connect()
    conn.do("SET", "k", "v")
    other.do("SELECT", 1)
    port = str(early.port)
    done = cli("offload", "start", "--port", port, "--table-size", "32m", "--json", "--no-adopt")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adoption"] is None
    done = cli("offload", "start", "--port", port, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adoption"]["adopted"] == 1
    assert json.loads(done.stdout)["adoption"]["passing"] == {"in database 1": 1}
    done = cli("offload", "start", "--port", port)
    assert "adopted 0 connections" in done.stdout
    assert "1 are enrolled already" in done.stdout
    assert "not adopted: 1 (in database 1)" in done.stdout
    for _ in range(5):
        conn.do("GET", "k")
    done = cli("offload", "status", "--port", port, "--connections", "--json")
    assert done.returncode == 0, done.stderr
    (data,) = json.loads(done.stdout)
    rows = {row["client"]: row for row in data["connections"]}
    mine = rows[f"127.0.0.1:{conn.local_port()}"]
    assert (mine["state"], mine["why"], mine["adopted"], mine["user"]) == ("served", "", True, "default")
    assert mine["served"] >= 3
    theirs = rows[f"127.0.0.1:{other.local_port()}"]
    assert (theirs["state"], theirs["why"]) == ("passing", "not adopted: in database 1")
    assert data["connections_by_state"] == {"served": 1, "not adopted: in database 1": 1}
    text = cli("offload", "status", "--port", port, "--connections").stdout
    assert "2 connections: 1 served, 1 passing" in text
    assert "not adopted: in database 1" in text
    done = cli("offload", "status", "--port", port, "--watch", "--json")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert cli("offload", "stop", "--port", port).returncode == 0


def test_watching_ends_with_ctrl_c_and_with_the_offload(early: Sut) -> None:
    conn = early.connect()
    attach(early)
    must_be_served(early, conn)
    command = [sys.executable, "-m", "kflex_repro", "offload", "status", "--port", str(early.port), "--watch"]
    for end in ("ctrl-c", "stop"):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "COLUMNS": "150"},
        )
        try:
            assert process.stdout is not None
            if end == "ctrl-c":
                conn.do("GET", "k")
                wait_for_child_to_attach(process)
                process.send_signal(signal.SIGINT)
            else:
                wait_for_child_to_attach(process)
                early.session.stop()
            out, err = process.communicate(timeout=20)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        assert process.returncode == 0, err
        assert err == b""
        assert f"127.0.0.1:{conn.local_port()}".encode() in out
        assert b"1 connections: 1 served, 0 passing" in out


def wait_for_child_to_attach(process: subprocess.Popen[bytes]) -> None:
    """Until it is in its loop: asleep in clock_nanosleep (system call 230) between two looks."""

    def sleeping() -> bool:
        return Path(f"/proc/{process.pid}/syscall").read_text().startswith("230 ")

    eventually(sleeping, 20, "the watcher between two looks")


def test_an_error_reply_counts_as_one(early: Sut) -> None:
    conn = early.connect()
    conn.do("PING")
    assert attach(early).adopted == 1
    assert isinstance(conn.do("INCR"), ErrorReply)
    must_be_served(early, conn)


def test_users_of_connections_from_before() -> None:
    """CLIENT LIST shows who has not logged in as the default user's as well: that one must not be served."""
    with early_server() as sut:
        default, named = sut.connect(), sut.connect()
        assert default.do("ACL", "SETUSER", "app", "on", ">word", "~*", "+@all") == b"OK"
        assert default.do("CONFIG", "SET", "requirepass", "secret") == b"OK"
        stranger = sut.connect()
        assert isinstance(stranger.do("PING"), ErrorReply)
        assert named.do("AUTH", "app", "word") == b"OK"
        assert default.do("SET", "k", "v") == b"OK"
        login = target.Login("default", "secret")
        sut.session = attaching.start(sut.port, table_bytes=TABLE, login=login)
        assert sut.session.adoption is not None
        assert sut.session.adoption.adopted == 3, str(sut.session.adoption)
        for conn in (default, named):
            assert conn.do("SET", "k", "v") == b"OK"
            sut.must_serve(conn, ("SET", "k", "v"))
            sut.must_serve(conn, ("GET", "k"))
        for _ in range(20):
            assert isinstance(stranger.do("GET", "k"), ErrorReply)
        assert state(sut, stranger).why == "user default may not GET and SET every key"
        assert stranger.do("AUTH", "secret") == b"OK"
        sut.must_serve(stranger, ("GET", "k"))
