"""On a connection replies come in the order of its commands, whoever answers; and what ends its service."""

from __future__ import annotations

import pytest

from kflex_repro.redis.resp import ErrorReply, encode_command, encode_pipeline
from tests.redis.harness import Conn, Sut, eventually

pytestmark = [pytest.mark.bpf, pytest.mark.emulated]

BUSY = "local n=0 for i=1,tonumber(ARGV[1]) do n=n+i end return redis.call('GET',KEYS[1])"


@pytest.fixture
def key(sut: Sut, conn: Conn) -> str:
    """A key with the value v, resident."""
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    return "k"


def test_a_fast_reply_never_overtakes_a_slow_one(sut: Sut, conn: Conn, key: str) -> None:
    for _ in range(100):
        conn.send("EVAL", BUSY, 1, key, 20_000)
        conn.send("GET", key)
        conn.send("STRLEN", key)
        conn.send("GET", key)
        assert [conn.read() for _ in range(4)] == [b"v", b"v", 1, b"v"]


@pytest.mark.smoke("order")
def test_not_even_one_of_a_stopped_server(sut: Sut, conn: Conn, key: str) -> None:
    """The slow command waits in the server's socket: nothing has been counted as answered."""
    import os
    import signal

    for _ in range(5):
        os.kill(sut.server.pid, signal.SIGSTOP)
        try:
            conn.send("STRLEN", key)
            conn.send("GET", key)
            assert conn.quiet(0.05)
        finally:
            os.kill(sut.server.pid, signal.SIGCONT)
        assert [conn.read(), conn.read()] == [1, b"v"]


@pytest.mark.smoke("gate")
def test_a_get_is_served_while_redis_is_stopped(sut: Sut, conn: Conn, key: str) -> None:
    """What nothing is in the way of needs no Redis."""
    import os
    import signal

    if not sut.offloaded:
        pytest.skip("a plain server that is stopped answers nothing")
    sut.must_serve(conn, ("GET", key))
    os.kill(sut.server.pid, signal.SIGSTOP)
    try:
        assert conn.do("GET", key) == b"v"
    finally:
        os.kill(sut.server.pid, signal.SIGCONT)


@pytest.mark.smoke("order")
@pytest.mark.parametrize("first", [1, 3, 1000])
def test_a_reply_half_read_holds_the_next_back(sut: Sut, conn: Conn, first: int) -> None:
    """An injected reply is read before what is in the receive queue: so there must be nothing in it."""
    value = b"x" * 3000
    conn.do("SET", "k", value)
    sut.warm(conn, "k")
    reply = b"$3000\r\n" + value + b"\r\n"
    for _ in range(20):
        conn.send("GETRANGE", "k", 0, -1)
        assert conn.read_bytes(first) == reply[:first]
        conn.send("GET", "k")
        assert conn.read_bytes(len(reply) - first) == reply[first:]
        assert conn.read_bytes(len(reply)) == reply


def test_a_reply_not_read_at_all(sut: Sut, conn: Conn, key: str) -> None:
    for _ in range(50):
        conn.send("STRLEN", key)
        eventually(lambda: not conn.quiet(), what="the slow reply")
        conn.send("GET", key)
        conn.send("SET", key, "v")
        assert [conn.read() for _ in range(3)] == [1, b"v", b"OK"]


@pytest.mark.smoke("order")
def test_a_set_is_seen_by_the_next_slow_command(sut: Sut, conn: Conn, key: str) -> None:
    other = sut.connect()
    for number in range(300):
        assert conn.do("SET", key, number) == b"OK"
        assert (conn if number % 2 else other).do("GETRANGE", key, 0, -1) == b"%d" % number


@pytest.mark.smoke("order")
def test_a_slow_write_is_seen_by_the_next_get(sut: Sut, conn: Conn, key: str) -> None:
    other = sut.connect()
    sut.warm(other)
    for number in range(300):
        assert (conn if number % 2 else other).do("GETSET", key, number) is not None
        assert (other if number % 3 else conn).do("GET", key) == b"%d" % number


@pytest.mark.smoke("order")
def test_requests_cut_in_two_everywhere(sut: Sut, conn: Conn, key: str) -> None:
    data = encode_pipeline([("GET", key), ("SET", key, "v"), ("GET", key)])
    for cut in range(1, len(data)):
        conn.split(data, cut)
        assert [conn.read() for _ in range(3)] == [b"v", b"OK", b"v"], f"cut at {cut}"
    # A cut inside a command's name ends the service of that connection for good; a new one is served.
    fresh = sut.connect()
    sut.warm(fresh, key)


def test_a_cut_request_followed_by_a_whole_one(sut: Sut, key: str) -> None:
    """The second half of one and a whole other in one message, with the value looking like a command."""
    conn = sut.connect()
    sut.warm(conn, key)
    trap = encode_command("GET", key)
    data = encode_command("SET", "t", trap)
    for cut in range(data.index(trap), len(data)):
        conn.send_bytes(data[:cut])
        conn.send_bytes(data[cut:] + encode_command("GET", key))
        assert [conn.read(), conn.read()] == [b"OK", b"v"]
    assert conn.do("GET", "t") == trap


