"""Random command scripts for two redis-servers that must give the same bytes: one offloaded, one plain.

A script is a list of steps, each of them messages on some connections. Every message is answered in full
before the next step, so the order of commands is the same on both servers; only the messages of one step run
at the same time, and those touch keys of their own connection only. Most commands are GET and SET of a few
hot keys.

Left out, because their answers are not determined by the commands before them:

- what depends on the clock: TIME, LASTSAVE, TTL and EXPIRETIME of relative deadlines, XADD with ``*``, idle
  times (OBJECT IDLETIME, XPENDING's long form), EXPIRE GT/LT between relative deadlines;
- what draws lots or depends on a hash seed: RANDOMKEY, SPOP, SRANDMEMBER, HRANDFIELD, ZRANDMEMBER, KEYS and
  SCAN, the order of sets and hashes too large for a listpack or intset (ours stay small);
- what describes the server and not its data: INFO, CLIENT, COMMAND, CONFIG GET, MEMORY, DEBUG but for RELOAD,
  SLOWLOG, LATENCY, MODULE, ACL LOG, OBJECT FREQ and REFCOUNT, SCRIPT and FUNCTION STATS;
- DBSIZE: it counts keys whose time is over until somebody looks at them;
- blocking reads (whoever comes first is served), and everything that ends a connection.

Other tests cover what of that matters.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kflex_repro.redis.resp import Decoder, ErrorReply, encode_command, encode_pipeline
from tests.redis.fuzz import KEY_SIZES
from tests.redis.harness import Conn, Sut, Timeout

Command = list[bytes]

CONNECTIONS = 6
HOT = 10
# A message is served as a whole up to 32 requests.
LENGTHS = (1, 1, 1, 1, 2, 3, 5, 8, 16, 32, 40)
FAR = (b"4102444800", b"4102444801", b"4133980800")
"""Deadlines in 2100 and later, s."""
RELATIVE = b"1000000"
"""A relative one, s, or with three zeros ms: before all of FAR for the next decades."""
PAST = b"1000000000"
HAS_TTL = b"return redis.call('pttl', KEYS[1]) > 0 and 1 or 0"


@dataclass
class Message:
    """Commands sent with one send() on one connection."""

    connection: int
    commands: list[Command]

    def __str__(self) -> str:
        shown = " | ".join(repr(b" ".join(command))[2:160] for command in self.commands)
        return f"connection {self.connection}: {shown}"


Step = list[Message]


class Writer:
    """Scripts from a seed."""

    def __init__(self, seed: object) -> None:
        self.rng = rng = random.Random(f"twin/{seed}")
        self.hot = [b"h%d" % number for number in range(HOT)]
        self.keys = [b"k%d" % number for number in range(20)]
        self.keys += [bytes(rng.choices(b"abcxyz019:", k=size)) for size in rng.sample(KEY_SIZES, 3)]
        self.keys += [b"", b"a b\r\n", rng.randbytes(12)]
        self.stream = itertools.count(1)
        self.prefix = b""
        self.alone = True
        """No other message at the same time: any key may be touched, and the whole database."""

    # Arguments.

    def name(self, key: bytes) -> bytes:
        return self.prefix + key

    def string(self) -> bytes:
        """A key that mostly holds a string."""
        rng = self.rng
        return self.name(rng.choice(self.hot) if rng.random() < 0.3 else rng.choice(self.keys))

    def any(self) -> bytes:
        """A key of any type, to be answered WRONGTYPE now and then."""
        rng = self.rng
        if rng.random() < 0.8:
            return self.string()
        return rng.choice((self.of(b"l"), self.of(b"s"), self.of(b"H"), self.of(b"z"), self.of(b"x")))

    def of(self, kind: bytes) -> bytes:
        """A key of one type: l list, s set, H hash, z sorted set, x stream, p HyperLogLog, g positions."""
        return self.name(kind + b"%d" % self.rng.randrange(3))

    def value(self) -> bytes:
        rng = self.rng
        roll = rng.random()
        if roll < 0.3:
            return b"%d" % (rng.getrandbits(rng.choice((1, 7, 14, 40, 63))) * rng.choice((1, -1)))
        if roll < 0.4:
            return encode_command("SET", self.string(), "stolen")
        if roll < 0.45:
            return rng.randbytes(rng.choice((0, 44, 45, 1000, 4095, 4096, 4097, 9000)))
        return rng.randbytes(rng.randrange(120))

    def small(self) -> bytes:
        return b"m%d" % self.rng.randrange(30)

    def number(self) -> bytes:
        return b"%d" % self.rng.randrange(-20, 20)

    # Commands, by what they work on.

    def get(self, key: bytes) -> Command:
        return [self.rng.choice((b"GET", b"GET", b"get")), key]

    def set(self, key: bytes) -> Command:
        return [self.rng.choice((b"SET", b"SET", b"Set")), key, self.value()]

    def hot_command(self) -> Command:
        key = self.name(self.rng.choice(self.hot)) if self.rng.random() < 0.97 else self.any()
        return self.get(key) if self.rng.random() < 0.5 else self.set(key)

    def hot_message(self, length: int) -> list[Command]:
        """GETs and SETs that the kernel can serve as a whole, if the keys are there: mostly of one kind
        only, because a message that sets a key and then touches it again passes."""
        rng = self.rng
        roll = rng.random()
        if roll < 0.15:
            return [self.hot_command() for _ in range(length)]
        keys = [self.name(key) for key in rng.sample(self.hot, min(length, 1 + rng.randrange(HOT)))]
        if roll < 0.5:
            return [self.set(key) for key in keys]
        if roll < 0.6:
            return [self.get(key) if rng.random() < 0.5 else self.set(key) for key in keys]
        return [self.get(rng.choice(keys[:3])) for _ in range(length)]

    def strings(self) -> Command:
        rng, k, v = self.rng, self.string, self.value
        makers: tuple[Callable[[], Command], ...] = (
            lambda: [b"APPEND", k(), v()[:40]],
            lambda: [b"INCR", k()],
            lambda: [b"INCRBY", k(), self.number()],
            lambda: [b"DECR", k()],
            lambda: [b"INCRBYFLOAT", k(), b"0.5"],
            lambda: [b"GETSET", k(), v()],
            lambda: [b"GETDEL", k()],
            lambda: [b"GETRANGE", k(), self.number(), self.number()],
            lambda: [b"SETRANGE", k(), b"%d" % rng.randrange(200), v()[:20]],
            lambda: [b"STRLEN", k()],
            lambda: [b"SETNX", k(), v()],
            lambda: [b"MGET", k(), k(), k(), self.any()],
            lambda: [b"MSET", k(), v(), k(), v()],
            lambda: [b"MSETNX", k(), v(), k(), v()],
            lambda: [b"SET", k(), v(), rng.choice((b"NX", b"XX", b"GET", b"KEEPTTL"))],
            lambda: [b"SET", k(), v(), b"EXAT", rng.choice((*FAR, PAST))],
            lambda: [b"SET", k(), v(), b"EX", RELATIVE],
            lambda: [b"SETEX", k(), RELATIVE, v()],
            lambda: [b"PSETEX", k(), RELATIVE + b"000", v()],
            lambda: [b"GETEX", k(), b"PERSIST"],
            lambda: [b"GETEX", k(), b"EXAT", rng.choice(FAR)],
            lambda: [b"GETEX", k(), b"PXAT", PAST + b"000"],
            lambda: [b"SETBIT", k(), b"%d" % rng.randrange(1000), b"%d" % rng.randrange(2)],
            lambda: [b"GETBIT", k(), b"%d" % rng.randrange(1000)],
            lambda: [b"BITCOUNT", k()],
            lambda: [b"BITPOS", k(), b"1"],
            lambda: [b"BITOP", rng.choice((b"AND", b"OR", b"XOR")), k(), k(), k()],
            lambda: [b"BITFIELD", k(), b"INCRBY", b"u5", b"100", b"3", b"GET", b"i9", b"0"],
            lambda: [b"LCS", k(), k(), b"LEN"],
            lambda: [b"OBJECT", b"ENCODING", k()],
            lambda: [b"SUBSTR", k(), b"0", b"5"],
            lambda: [b"SET", k()],
            lambda: [b"GET", k(), b"extra"],
            lambda: [b"SET", k(), v(), b"EX", b"0"],
        )
        return rng.choice(makers)()

    def generic(self) -> Command:
        rng, k = self.rng, self.any
        makers: tuple[Callable[[], Command], ...] = (
            lambda: [b"DEL", k()],
            lambda: [b"DEL", k(), k(), k()],
            lambda: [b"UNLINK", k(), k()],
            lambda: [b"EXISTS", k(), k()],
            lambda: [b"TYPE", k()],
            lambda: [b"TOUCH", k()],
            lambda: [b"RENAME", k(), k()],
            lambda: [b"RENAMENX", k(), k()],
            lambda: [b"COPY", k(), k(), b"REPLACE"],
            lambda: [b"COPY", k(), k()],
            lambda: [b"DUMP", self.string()],
            lambda: [b"EXPIRE", k(), RELATIVE],
            lambda: [b"EXPIRE", k(), RELATIVE, rng.choice((b"NX", b"XX"))],
            lambda: [b"EXPIRE", k(), b"-1"],
            lambda: [b"PEXPIRE", k(), b"0"],
            lambda: [b"EXPIREAT", k(), rng.choice((*FAR, PAST))],
            lambda: [b"EXPIREAT", k(), rng.choice(FAR), rng.choice((b"GT", b"LT", b"NX", b"XX"))],
            lambda: [b"PEXPIREAT", k(), rng.choice(FAR) + b"000"],
            lambda: [b"PERSIST", k()],
            lambda: [b"EVAL_RO", HAS_TTL, b"1", k()],
            lambda: [b"SORT", self.of(b"l"), b"ALPHA", b"STORE", self.of(b"l")],
            lambda: [b"OBJECT", b"ENCODING", k()],
            lambda: [b"RESTORE", self.string(), b"0", b"not a dump", b"REPLACE"],
        )
        return rng.choice(makers)()

    def collections(self) -> Command:
        rng, v = self.rng, lambda: self.value()[:50]
        lst, st, hsh, zs, stream = (
            lambda kind=kind: self.of(kind) for kind in (b"l", b"s", b"H", b"z", b"x")
        )
        makers: tuple[Callable[[], Command], ...] = (
            lambda: [b"LPUSH", lst(), v(), v()],
            lambda: [b"RPUSH", lst(), v()],
            lambda: [b"LPOP", lst()],
            lambda: [b"RPOP", lst(), b"3"],
            lambda: [b"LRANGE", lst(), b"0", b"-1"],
            lambda: [b"LTRIM", lst(), b"0", b"20"],
            lambda: [b"LMOVE", lst(), lst(), b"LEFT", b"RIGHT"],
            lambda: [b"LINSERT", lst(), b"BEFORE", v(), v()],
            lambda: [b"LMPOP", b"2", lst(), lst(), b"LEFT"],
            lambda: [b"SADD", st(), self.number(), self.number()],
            lambda: [b"SREM", st(), self.number()],
            lambda: [b"SMEMBERS", st()],
            lambda: [b"SINTERSTORE", st(), st(), st()],
            lambda: [b"SUNION", st(), st()],
            lambda: [b"SMOVE", st(), st(), self.number()],
            lambda: [b"HSET", hsh(), self.small(), v(), self.small(), v()],
            lambda: [b"HGET", hsh(), self.small()],
            lambda: [b"HGETALL", hsh()],
            lambda: [b"HDEL", hsh(), self.small()],
            lambda: [b"HINCRBY", hsh(), b"n", self.number()],
            lambda: [b"ZADD", zs(), self.number(), self.small()],
            lambda: [b"ZINCRBY", zs(), b"1.5", self.small()],
            lambda: [b"ZRANGE", zs(), b"0", b"-1", b"WITHSCORES"],
            lambda: [b"ZPOPMIN", zs()],
            lambda: [b"ZUNIONSTORE", zs(), b"2", zs(), zs()],
            lambda: [b"ZRANGESTORE", zs(), zs(), b"0", b"5"],
            lambda: [b"XADD", stream(), b"MAXLEN", b"30", b"%d-1" % next(self.stream), b"f", v()],
            lambda: [b"XRANGE", stream(), b"-", b"+", b"COUNT", b"5"],
            lambda: [b"XLEN", stream()],
            lambda: [b"XTRIM", stream(), b"MAXLEN", b"5"],
            lambda: [b"PFADD", self.of(b"p"), self.small(), self.small()],
            lambda: [b"PFCOUNT", self.of(b"p"), self.of(b"p")],
            lambda: [b"PFMERGE", self.string(), self.of(b"p")],
            lambda: [b"PFCOUNT", self.string()],
            lambda: [b"GEOADD", self.of(b"g"), b"13.361389", b"38.115556", self.small()],
            lambda: [b"GEODIST", self.of(b"g"), self.small(), self.small()],
        )
        return rng.choice(makers)()

    SCRIPTS = (
        b"return redis.call('set', KEYS[1], ARGV[1])",
        b"redis.call('set', KEYS[1], ARGV[1]) redis.call('append', KEYS[2], 'x') "
        b"return redis.call('get', KEYS[1])",
        b"local v = redis.call('get', KEYS[1]) redis.call('del', KEYS[2]) return v",
        b"return redis.pcall('incr', KEYS[1])",
        b"redis.call('rename', KEYS[1], KEYS[2]) return redis.call('get', KEYS[2])",
        b"redis.call('set', KEYS[1], 'half') return redis.call('incr', KEYS[2])",
        b"return {redis.call('get', KEYS[1]), redis.call('strlen', KEYS[2])}",
    )

    def script(self) -> Command:
        return [b"EVAL", self.rng.choice(self.SCRIPTS), b"2", self.string(), self.string(), self.value()]

    def whole_database(self) -> Command:
        """What only a message that runs alone may do."""
        rng = self.rng
        roll = rng.random()
        if roll < 0.3:
            return [rng.choice((b"FLUSHALL", b"FLUSHDB")), rng.choice((b"SYNC", b"ASYNC"))]
        if roll < 0.55:
            return [b"SWAPDB", b"0", b"1"]
        if roll < 0.75:
            return [b"MOVE", self.string(), b"1"]
        if roll < 0.95:
            return [b"COPY", self.string(), self.string(), b"DB", b"1", b"REPLACE"]
        return [b"DEBUG", b"RELOAD"]

    def other(self) -> Command:
        roll = self.rng.random()
        if roll < 0.40:
            return self.strings()
        if roll < 0.62:
            return self.generic()
        if roll < 0.90:
            return self.collections()
        if roll < 0.99 or not self.alone:
            return self.script()
        return self.whole_database()

    # Messages.

    def commands(self) -> list[Command]:
        rng = self.rng
        roll = rng.random()
        length = rng.choice(LENGTHS)
        if roll < 0.80:
            return self.hot_message(length)
        if roll < 0.87:
            return [self.hot_command() if rng.random() < 0.7 else self.other() for _ in range(length)]
        if roll < 0.96:
            return [self.other() for _ in range(rng.choice((1, 1, 2, 6)))]
        inner = [self.hot_command() if rng.random() < 0.5 else self.other() for _ in range(rng.randrange(6))]
        watch = [[b"WATCH", self.string(), self.string()]] if rng.random() < 0.4 else []
        touched = [self.hot_command()] if rng.random() < 0.5 else []
        return [*watch, *touched, [b"MULTI"], *inner, [rng.choice((b"EXEC", b"EXEC", b"DISCARD"))]]

    def step(self) -> Step:
        rng = self.rng
        if rng.random() < 0.75:
            self.prefix, self.alone = b"", True
            return [Message(rng.randrange(CONNECTIONS), self.commands())]
        messages = []
        for connection in rng.sample(range(CONNECTIONS), rng.randrange(2, CONNECTIONS + 1)):
            self.prefix, self.alone = b"%d:" % connection, False
            messages.append(Message(connection, self.commands()))
        return messages

    def watched(self) -> Iterator[Step]:
        """A transaction whose watched key another connection may change before EXEC."""
        rng = self.rng
        self.prefix, self.alone = b"", True
        watcher, other = rng.sample(range(CONNECTIONS), 2)
        key = self.string()
        yield [Message(watcher, [[b"WATCH", key], [b"GET", key]])]
        changes = [[b"SET", key if rng.random() < 0.5 else self.string(), self.value()]]
        yield [Message(other, changes if rng.random() < 0.7 else [[b"GET", key]])]
        yield [Message(watcher, [[b"MULTI"], [b"SET", key, b"by EXEC"], [b"GET", key]])]
        yield [Message(other, [self.hot_command()])]
        yield [Message(watcher, [[b"EXEC"]])]

    def script_of(self, commands: int) -> Iterator[Step]:
        """Steps with at least so many commands."""
        written = 0
        while written < commands:
            steps = self.watched() if self.rng.random() < 0.02 else [self.step()]
            for step in steps:
                written += sum(len(message.commands) for message in step)
                yield step


# -- playing --


@dataclass
class Played:
    """What a script came to: commands answered alike, or the first difference."""

    commands: int = 0
    seconds: float = 0.0
    difference: str = ""
    trail: list[Step] = field(default_factory=list)
    """The last steps before the difference."""

    def __str__(self) -> str:
        last = "\n".join(f"  {message}" for step in self.trail for message in step)
        return (
            f"{self.commands} commands in {self.seconds:.1f} s; {self.difference}\n{last}"
            if self.difference
            else (f"{self.commands} commands answered alike in {self.seconds:.1f} s")
        )


class Twins:
    """The same connections to both servers. Some speak RESP3, one works on database 1."""

    def __init__(self, offloaded: Sut, plain: Sut) -> None:
        self.servers = (offloaded, plain)
        self.conns = [[self._open(sut, number) for number in range(CONNECTIONS)] for sut in self.servers]

    @staticmethod
    def _open(sut: Sut, number: int) -> Conn:
        conn = sut.connect(proto=3 if number == 1 else 2)
        conn.do("SELECT", "1" if number == CONNECTIONS - 1 else "0")
        return conn

    def play(self, steps: Iterator[Step], remembered: int = 12) -> Played:
        played = Played()
        began = time.monotonic()
        for step in steps:
            played.trail = [*played.trail[-remembered:], step]
            for conns in self.conns:
                for message in step:
                    conns[message.connection].send_bytes(encode_pipeline(message.commands))
            for message in step:
                played.difference = self._compare(message)
                if played.difference:
                    played.seconds = time.monotonic() - began
                    return played
                played.commands += len(message.commands)
        played.seconds = time.monotonic() - began
        return played

    def _compare(self, message: Message) -> str:
        """Reads the plain server's replies, then as many bytes from the offloaded one."""
        offloaded, plain = (conns[message.connection] for conns in self.conns)
        expected = _replies(plain, len(message.commands))
        got, trouble = b"", ""
        while len(got) < len(expected) and expected.startswith(got):
            try:
                part = offloaded.sock.recv(len(expected) - len(got))
            except TimeoutError:
                part, trouble = b"", " (and then nothing)"
            if not part:
                trouble = trouble or " (and then closed)"
                break
            got += part
        if got == expected:
            return ""
        at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(got))
        start = max(0, at - 60)
        return (
            f"replies differ at byte {at} of connection {message.connection}:\n"
            f"  offloaded … {got[start : at + 100]!r}{trouble}\n  plain     … {expected[start : at + 100]!r}"
        )

    def nothing_more(self) -> bool:
        """Neither server has said anything that was not asked for."""
        return all(conn.quiet() for conns in self.conns for conn in conns)


