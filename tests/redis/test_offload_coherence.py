"""The kernel's table and Redis are one: whatever changes a key, by whatever way, the next GET tells.

Commands are run on the offloaded server, with the keys resident, and on a plain twin: the replies must be
the same.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from kflex_repro.redis.resp import Decoder, ErrorReply, Reply, encode_command, strictly_equal
from tests.conftest import unavailable
from tests.redis.harness import Conn, Sut, eventually, have, offloaded_server, plain_server, rng

pytestmark = [pytest.mark.bpf, pytest.mark.emulated]

# s and t are strings, n a number; the others what their names say.
SETUP: tuple[tuple[str, ...], ...] = (
    ("MSET", "s", "sss", "t", "ttt", "n", "10"),
    ("RPUSH", "list", "3", "1", "2"),
    ("SADD", "set1", "a", "b"),
    ("SADD", "set2", "b", "c"),
    ("ZADD", "zset", "1", "a", "2", "b"),
    ("GEOADD", "geo", "13.36", "38.11", "p", "15.08", "37.50", "q"),
    ("PFADD", "hll", "a", "b", "c"),
    ("HSET", "hash", "f", "v"),
)
WATCHED = ("s", "t", "n", "new")

COMMANDS: tuple[str, ...] = (
    "SET s x NX", "SET s x XX", "SET s x GET", "SET s x EX 1000", "SET s x PX 100000",
    "SET s x EXAT 4102444800", "SET s x KEEPTTL", "SETEX s 1000 x", "PSETEX s 100000 x", "SETNX s x",
    "SETNX new x", "GETSET s x", "GETDEL s", "GETEX s", "GETEX s EX 1000", "GETEX s PERSIST", "APPEND s x",
    "APPEND new x", "SETRANGE s 1 xyz", "SETRANGE new 3 x", "SETBIT s 7 0", "SETBIT new 7 1",
    "BITFIELD s SET u8 0 65", "BITFIELD n INCRBY u8 0 1", "BITOP AND s t n", "BITOP NOT new s", "INCR n",
    "INCRBY n 5", "DECR n", "DECRBY n 3", "INCRBYFLOAT n 0.5", "INCRBYFLOAT new 1.5", "MSET s x t y",
    "MSETNX s x new y", "MSETNX new y", "DEL s", "DEL s t n", "UNLINK s", "RENAME s t", "RENAME t s",
    "RENAME s new", "RENAME list s", "RENAMENX s new", "RENAMENX s t", "COPY s new", "COPY s t REPLACE",
    "COPY list s REPLACE", "COPY s s DB 1", "MOVE s 1", "EXPIRE s 1000", "PEXPIRE s 100000",
    "EXPIREAT s 4102444800", "PEXPIREAT s 4102444800000", "EXPIRE s -1", "PEXPIREAT s 1", "EXPIREAT s 1",
    "PERSIST s", "TOUCH s", "SORT list STORE s", "SORT nothing STORE s", "SUNIONSTORE s set1 set2",
    "SINTERSTORE s set1 nothing", "SINTERSTORE s set1 set2", "SDIFFSTORE s set1 set2",
    "SDIFFSTORE s nothing set1", "ZUNIONSTORE s 1 zset", "ZINTERSTORE s 2 zset nothing",
    "ZDIFFSTORE s 1 zset", "ZRANGESTORE s zset 0 -1", "ZRANGESTORE s zset 5 9",
    "GEOSEARCHSTORE s geo FROMMEMBER p BYRADIUS 200 km", "GEORADIUS geo 15 37 200 km STORE s", "PFADD s x",
    "PFMERGE s hll", "PFMERGE new hll", "PFCOUNT s", "LPUSH s x", "SADD s x", "HSET s f x", "ZADD s 1 x",
    "XADD s * f v", "LPUSH new x", "HINCRBY s f 1", "OBJECT ENCODING s", "DUMP new", "STRLEN s", "FLUSHALL",
    "FLUSHALL ASYNC", "FLUSHALL SYNC", "FLUSHDB", "SWAPDB 0 1", "DEBUG RELOAD", "DEBUG POPULATE 3 s",
    "LMOVE list s LEFT RIGHT", "RPOPLPUSH list s", "SMOVE set1 s a", "LCS s t", "SUBSTR s 0 1", "SELECT 0",
    "GETRANGE s 0 -1",
)  # fmt: skip

# One of each kind also in a VM, where everything is slow.
SMOKE = frozenset(
    ("SET s x EX 1000", "APPEND s x", "INCR n", "DEL s", "RENAME s t", "MOVE s 1", "EXPIRE s -1",
     "SORT list STORE s", "FLUSHALL", "SWAPDB 0 1", "DEBUG RELOAD")
)  # fmt: skip

SCRIPTS: tuple[tuple[str, ...], ...] = (
    ("EVAL", "return redis.call('SET',KEYS[1],'x')", "1", "s"),
    ("EVAL", "redis.call('DEL',KEYS[1]) return redis.call('GET',KEYS[1])", "1", "s"),
    ("EVAL", "redis.call('INCR',KEYS[1]) redis.call('APPEND',KEYS[2],'y') return 1", "2", "n", "s"),
    ("EVAL", "redis.call('RENAME',KEYS[1],KEYS[2]) return redis.pcall('INCR',KEYS[2])", "2", "s", "t"),
    ("EVAL", "redis.call('SELECT',1) redis.call('SET',KEYS[1],'in db 1') return 1", "1", "s"),
    ("EVAL", "redis.call('SELECT',1) redis.call('SET','s','x') redis.call('MOVE','s',0) return 1", "0"),
    ("EVAL", "redis.call('FLUSHALL') redis.call('SET',KEYS[1],'after') return 1", "1", "s"),
    ("EVAL", "redis.call('SET',KEYS[1],'x') error('too late')", "1", "s"),
)


@pytest.fixture
def both(sut: Sut, conn: Conn, plain: Sut) -> Iterator[Both]:
    made = Both(sut, conn, sut.connect(), plain.connect())
    yield made
    plain.hang_up()


class Both:
    """The offloaded server, with one connection that is served and one for other commands, and the twin."""

    def __init__(self, sut: Sut, conn: Conn, other: Conn, twin: Conn) -> None:
        self.sut, self.conn, self.other, self.twin = sut, conn, other, twin
        self.do("FLUSHALL")
        for command in SETUP:
            self.do(*command)
        self.resident()

    def resident(self, *keys: str) -> None:
        self.sut.warm(self.conn, *(keys or ("s", "t", "n")))

    def do(self, *command: str | bytes) -> Reply:
        """On both, by the connection for other commands; the replies must be the same."""
        got, expected = self.other.do(*command), self.twin.do(*command)
        if command[0] not in ("XADD", "DUMP"):
            assert strictly_equal(got, expected), f"{command}: {got!r}, plain: {expected!r}"
        return got

    def look(self, keys: Iterable[str] = WATCHED) -> None:
        """GET by the served connection, twice with a slow read between, says what the twin says."""
        for key in keys:
            expected = self.twin.do("GET", key)
            for which in (("GET", key), ("GETRANGE", key, "0", "-1"), ("GET", key)):
                got = self.conn.do(*which)
                right = expected if which[0] == "GET" or expected is not None else b""
                assert strictly_equal(got, right), f"{which}: {got!r}, plain GET: {expected!r}"

    def set_everywhere(self) -> None:
        """A SET of each key afterwards, served or not, takes."""
        for number, key in enumerate(WATCHED):
            assert (
                self.conn.do("SET", key, f"last {number}")
                == self.twin.do("SET", key, f"last {number}")
                == b"OK"
            )
            assert self.conn.do("GET", key) == b"last %d" % number
            assert self.other.do("TYPE", key) == b"string"
            assert self.do("TTL", key) == -1
        self.look()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_from_elsewhere(both: Both, command: str) -> None:
    words = command.split()
    both.do(*words)
    both.look()
    both.set_everywhere()


@pytest.mark.parametrize(
    "command",
    [pytest.param(each, marks=[pytest.mark.smoke("coherence")] * (each in SMOKE)) for each in COMMANDS],
)
def test_a_command_right_after_sets_of_the_kernel(both: Both, command: str) -> None:
    """The keys are dirty: their values must be in Redis before the command runs."""
    for key, value in (("s", "sss"), ("t", "ttt"), ("n", "10")):
        assert both.conn.do("SET", key, value) == b"OK"
    both.do(*command.split())
    both.look()
    both.set_everywhere()


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.split()[0] not in ("DEBUG", "SELECT")])
def test_a_command_in_a_transaction(both: Both, command: str) -> None:
    """The module's command filter does not see it: only events and epochs tell."""
    for each in (("MULTI",), ("SET", "n", "7"), tuple(command.split()), ("GET", "n")):
        both.do(*each)
    got, expected = both.other.do("EXEC"), both.twin.do("EXEC")
    if not command.startswith(("XADD", "DUMP")):
        assert strictly_equal(got, expected)
    both.look()
    both.set_everywhere()