@pytest.mark.smoke("order")
def test_multi_passes_as_a_whole_and_is_served_again_afterwards(sut: Sut, conn: Conn, key: str) -> None:
    for end in ("EXEC", "DISCARD"):
        before = sut.stats()
        assert conn.do("MULTI") == b"OK"
        assert conn.do("GET", key) == b"QUEUED"
        assert conn.do("SET", key, "v") == b"QUEUED"
        other = sut.connect()
        assert other.do("GET", key) == b"v"
        assert conn.do(end) == ([b"v", b"OK"] if end == "EXEC" else b"OK")
        assert sut.stats()["why_multi"] >= before["why_multi"] + (2 if sut.offloaded else 0)
        sut.must_serve(conn, ("SET", key, "v"))
        sut.must_serve(conn, ("GET", key))


def test_multi_in_pieces(sut: Sut, conn: Conn, key: str) -> None:
    data = encode_pipeline([("MULTI",), ("GET", key), ("INCR", "n"), ("GET", "n"), ("EXEC",), ("GET", "n")])
    for number, cut in enumerate(range(1, len(data), 3)):
        # On a new connection: a cut inside a command's name ends the old one's service.
        with Conn(sut.port) as fresh:
            sut.warm(fresh)
            fresh.split(data, cut)
            count = b"%d" % (number + 1)
            assert [fresh.read() for _ in range(4)] == [b"OK", b"QUEUED", b"QUEUED", b"QUEUED"]
            assert fresh.read() == [b"v", number + 1, count]
            assert fresh.read() == count


def test_an_aborted_transaction(sut: Sut, conn: Conn, key: str) -> None:
    assert conn.do("MULTI") == b"OK"
    assert isinstance(conn.do("GET"), ErrorReply)
    assert conn.do("GET", key) == b"QUEUED"
    assert conn.do("EXEC") == b"EXECABORT Transaction discarded because of previous errors."
    assert conn.do("GET", key) == b"v"
    sut.must_serve(conn, ("GET", key))


def test_exec_with_arguments(sut: Sut, conn: Conn, plain: Sut, key: str) -> None:
    """They are errors; whether the transaction is still open after them, Redis decides."""
    twin = plain.connect()
    twin.do("SET", "k", "v")
    for command in (("EXEC", "x"), ("DISCARD", "x"), ("MULTI", "x")):
        for each in (conn, twin):
            each.do("MULTI")
            each.do("GET", key)
        assert conn.do(*command) == twin.do(*command)
        assert conn.do("GET", key) == twin.do("GET", key)
        assert conn.do("EXEC") == twin.do("EXEC")
        assert conn.do("GET", key) == twin.do("GET", key)
    plain.hang_up()


@pytest.mark.smoke("order")
def test_watch_sees_sets_of_the_kernel(sut: Sut, conn: Conn, key: str) -> None:
    other = sut.connect()
    sut.warm(other, key)
    for number in range(50):
        assert conn.do("WATCH", key) == b"OK"
        assert conn.do("GET", key) is not None
        assert other.do("SET", key, number) == b"OK"
        assert conn.pipeline(("MULTI",), ("SET", key, "lost"), ("EXEC",))[-1] is None
        assert conn.do("GET", key) == b"%d" % number
        # And one that nobody touches succeeds, also when it was set just before the WATCH.
        assert other.do("SET", key, "before") == b"OK"
        assert conn.do("WATCH", key) == b"OK"
        assert conn.pipeline(("MULTI",), ("GETSET", key, "won"), ("EXEC",))[-1] == [b"before"]


# -- what ends the service of a connection --


def ends_service(sut: Sut, conn: Conn) -> bool:
    """Whether SETs and GETs on this connection, however many, are not served any more."""
    if not sut.offloaded:
        return True
    before = sut.served()
    for _ in range(20):
        conn.pipeline(("SET", "k", "v"))
        conn.pipeline(("GET", "k"))
    return sut.served() == before


@pytest.mark.parametrize(
    "commands",
    [
        [("SELECT", "1")],
        [("SELECT", "1"), ("SELECT", "0")],
        [("CLIENT", "TRACKING", "ON"), ("CLIENT", "TRACKING", "OFF")],
        [("SUBSCRIBE", "c"), ("UNSUBSCRIBE", "c")],
        [("PSUBSCRIBE", "c*"), ("PUNSUBSCRIBE", "c*")],
        [("RESET",)],
        [("READONLY",)],
        [("BLPOP", "nothing here", "0.01")],
        [("WAIT", "0", "0")],
        [("NOSUCHCOMMAND",)],
        [("ASKING",)],
    ],
    ids=lambda commands: " ".join(commands[0]),
)
def test_a_command_that_changes_the_connection_ends_its_service(
    sut: Sut, conn: Conn, key: str, commands: list[tuple[str, ...]]
) -> None:
    other = sut.connect()
    sut.warm(other, key)
    for command in commands:
        conn.do(*command)
    assert ends_service(sut, conn)
    # The others do not mind.
    sut.must_serve(other, ("GET", key))


