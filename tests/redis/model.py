"""What redis-server 7.0 answers, exactly, for the commands that the checker uses: a model of its data and
connections.

``Model.run(peer, args)`` changes the model and gives the bytes that the server must send for that command.
It is checked against a plain redis-server by the same checker that uses it against the offloaded one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OK = b"+OK\r\n"
QUEUED = b"+QUEUED\r\n"
ZERO = b":0\r\n"
ONE = b":1\r\n"
WRONGTYPE = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
NO_KEY = b"-ERR no such key\r\n"
NOT_INT = b"-ERR value is not an integer or out of range\r\n"
OVERFLOW = b"-ERR increment or decrement would overflow\r\n"
SAME_OBJECT = b"-ERR source and destination objects are the same\r\n"
EXECABORT = b"-EXECABORT Transaction discarded because of previous errors.\r\n"
LONG_MAX = (1 << 63) - 1
LONG_MIN = -(1 << 63)

SCRIPT_SET_GET = b'redis.call("SET",KEYS[1],ARGV[1]) return redis.call("GET",KEYS[1])'
SCRIPT_GET = b'return redis.call("GET",KEYS[1])'
SCRIPT_APPEND = b'redis.call("APPEND",KEYS[1],ARGV[1]) return redis.call("STRLEN",KEYS[1])'
SCRIPT_MOVE = (
    b'local v=redis.call("GET",KEYS[1]) if v then redis.call("SET",KEYS[2],v) redis.call("DEL",KEYS[1]) '
    b"return 1 else return 0 end"
)


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def array(items: list[bytes]) -> bytes:
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def parse_int(data: bytes) -> int | None:
    """What redis's string2ll makes of it: canonical 64-bit decimals only."""
    digits = data[1:] if data[:1] == b"-" else data
    if not digits.isdigit() or (digits[:1] == b"0" and data != b"0") or len(digits) > 19:
        return None
    value = int(data)
    return value if LONG_MIN <= value <= LONG_MAX else None


class Peer:
    """The server's side of one connection: its database, protocol, transaction and reply mode."""

    __slots__ = ("aborted", "db", "queue", "reply", "resp3", "subscribed", "watched")

    def __init__(self) -> None:
        self.reset()
        self.resp3 = False

    def reset(self) -> None:
        self.db = 0
        self.resp3 = False
        self.queue: list[list[bytes]] | None = None
        self.aborted = False
        self.watched: dict[tuple[int, bytes], int] = {}
        self.reply = "on"
        self.subscribed: list[bytes] = []

    @property
    def null(self) -> bytes:
        return b"_\r\n" if self.resp3 else b"$-1\r\n"

    @property
    def null_array(self) -> bytes:
        return b"_\r\n" if self.resp3 else b"*-1\r\n"