@pytest.mark.smoke("coherence")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda words: words[1])
def test_a_script(both: Both, script: tuple[str, ...]) -> None:
    both.conn.do("SET", "s", "sss")
    got, expected = both.other.do(*script), both.twin.do(*script)
    assert type(got) is type(expected)
    both.look()
    both.set_everywhere()


def test_a_function(both: Both) -> None:
    library = (
        "#!lua name=lib\nredis.register_function('put', function(k,a) return redis.call('SET',k[1],a[1]) end)"
    )
    both.do("FUNCTION", "LOAD", "REPLACE", library)
    both.do("FCALL", "put", "1", "s", "from a function")
    both.look()
    both.do("FUNCTION", "FLUSH")


def test_from_the_other_database(both: Both) -> None:
    """A key's namesake in database 1 is another key; MOVE and COPY bring it over."""
    far = both.sut.connect()
    twin = both.twin
    for each in (far, twin):
        each.do("SELECT", "1")
    for command in (("SET", "s", "one"), ("SET", "new", "moved"), ("SET", "t", "copied"), ("DEL", "s")):
        assert far.do(*command) == twin.do(*command)
    assert both.conn.do("GET", "s") == b"sss"
    for command in (("MOVE", "new", "0"), ("COPY", "t", "t", "DB", "0", "REPLACE"), ("RENAME", "t", "n")):
        assert far.do(*command) == twin.do(*command)
    twin.do("SELECT", "0")
    both.look()