def test_inline_commands_end_it_too(sut: Sut, conn: Conn, key: str) -> None:
    conn.send_bytes(b"GET k\r\n")
    assert conn.read() == b"v"
    assert ends_service(sut, conn)


def test_client_reply_off_and_skip(sut: Sut, key: str) -> None:
    for mode in ("OFF", "SKIP"):
        conn = sut.connect()
        sut.warm(conn, key)
        conn.send("CLIENT", "REPLY", mode)
        conn.send("SET", key, "silent")
        conn.send("CLIENT", "REPLY", "ON")
        assert conn.read() == b"OK"
        assert conn.do("GET", key) == b"silent"
        assert ends_service(sut, conn)


@pytest.mark.parametrize(
    "command",
    [
        ("SELECT", "0"),
        ("CLIENT", "SETNAME", "me"),
        ("CLIENT", "ID"),
        ("CLIENT", "GETNAME"),
        ("CLIENT", "INFO"),
        ("HELLO",),
        ("HELLO", "3"),
        ("HELLO", "2"),
        ("HELLO", "2", "SETNAME", "me"),
        ("AUTH", "x"),
        ("WATCH", "k"),
        ("UNWATCH",),
        ("PUBLISH", "c", "x"),
        ("CONFIG", "GET", "maxmemory"),
        ("COMMAND", "COUNT"),
        ("DBSIZE",),
        ("INFO",),
        ("KEYS", "*"),
        ("LRANGE", "nothing", "0", "-1"),
        ("HGETALL", "nothing"),
        ("SCRIPT", "EXISTS", "x"),
        ("PING",),
        ("PING", "x"),
        ("TIME",),
        ("WRONG ARITY OF A KNOWN ONE",),
        ("STRLEN",),
    ],
    ids=" ".join,
)
def test_an_ordinary_command_does_not(sut: Sut, conn: Conn, key: str, command: tuple[str, ...]) -> None:
    if command[0].startswith("WRONG"):
        command = ("STRLEN", "a", "b")
    conn.do(*command)
    sut.must_serve(conn, ("SET", key, "v"))
    sut.must_serve(conn, ("GET", key))


def test_every_command_of_the_server_is_reviewed(sut: Sut, conn: Conn) -> None:
    """The allow-list and the list of those left out cover the installed server's commands; nothing blocks."""
    from kflex_repro.offload import commands

    bits = {
        f"KFLEX_CMD_{name}": 1 << at
        for at, name in enumerate(("OK", "MULTI", "END", "SUB", "ZERO", "SECRET", "TABLE", "AUTH"))
    }
    allowed = {name.partition("|")[0].lower() for name in commands.flags(bits)}
    left_out = {name.lower() for name in commands.demoting()}
    assert not allowed & left_out
    known = {entry[0].decode(): {flag.decode() for flag in entry[2]} for entry in conn.do("COMMAND")}
    known = {name: flags for name, flags in known.items() if not name.startswith("kflex.")}
    # Containers appear in parts: what is not a listed part demotes.
    listed = allowed | left_out
    assert not known.keys() - listed, f"not reviewed: {sorted(known.keys() - listed)}"
    assert not {name for name in allowed & known.keys() if "blocking" in known[name]}


def test_maxclients_is_respected(sut: Sut) -> None:
    """A connection that Redis turns away is never served: its first request was not answered by it."""
    control = sut.connect()
    control.do("SET", "k", "v")
    limit = control.do("CONFIG", "GET", "maxclients")[1]
    assert control.do("CONFIG", "SET", "maxclients", "3") == b"OK"
    try:
        inside = [sut.connect() for _ in range(2)]
        assert [each.do("GET", "k") for each in inside] == [b"v", b"v"]
        for _ in range(5):
            refused = sut.connect()
            # What is sent may cross the refusal, or meet a closed socket.
            try:
                refused.send("GET", "k")
                reply = refused.read()
            except ConnectionError:
                continue
            assert reply == b"ERR max number of clients reached"
        assert inside[0].do("GET", "k") == b"v"
    finally:
        assert control.do("CONFIG", "SET", "maxclients", limit) == b"OK"


def test_client_kill_ends_the_connection(sut: Sut, key: str) -> None:
    for _ in range(10):
        victim, killer = sut.connect(), sut.connect()
        sut.warm(victim, key)
        ident = victim.do("CLIENT", "ID")
        assert killer.do("CLIENT", "KILL", "ID", ident) == 1
        assert victim.closed()
        with pytest.raises((ConnectionError, AssertionError)):
            for _ in range(10):
                victim.do("GET", key)


def test_push_messages_between_replies(sut: Sut, key: str) -> None:
    """RESP3 lets a subscriber use every command: messages come between replies and answer none."""
    subscriber, publisher = sut.connect(proto=3), sut.connect()
    subscriber.do("SUBSCRIBE", "c")
    for number in range(50):
        assert publisher.do("PUBLISH", "c", number) == 1
        subscriber.send("GET", key)
        assert [list(subscriber.read()), subscriber.read()] == [[b"message", b"c", b"%d" % number], b"v"]