class Model:
    """Two databases of strings and lists. Times to live are absolute and far away, so nothing expires by
    itself."""

    def __init__(self) -> None:
        self.data: list[dict[bytes, Any]] = [{}, {}]
        # Strings that redis keeps in its raw encoding because a command wrote into them.
        self.raw: list[set[bytes]] = [set(), set()]
        self.expire: list[dict[bytes, int]] = [{}, {}]
        self.changes: dict[tuple[int, bytes], int] = {}
        self.commands: dict[bytes, Callable[[Peer, list[bytes]], bytes]] = {
            name[3:].encode(): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }

    # -- the connection --

    def run(self, peer: Peer, args: list[bytes]) -> bytes:
        """The exact reply (empty where the server stays silent) to one command."""
        name = args[0].upper()
        if name == b"CLIENT":
            return self._client(peer, args)
        reply = self._run(peer, name, args)
        if peer.reply == "on":
            return reply
        if peer.reply == "skip":
            peer.reply = "on"
        return b""

    def _client(self, peer: Peer, args: list[bytes]) -> bytes:
        mode = args[2].lower()
        if mode == b"off":
            peer.reply = "off"
            return b""
        if mode == b"skip":
            if peer.reply == "on":
                peer.reply = "skip"
            return b""
        peer.reply = "on"
        return OK

    def _run(self, peer: Peer, name: bytes, args: list[bytes]) -> bytes:
        if name == b"RESET":
            peer.reset()
            return b"+RESET\r\n"
        if name == b"MULTI":
            if peer.queue is not None:
                return b"-ERR MULTI calls can not be nested\r\n"
            peer.queue = []
            return OK
        if name == b"DISCARD":
            if peer.queue is None:
                return b"-ERR DISCARD without MULTI\r\n"
            self._end(peer)
            return OK
        if name == b"EXEC":
            return self._exec(peer)
        if name == b"WATCH":
            if peer.queue is not None:
                return b"-ERR WATCH inside MULTI is not allowed\r\n"
            for key in args[1:]:
                peer.watched.setdefault((peer.db, key), self.changes.get((peer.db, key), 0))
            return OK
        command = self.commands.get(name)
        if command is None:
            if peer.queue is not None:
                peer.aborted = True
            shown = b"".join(b"'%b' " % arg for arg in args[1:])
            return b"-ERR unknown command '%b', with args beginning with: %b\r\n" % (args[0], shown)
        if peer.queue is not None:
            peer.queue.append(args)
            return QUEUED
        return command(peer, args)

    def _end(self, peer: Peer) -> None:
        peer.queue = None
        peer.aborted = False
        peer.watched = {}

    def _exec(self, peer: Peer) -> bytes:
        if peer.queue is None:
            return b"-ERR EXEC without MULTI\r\n"
        queue, aborted, watched = peer.queue, peer.aborted, peer.watched
        self._end(peer)
        if aborted:
            return EXECABORT
        if any(self.changes.get(where, 0) != seen for where, seen in watched.items()):
            return peer.null_array
        return array([self.commands[args[0].upper()](peer, args) for args in queue])

    # -- helpers over one database --

    def _touch(self, db: int, key: bytes) -> None:
        self.changes[db, key] = self.changes.get((db, key), 0) + 1

    def _put(self, db: int, key: bytes, value: Any, keep_ttl: bool = False) -> None:
        self.data[db][key] = value
        self.raw[db].discard(key)
        if not keep_ttl:
            self.expire[db].pop(key, None)
        self._touch(db, key)

    def _drop(self, db: int, key: bytes) -> bool:
        if self.data[db].pop(key, None) is None:
            return False
        self.raw[db].discard(key)
        self.expire[db].pop(key, None)
        self._touch(db, key)
        return True

    def encoding(self, db: int, key: bytes) -> bytes:
        """What OBJECT ENCODING says of a key that exists."""
        value = self.data[db][key]
        if isinstance(value, list):
            return b"quicklist"
        if key in self.raw[db]:
            return b"raw"
        if len(value) <= 20 and parse_int(value) is not None:
            return b"int"
        return b"embstr" if len(value) <= 44 else b"raw"

    # -- what the whole server does --

    def flush(self, db: int | None = None) -> None:
        """FLUSHALL, or FLUSHDB of one database."""
        for each in range(2) if db is None else [db]:
            for key in self.data[each]:
                self._touch(each, key)
            self.data[each], self.raw[each], self.expire[each] = {}, set(), {}

    def swap(self) -> None:
        """SWAPDB 0 1."""
        for key in {*self.data[0], *self.data[1]}:
            self._touch(0, key)
            self._touch(1, key)
        for state in (self.data, self.raw, self.expire):
            state.reverse()

    def reload(self) -> None:
        """DEBUG RELOAD: the data stay, encodings are chosen anew."""
        self.raw = [set(), set()]

    def do_FLUSHALL(self, peer: Peer, args: list[bytes]) -> bytes:
        self.flush()
        return OK

    def do_FLUSHDB(self, peer: Peer, args: list[bytes]) -> bytes:
        self.flush(peer.db)
        return OK

    def do_SWAPDB(self, peer: Peer, args: list[bytes]) -> bytes:
        self.swap()
        return OK

    def do_DEBUG(self, peer: Peer, args: list[bytes]) -> bytes:
        self.reload()
        return OK

    # -- commands --

    def do_PING(self, peer: Peer, args: list[bytes]) -> bytes:
        if peer.subscribed and not peer.resp3:
            return array([bulk(b"pong"), bulk(args[1] if len(args) > 1 else b"")])
        return bulk(args[1]) if len(args) > 1 else b"+PONG\r\n"

    def do_ECHO(self, peer: Peer, args: list[bytes]) -> bytes:
        return bulk(args[1])

    def do_SELECT(self, peer: Peer, args: list[bytes]) -> bytes:
        peer.db = int(args[1])
        return OK

    def do_UNWATCH(self, peer: Peer, args: list[bytes]) -> bytes:
        peer.watched = {}
        return OK

    def do_SUBSCRIBE(self, peer: Peer, args: list[bytes]) -> bytes:
        out = []
        for channel in args[1:]:
            if channel not in peer.subscribed:
                peer.subscribed.append(channel)
            out.append(self._push(peer, b"subscribe", bulk(channel)))
        return b"".join(out)

    def do_UNSUBSCRIBE(self, peer: Peer, args: list[bytes]) -> bytes:
        out = []
        for channel in args[1:]:
            if channel in peer.subscribed:
                peer.subscribed.remove(channel)
            out.append(self._push(peer, b"unsubscribe", bulk(channel)))
        return b"".join(out)

    @staticmethod
    def _push(peer: Peer, kind: bytes, channel: bytes) -> bytes:
        mark = b">" if peer.resp3 else b"*"
        return b"%b3\r\n%b%b:%d\r\n" % (mark, bulk(kind), channel, len(peer.subscribed))

    def do_GET(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1])
        if value is None:
            return peer.null
        if value.__class__ is list:
            return WRONGTYPE
        return b"$%d\r\n%b\r\n" % (len(value), value)

    def do_SET(self, peer: Peer, args: list[bytes]) -> bytes:
        db = peer.db
        if len(args) == 3:
            self._put(db, args[1], args[2])
            return OK
        options = [arg.upper() for arg in args[3:]]
        key, old = args[1], self.data[db].get(args[1])
        if b"GET" in options and isinstance(old, list):
            return WRONGTYPE
        said = (peer.null if old is None else bulk(old)) if b"GET" in options else None
        if (b"NX" in options and old is not None) or (b"XX" in options and old is None):
            return peer.null if said is None else said
        self._put(db, key, args[2], keep_ttl=b"KEEPTTL" in options)
        if b"EXAT" in options:
            self.expire[db][key] = int(options[options.index(b"EXAT") + 1])
        return OK if said is None else said

    def do_SETNX(self, peer: Peer, args: list[bytes]) -> bytes:
        if args[1] in self.data[peer.db]:
            return ZERO
        self._put(peer.db, args[1], args[2])
        return ONE

    def do_GETSET(self, peer: Peer, args: list[bytes]) -> bytes:
        reply = self.do_GET(peer, args)
        if reply is not WRONGTYPE:
            self._put(peer.db, args[1], args[2])
        return reply

    def do_GETDEL(self, peer: Peer, args: list[bytes]) -> bytes:
        reply = self.do_GET(peer, args)
        if reply is not WRONGTYPE:
            self._drop(peer.db, args[1])
        return reply

    def do_GETEX(self, peer: Peer, args: list[bytes]) -> bytes:
        reply = self.do_GET(peer, args)
        key = args[1]
        if reply is WRONGTYPE or key not in self.data[peer.db]:
            return reply
        option = args[2].upper() if len(args) > 2 else b""
        if option == b"PERSIST" and self.expire[peer.db].pop(key, None) is not None:
            self._touch(peer.db, key)
        elif option == b"EXAT":
            self.expire[peer.db][key] = int(args[3])
            self._touch(peer.db, key)
        return reply

    def do_STRLEN(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1], b"")
        return WRONGTYPE if isinstance(value, list) else b":%d\r\n" % len(value)

    def do_GETRANGE(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1], b"")
        if isinstance(value, list):
            return WRONGTYPE
        start, end, size = int(args[2]), int(args[3]), len(value)
        if start < 0 and end < 0 and start > end:
            return bulk(b"")
        start = max(size + start, 0) if start < 0 else start
        end = max(size + end, 0) if end < 0 else min(end, size - 1)
        return bulk(b"" if start > end or size == 0 else value[start : end + 1])

    def do_APPEND(self, peer: Peer, args: list[bytes]) -> bytes:
        db, key = peer.db, args[1]
        value = self.data[db].get(key)
        if value is None:
            self._put(db, key, args[2])
            return b":%d\r\n" % len(args[2])
        if isinstance(value, list):
            return WRONGTYPE
        return self._write(db, key, value + args[2])

    def _write(self, db: int, key: bytes, value: bytes) -> bytes:
        self.data[db][key] = value
        self.raw[db].add(key)
        self._touch(db, key)
        return b":%d\r\n" % len(value)

    def do_SETRANGE(self, peer: Peer, args: list[bytes]) -> bytes:
        db, key, at, piece = peer.db, args[1], int(args[2]), args[3]
        value = self.data[db].get(key, b"")
        if isinstance(value, list):
            return WRONGTYPE
        if not piece:
            return b":%d\r\n" % len(value)
        return self._write(db, key, value[:at].ljust(at, b"\0") + piece + value[at + len(piece) :])

    def do_SETBIT(self, peer: Peer, args: list[bytes]) -> bytes:
        db, key, at, on = peer.db, args[1], int(args[2]), int(args[3])
        value = self.data[db].get(key)
        if isinstance(value, list):
            return WRONGTYPE
        size = at // 8 + 1
        grown = bytearray((value or b"").ljust(size, b"\0"))
        mask = 0x80 >> (at % 8)
        was = 1 if grown[at // 8] & mask else 0
        if on:
            grown[at // 8] |= mask
        else:
            grown[at // 8] &= ~mask
        self.raw[db].add(key)
        if value is None or size > len(value) or was != on:
            self.data[db][key] = bytes(grown)
            self._touch(db, key)
        return b":%d\r\n" % was

    def do_BITCOUNT(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1], b"")
        if isinstance(value, list):
            return WRONGTYPE
        return b":%d\r\n" % int.from_bytes(value, "big").bit_count()

    def _add(self, peer: Peer, key: bytes, by: int) -> bytes:
        db = peer.db
        value = self.data[db].get(key, b"0")
        if isinstance(value, list):
            return WRONGTYPE
        number = parse_int(value)
        if number is None:
            return NOT_INT
        if not LONG_MIN <= number + by <= LONG_MAX:
            return OVERFLOW
        self._put(db, key, b"%d" % (number + by), keep_ttl=True)
        return b":%d\r\n" % (number + by)

    def do_INCR(self, peer: Peer, args: list[bytes]) -> bytes:
        return self._add(peer, args[1], 1)

    def do_DECR(self, peer: Peer, args: list[bytes]) -> bytes:
        return self._add(peer, args[1], -1)

    def do_INCRBY(self, peer: Peer, args: list[bytes]) -> bytes:
        return self._add(peer, args[1], int(args[2]))

    def do_DEL(self, peer: Peer, args: list[bytes]) -> bytes:
        return b":%d\r\n" % sum(self._drop(peer.db, key) for key in args[1:])

    do_UNLINK = do_DEL

    def do_EXISTS(self, peer: Peer, args: list[bytes]) -> bytes:
        return b":%d\r\n" % sum(key in self.data[peer.db] for key in args[1:])

    do_TOUCH = do_EXISTS

    def do_MSET(self, peer: Peer, args: list[bytes]) -> bytes:
        for key, value in zip(args[1::2], args[2::2], strict=True):
            self._put(peer.db, key, value)
        return OK

    def do_MSETNX(self, peer: Peer, args: list[bytes]) -> bytes:
        if any(key in self.data[peer.db] for key in args[1::2]):
            return ZERO
        self.do_MSET(peer, args)
        return ONE

    def do_MGET(self, peer: Peer, args: list[bytes]) -> bytes:
        values = [self.data[peer.db].get(key) for key in args[1:]]
        return array([bulk(value) if isinstance(value, bytes) else peer.null for value in values])

    def _move(self, old: tuple[int, bytes], new: tuple[int, bytes], keep: bool) -> None:
        (db, key), (to, name) = old, new
        value, raw, expire = self.data[db][key], key in self.raw[db], self.expire[db].get(key)
        self._put(to, name, list(value) if isinstance(value, list) else value)
        if raw:
            self.raw[to].add(name)
        if expire is not None:
            self.expire[to][name] = expire
        if not keep:
            self._drop(db, key)

    def do_RENAME(self, peer: Peer, args: list[bytes]) -> bytes:
        if args[1] not in self.data[peer.db]:
            return NO_KEY
        if args[1] != args[2]:
            self._move((peer.db, args[1]), (peer.db, args[2]), keep=False)
        return OK

    def do_RENAMENX(self, peer: Peer, args: list[bytes]) -> bytes:
        if args[1] not in self.data[peer.db]:
            return NO_KEY
        if args[2] in self.data[peer.db]:
            return ZERO
        self._move((peer.db, args[1]), (peer.db, args[2]), keep=False)
        return ONE

    def do_COPY(self, peer: Peer, args: list[bytes]) -> bytes:
        options = [arg.upper() for arg in args[3:]]
        to = int(options[options.index(b"DB") + 1]) if b"DB" in options else peer.db
        if to == peer.db and args[1] == args[2]:
            return SAME_OBJECT
        if args[1] not in self.data[peer.db] or (args[2] in self.data[to] and b"REPLACE" not in options):
            return ZERO
        self._move((peer.db, args[1]), (to, args[2]), keep=True)
        return ONE

    def do_MOVE(self, peer: Peer, args: list[bytes]) -> bytes:
        to = int(args[2])
        if to == peer.db:
            return SAME_OBJECT
        if args[1] not in self.data[peer.db] or args[1] in self.data[to]:
            return ZERO
        self._move((peer.db, args[1]), (to, args[1]), keep=False)
        return ONE

    def do_EXPIREAT(self, peer: Peer, args: list[bytes]) -> bytes:
        if args[1] not in self.data[peer.db]:
            return ZERO
        at = int(args[2])
        if at < 1_000_000_000:
            self._drop(peer.db, args[1])
        else:
            self.expire[peer.db][args[1]] = at
            self._touch(peer.db, args[1])
        return ONE

    def do_EXPIRETIME(self, peer: Peer, args: list[bytes]) -> bytes:
        if args[1] not in self.data[peer.db]:
            return b":-2\r\n"
        return b":%d\r\n" % self.expire[peer.db].get(args[1], -1)

    def do_PERSIST(self, peer: Peer, args: list[bytes]) -> bytes:
        if self.expire[peer.db].pop(args[1], None) is None:
            return ZERO
        self._touch(peer.db, args[1])
        return ONE

    def do_TYPE(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1])
        return b"+none\r\n" if value is None else b"+list\r\n" if isinstance(value, list) else b"+string\r\n"

    def do_OBJECT(self, peer: Peer, args: list[bytes]) -> bytes:
        return peer.null if args[2] not in self.data[peer.db] else bulk(self.encoding(peer.db, args[2]))

    def do_LPUSH(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1])
        if isinstance(value, bytes):
            return WRONGTYPE
        if value is None:
            self._put(peer.db, args[1], [args[2]])
            return ONE
        value.insert(0, args[2])
        self._touch(peer.db, args[1])
        return b":%d\r\n" % len(value)

    def do_LLEN(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1], [])
        return WRONGTYPE if isinstance(value, bytes) else b":%d\r\n" % len(value)

    def do_LPOP(self, peer: Peer, args: list[bytes]) -> bytes:
        value = self.data[peer.db].get(args[1])
        if value is None:
            return peer.null
        if isinstance(value, bytes):
            return WRONGTYPE
        item = value.pop(0)
        if value:
            self._touch(peer.db, args[1])
        else:
            self._drop(peer.db, args[1])
        return bulk(item)

    def do_EVAL(self, peer: Peer, args: list[bytes]) -> bytes:
        script, key = args[1], args[3]
        if script == SCRIPT_GET:
            reply = self.do_GET(peer, [b"GET", key])
            return self._script_error(reply, script)
        if script == SCRIPT_SET_GET:
            self._put(peer.db, key, args[4])
            return bulk(args[4])
        if script == SCRIPT_APPEND:
            return self._script_error(self.do_APPEND(peer, [b"APPEND", key, args[4]]), script)
        if script == SCRIPT_MOVE:
            value = self.data[peer.db].get(key)
            if isinstance(value, list):
                return self._script_error(WRONGTYPE, script)
            if value is None:
                return ZERO
            self._put(peer.db, args[4], value)
            self._drop(peer.db, key)
            return ONE
        raise ValueError(f"the model does not know this script: {script!r}")

    @staticmethod
    def _script_error(reply: bytes, script: bytes) -> bytes:
        if not reply.startswith(b"-"):
            return reply
        import hashlib

        sha = hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
        return reply[:-2] + b" script: %b, on @user_script:1.\r\n" % sha