def test_restore_and_migrate(both: Both, plain: Sut) -> None:
    payload = both.twin.do("DUMP", "t")
    both.do("RESTORE", "s", "0", payload, "REPLACE")
    both.look()
    both.resident("s")
    both.do("RESTORE", "s", "100000", payload, "REPLACE")
    both.look()
    both.do("SET", "s", "goes")
    both.resident("s")
    assert both.other.do("MIGRATE", "127.0.0.1", str(plain.port), "s", "1", "5000") == b"OK"
    assert both.twin.do("DEL", "s") == 1
    both.look()


# -- time to live --


@pytest.mark.smoke("coherence")
def test_a_key_with_a_ttl_is_never_resident(both: Both) -> None:
    for command in (
        ("SETEX", "s", "1000", "x"),
        ("SET", "s", "x", "EX", "1000"),
        ("EXPIRE", "s", "1000"),
        ("PEXPIRE", "s", "1000000"),
        ("GETEX", "s", "EX", "1000"),
        ("PSETEX", "s", "1000000", "x"),
    ):
        both.do("SET", "s", "x")
        both.resident("s")
        both.do(*command)
        for _ in range(5):
            assert not both.sut.serves_get(both.conn, "s"), command
        both.look()
        both.do("PERSIST", "s")
        both.resident("s")