def _replies(conn: Conn, count: int) -> bytes:
    """The bytes of exactly so many replies."""
    data, decoder = b"", Decoder()
    while count:
        try:
            part = conn.sock.recv(1 << 18)
        except TimeoutError:
            raise Timeout(f"the plain server owes {count} replies after {data[-200:]!r}") from None
        if not part:
            raise ConnectionError("closed by the plain server")
        data += part
        decoder.feed(part)
        count -= sum(1 for _ in decoder)
    assert count == 0 and not decoder.pending
    return data


def digest(sut: Sut) -> bytes:
    """DEBUG DIGEST: one hash over all databases, keys, values and whether they have a TTL."""
    with sut.connect() as conn:
        for database in ("1", "0"):
            conn.do("SELECT", database)
            # Keys whose time is over count until somebody looks at them.
            conn.do("SCAN", "0", "COUNT", "1000000")
        reply = conn.do("DEBUG", "DIGEST")
    assert isinstance(reply, bytes) and not isinstance(reply, ErrorReply), reply
    return reply


def differing_keys(left: Sut, right: Sut, most: int = 10) -> list[str]:
    """What a difference of digests comes from: keys with DUMP on each side."""
    found = []
    with left.connect() as one, right.connect() as two:
        for database in ("0", "1"):
            for conn in (one, two):
                conn.do("SELECT", database)
            names: Sequence[bytes] = sorted({*one.do("KEYS", "*"), *two.do("KEYS", "*")})
            for name in names:
                dumps = [(conn.do("DUMP", name), conn.do("TTL", name) >= 0) for conn in (one, two)]
                if dumps[0] != dumps[1]:
                    found.append(f"db {database}, {name!r}: {dumps[0]!r} and {dumps[1]!r}")
    return found[:most]