@pytest.mark.smoke("coherence")
def test_expiry_is_honoured(both: Both) -> None:
    other = both.other
    for _ in range(5):
        other.do("SET", "s", "x", "PX", "60")
        began = time.monotonic()
        assert both.conn.do("GET", "s") == b"x"
        eventually(lambda: both.conn.do("GET", "s") is None, what="the key expired")
        assert 0.05 < time.monotonic() - began < 1.0
        # And a SET by the kernel on a key that is about to expire takes its TTL away.
        other.do("SET", "s", "x", "PX", "30")
        other.do("SET", "clock", "x", "PX", "60")
        assert both.conn.do("SET", "s", "stays") == b"OK"
        eventually(lambda: other.do("EXISTS", "clock") == 0, what="that long")
        assert both.conn.do("GET", "s") == b"stays"
        assert other.do("TTL", "s") == -1


def test_expire_and_set_race(both: Both) -> None:
    """Keys that expire while the kernel sets them: the SET wins or comes after, it is never lost."""
    other, conn = both.other, both.conn
    for number in range(300):
        other.do("SET", "s", "old", "PX", "1")
        assert conn.do("SET", "s", number) == b"OK"
        assert conn.do("GET", "s") == b"%d" % number
        assert other.do("GETRANGE", "s", 0, -1) == b"%d" % number


# -- types --


@pytest.mark.smoke("coherence")
def test_other_types_answer_wrongtype(both: Both) -> None:
    for key in ("list", "set1", "zset", "geo", "hash"):
        for _ in range(3):
            reply = both.conn.do("GET", key)
            assert isinstance(reply, ErrorReply)
            assert reply.code == "WRONGTYPE"
        assert not both.sut.serves_get(both.conn, key)
        assert both.conn.do("SET", key, "now a string") == both.twin.do("SET", key, "now a string")
    both.look(("list", "set1", "zset", "geo", "hash"))
    for key in ("list", "set1", "zset", "geo", "hash"):
        assert both.do("TYPE", key) == b"string"


def test_hyperloglogs_change_without_an_event(both: Both) -> None:
    """PFCOUNT writes its result into the value and tells nobody."""
    for round_ in range(3):
        both.do("PFADD", "hll", *(f"{round_}-{n}" for n in range(50)))
        for _ in range(3):
            both.look(("hll",))
        both.do("PFCOUNT", "hll")
        for _ in range(3):
            both.look(("hll",))
    # The same bytes set by a client are a HyperLogLog too.
    dense = both.twin.do("GET", "hll")
    both.do("PFADD", "stale", "x")
    stale = both.twin.do("GET", "stale")
    for value in (dense, stale):
        assert both.conn.do("SET", "copy", value) == both.twin.do("SET", "copy", value) == b"OK"
        both.look(("copy",))
        both.do("PFCOUNT", "copy")
        both.look(("copy",))
        both.do("PFADD", "copy", "y", "z")
        both.do("PFCOUNT", "copy")
        both.look(("copy",))
        assert both.conn.do("SET", "copy", value) == both.twin.do("SET", "copy", value) == b"OK"
        both.do("PFMERGE", "copy", "hll")
        both.look(("copy",))


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "-1",
        "12345",
        "9223372036854775807",
        "9223372036854775808",
        "007",
        "1e3",
        "x" * 44,
        "x" * 45,
        "",
        "10000",
    ],
)
def test_encodings_are_what_redis_chooses(both: Both, value: str) -> None:
    assert both.conn.do("SET", "s", value) == both.twin.do("SET", "s", value) == b"OK"
    both.do("OBJECT", "ENCODING", "s")
    both.look(("s",))
    both.do("OBJECT", "ENCODING", "s")
    both.do("APPEND", "s", "x")
    both.do("OBJECT", "ENCODING", "s")


# -- freshness --


def test_an_idle_redis_gets_a_set_within_20_ms() -> None:
    """Nothing wakes it but the module's drainer: how long a SET waited is in INFO."""
    with offloaded_server() as sut:
        conn = sut.connect()
        conn.do("SET", "k", "0")
        sut.warm(conn, "k")
        for number in range(50):
            sut.must_serve(conn, ("SET", "k", number))
            if sut.offloaded:
                # No request reaches Redis meanwhile: the counters are read from shared memory.
                eventually(lambda: sut.stats()["dirty"] == 0 and sut.stats()["pending"] == 0, timeout=2.0)
        if sut.offloaded:
            info = sut.info()
            assert int(info["drained"]) >= 50
            print(f"oldest {info['dirty_age_us_max']} µs, average {info['dirty_age_us_avg']} µs")
            assert int(info["dirty_age_us_avg"]) < 20_000
            # The longest wait is as good as the machine: leave a loaded one room.
            assert int(info["dirty_age_us_max"]) < 200_000
        assert sut.connect().do("GETRANGE", "k", 0, -1) == b"49"


def test_a_table_that_is_full_only_passes() -> None:
    """More keys than fit: everything is right, some of it slow, nothing dirty is ever thrown away."""
    with offloaded_server(table_bytes=4 << 20) as sut:
        conn = sut.connect()
        sut.warm(conn)
        value = b"x" * 3000
        count = 6000
        for start in range(0, count, 8):
            commands = [("SET", f"key:{n}", b"%d:" % n + value) for n in range(start, start + 8)]
            for command in commands:
                conn.send(*command)
            assert [conn.read() for _ in commands] == [b"OK"] * 8
        order = list(range(count))
        rng("full").shuffle(order)
        for number in order:
            assert conn.do("GET", f"key:{number}") == b"%d:" % number + value
        assert conn.do("DBSIZE") == count
        if sut.offloaded:
            stats = sut.stats()
            assert stats["evicted"] > 0 or stats["why_full"] > 0
            assert stats["served_set"] > 0
            assert sut.broken_promises() == {}


def test_evicted_keys_are_forgotten() -> None:
    """maxmemory with an eviction policy: GETs are served, and what Redis evicts is nil at once."""
    with offloaded_server(["--maxmemory", "6mb", "--maxmemory-policy", "allkeys-random"]) as sut:
        conn, other = sut.connect(), sut.connect()
        sut.warm(conn)
        value = "x" * 2000
        for number in range(4000):
            other.do("SET", f"key:{number % 1500}", value)
            conn.do("GET", f"key:{number * 7 % 1500}")
        # At rest the two ways to read agree on every key.
        served = sut.served()
        for _ in range(2):
            for number in range(1500):
                exists = other.do("EXISTS", f"key:{number}")
                assert conn.do("GET", f"key:{number}") == (value.encode() if exists else None)
        if sut.offloaded:
            assert sut.stats()["served_set"] == 0
            assert sut.served() > served


# -- persistence --


def aof_commands(directory: Path) -> Iterator[list[bytes]]:
    """Every command of a multi-part AOF, in order (no RDB preamble)."""
    folder = directory / "appendonlydir"
    manifest = (folder / "appendonly.aof.manifest").read_text()
    for line in manifest.splitlines():
        name = line.split()[1]
        if name.endswith(".incr.aof"):
            decoder = Decoder()
            decoder.feed((folder / name).read_bytes())
            for command in decoder:
                assert isinstance(command, list)
                yield command
            assert decoder.between_replies, "the AOF ends inside a command"


AOF = ("--appendonly", "yes", "--appendfsync", "everysec", "--aof-use-rdb-preamble", "no")


def test_every_set_reaches_the_aof(tmp_path: Path) -> None:
    """After a clean stop of the server the AOF is whole and holds the last value of every key."""
    if not have("redis-check-aof"):
        unavailable("no redis-check-aof")
    with offloaded_server(AOF, dir=tmp_path) as sut:
        conn = sut.connect()
        sut.warm(conn)
        generator = random.Random(7)
        model: dict[bytes, bytes] = {}
        for number in range(4000):
            key = b"key:%d" % generator.randrange(300)
            value = generator.choice((b"%d" % number, b"value %d" % number, generator.randbytes(1000)))
            assert conn.do("SET", key, value) == b"OK"
            model[key] = value
            if number % 50 == 0:
                conn.do("APPEND", key, "!")
                model[key] += b"!"
        if sut.offloaded:
            assert sut.stats()["served_set"] > 2000
        sut.server.stop_process() if hasattr(sut.server, "stop_process") else sut.connect().send(
            "SHUTDOWN", "NOSAVE"
        )
        eventually(lambda: not sut.server.running, timeout=10, what="the server's end")
        manifest = tmp_path / "appendonlydir" / "appendonly.aof.manifest"
        run = subprocess.run(["redis-check-aof", str(manifest)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        sut.hang_up()
        sut.server.start()
        with Conn(sut.server.port) as fresh:
            assert fresh.do("DBSIZE") == len(model)
            for key, value in model.items():
                assert fresh.do("GET", key) == value


def test_the_aof_holds_only_states_that_existed(tmp_path: Path) -> None:
    """A writer sets a, then b, in one order and two encodings: no prefix of the AOF has b without its a."""
    with offloaded_server(AOF, dir=tmp_path) as sut:
        writer, other = sut.connect(), sut.connect()
        sut.warm(writer)
        for number in range(1, 3000):
            # Numbers and other strings may take different ways into Redis.
            for key in ("a", "b"):
                assert (
                    writer.do("SET", key, number if (key == "b") == (number % 2 == 0) else f"v{number}")
                    == b"OK"
                )
            if number % 40 == 0:
                other.do("INCR", "noise")
        other.do("SET", "end", "1", "GET")
        if sut.offloaded:
            assert sut.stats()["served_set"] > 2000
        eventually(
            lambda: any(command[1:2] == [b"end"] for command in aof_commands(tmp_path)), what="the AOF's end"
        )
        seen = {b"a": 0, b"b": 0}
        inside, changes = False, 0
        for command in aof_commands(tmp_path):
            name = command[0].upper()
            if name == b"MULTI":
                inside = True
            elif name == b"EXEC":
                inside = False
            elif name in (b"SET", b"MSET"):
                for key, value in zip(command[1::2], command[2::2], strict=False):
                    if key in seen:
                        version = int(value.removeprefix(b"v"))
                        assert version >= seen[key], f"{key!r} goes back to {version}"
                        seen[key] = version
                        changes += 1
            if not inside:
                assert seen[b"a"] >= seen[b"b"] >= seen[b"a"] - 1, (command[:5], seen)
        assert seen == {b"a": 2999, b"b": 2999}
        print(f"{changes} changes in the AOF")


def test_a_snapshot_under_load_is_consistent(tmp_path: Path) -> None:
    """BGSAVE while a writer sets a then b: the RDB has them at most one step apart, never b ahead."""
    with offloaded_server(dir=tmp_path) as sut:
        writer, control = sut.connect(), sut.connect()
        sut.warm(writer)
        number = 0

        def write(count: int) -> None:
            nonlocal number
            for _ in range(count):
                number += 1
                for key in ("a", "b"):
                    assert writer.do("SET", key, f"v{number}") == b"OK"

        for _ in range(6):
            write(100)
            before = number
            assert b"started" in control.do("BGSAVE")
            while b"rdb_bgsave_in_progress:1" in control.do("INFO", "persistence"):
                write(20)
            copy = tmp_path / "copy"
            copy.mkdir(exist_ok=True)
            (copy / "dump.rdb").write_bytes((tmp_path / "dump.rdb").read_bytes())
            with plain_server(dir=copy) as saved:
                reader = saved.connect()
                a, b = (int(reader.do("GET", key).removeprefix(b"v")) for key in ("a", "b"))
            assert a >= b >= a - 1
            assert a >= before


def test_rdb_of_a_clean_stop(tmp_path: Path) -> None:
    """SHUTDOWN SAVE right after SETs of the kernel: they are in the RDB."""
    with offloaded_server(dir=tmp_path) as sut:
        conn, control = sut.connect(), sut.connect()
        sut.warm(conn)
        control.do("PING")
        for number in range(500):
            assert conn.do("SET", f"k{number % 50}", number) == b"OK"
        control.send_bytes(encode_command("SHUTDOWN", "SAVE"))
        eventually(lambda: not sut.server.running, timeout=10, what="the server's end")
        sut.hang_up()
        sut.server.start()
        with Conn(sut.server.port) as fresh:
            for number in range(450, 500):
                assert fresh.do("GET", f"k{number % 50}") == b"%d" % number
