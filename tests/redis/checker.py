"""The model checker: many connections from several processes, every reply compared with what Redis must say.

Three kinds of work, mixed by weight (``Config.weights``):

- **own**: keys that belong to one process. Commands of every sort on several of its connections (fast ones,
  slow ones, pipelines, split sends, replies read late, transactions, commands that demote a connection),
  each reply compared byte for byte with ``model.Model``.
- **registers**: keys with one writer and readers everywhere. A value carries its version; nobody may read a
  version older than one acknowledged or seen before his read began, nor one never sent, nor a torn value;
  and where the writer wrote A then B, who reads B at version v then reads A at v or later. Anyone rewrites
  registers with commands that keep the version (APPEND of nothing, SETRANGE of the same byte, a script that
  sets what it got), so that an update of Redis's that overruns one of the kernel's shows.
- **races**: a few commands on one key at the same time from several connections; the replies and the final
  value must be explained by some order (tried out, all orders).

``python -m tests.redis.checker --port 6379 --ops 1000000`` runs it by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import mmap
import multiprocessing
import multiprocessing.connection
import random
import select
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from kflex_repro.redis.resp import Decoder, ErrorReply, encode_command
from tests.redis import model as m

FAR = 4_102_444_800  # 2100-01-01, for times to live that never end here
MAX_REGISTERS = 1024
HISTORY = 40


@dataclass(frozen=True)
class Config:
    """What to do. ``ops`` counts commands; the run ends at ``ops`` or after ``seconds``, whichever comes
    first."""

    port: int
    host: str = "127.0.0.1"
    ops: int = 100_000
    seconds: float = 600.0
    connections: int = 56
    workers: int = 4
    seed: int = 1
    weights: tuple[tuple[str, float], ...] = (("own", 0.55), ("registers", 0.35), ("races", 0.10))
    pairs: int = 16
    """Register pairs."""
    mutate: float = 0.12
    """Share of register actions that rewrite a register without changing its version."""
    blocked: float = 0.02
    """Share of register steps with commands waiting behind a BLPOP, run while the writer hammers."""
    burst: float = 0.2
    """Share of writes that are one message of many SETs."""
    demote: float = 0.04
    """Share of own batches with commands that demote their connection."""
    whole_server: bool = False
    """FLUSHALL, SWAPDB, DEBUG RELOAD among the own commands: needs workers=1 and no other work on the
    server."""
    sizes: tuple[int, ...] = (0, 1, 2, 7, 16, 63, 64, 65, 100, 300, 1000, 4000, 4095, 4096, 4097, 5000)
    keys: int = 20
    """Own keys of each worker."""
    reply_timeout: float = 10.0
    keep_going: bool = False
    """Go on after a violation (each worker still stops at its own first)."""


@dataclass
class Report:
    """What a run did and found. ``violations`` are complete texts, with the history of the connection."""

    ops: int
    seconds: float
    connections: int
    by_kind: dict[str, int]
    violations: list[str]

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.by_kind.items()))
        line = (
            f"{self.ops} operations over {self.connections} connections in {self.seconds:.1f} s "
            f"({self.ops / max(self.seconds, 1e-9):.0f}/s; {kinds}): {len(self.violations)} violations"
        )
        return "\n\n".join([line, *self.violations[:4]])


class Violation(Exception):
    """The server said, or did not say, what it must."""


class Shared:
    """Memory of all workers: who to stop, what was done, and the registers' versions (8-byte stores are
    atomic)."""

    def __init__(self, workers: int) -> None:
        self._map = mmap.mmap(-1, 8 * (8 + 2 * workers + 3 * MAX_REGISTERS) + 4096)
        self.words = memoryview(self._map).cast("Q")
        self.done = 8
        self.acked = 8 + 2 * workers
        self.issued = self.acked + MAX_REGISTERS
        self.seen = self.issued + MAX_REGISTERS

    @property
    def stop(self) -> bool:
        return bool(self.words[0])

    def stop_all(self) -> None:
        self.words[0] = 1


class Link:
    """A connection of the checker: raw socket, the model of its server side, and what happened on it
    lately."""

    def __init__(self, config: Config, rng: random.Random, name: str) -> None:
        self.config, self.rng, self.name = config, rng, name
        self.history: deque[str] = deque(maxlen=HISTORY)
        self.sock: socket.socket | None = None
        self.opened = 0
        self.open()

    def open(self) -> None:
        self.close()
        config = self.config
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.sock = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds, rest = divmod(config.reply_timeout, 1)
        # A timeout of the kernel's costs no poll() before each recv(), unlike one of Python's.
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6))
        )
        sock.connect((config.host, config.port))
        self.peer = m.Peer()
        self.demoted = False
        self.decoder = Decoder()
        self.opened += 1
        self.polls = self.rng.random() < 0.2
        self.history.append(
            f"-- connected from port {sock.getsockname()[1]}{', polls' if self.polls else ''}"
        )
        if self.rng.random() < 0.15:
            self.send(encode_command("HELLO", "3"), "HELLO 3")
            self.reply()
            self.peer.resp3 = True

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def send(self, data: bytes, what: str, more: bool = False) -> None:
        """One send() of the bytes; one in ten as a sendmsg() of several pieces. ``more``: with MSG_MORE."""
        self.history.append(f"> {what}")
        sock = self.sock
        assert sock is not None
        try:
            if self.rng.random() < 0.1:
                cuts = sorted(self.rng.choices(range(len(data) + 1), k=3))
                pieces = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
                sent = sock.sendmsg(pieces, [], socket.MSG_MORE if more else 0)
                if sent < len(data):
                    sock.sendall(data[sent:])
            else:
                sock.sendall(data, socket.MSG_MORE if more else 0)
        except OSError as error:
            raise self.violation(f"send failed: {error}") from None

    def recv(self, count: int) -> bytes:
        sock = self.sock
        assert sock is not None
        began = time.monotonic()
        while True:
            try:
                if self.polls and not select.select([sock], [], [], self.config.reply_timeout)[0]:
                    raise BlockingIOError
                data = sock.recv(count)
                break
            except BlockingIOError:
                # recv() on a socket in a sockmap may end early when the server dies: the next tells how.
                if time.monotonic() - began > self.config.reply_timeout * 0.9:
                    raise self.violation(f"no reply within {self.config.reply_timeout} s") from None
            except OSError as error:
                raise self.violation(f"recv failed: {error}") from None
        if not data:
            raise self.violation("closed by the server")
        return data

    def expect(self, expected: bytes) -> None:
        """Reads exactly these bytes."""
        got = b""
        while len(got) < len(expected):
            try:
                got += self.recv(len(expected) - len(got))
            except Violation as error:
                raise self.violation(
                    f"{str(error).splitlines()[0]}, after {show(got)} of {show(expected)}"
                ) from None
            if not expected.startswith(got):
                at = next(i for i, (x, y) in enumerate(zip(got, expected, strict=False)) if x != y)
                rest = self.drain()
                raise self.violation(
                    f"reply differs at byte {at}:\n    expected {show(expected, at)}"
                    f"\n    got      {show(got + rest, at)}"
                )
        self.history.append(f"< {show(got)}")

    def drain(self) -> bytes:
        assert self.sock is not None
        with contextlib.suppress(OSError):
            if select.select([self.sock], [], [], 0.05)[0]:
                return self.sock.recv(4096)
        return b""

    def reply(self) -> Any:
        """The next reply, decoded."""
        while True:
            value = self.decoder.pop()
            if value is not Decoder.INCOMPLETE:
                self.history.append(f"< {show(value)}")
                return value
            self.decoder.feed(self.recv(1 << 16))

    def violation(self, what: str) -> Violation:
        tail = "\n    ".join(self.history)
        return Violation(f"{what}\n  on {self.name}, its last exchanges:\n    {tail}")


def show(value: Any, around: int = 0) -> str:
    """A value, shortened to what is worth reading."""
    if isinstance(value, bytes):
        if len(value) <= 200:
            return repr(value)
        start = max(0, around - 60)
        return f"{len(value)} bytes, from {start}: {value[start : start + 160]!r}…"
    if isinstance(value, list) and len(value) > 30:
        return f"[{', '.join(map(show, value[:30]))}, … {len(value)}]"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    return repr(value)


def show_command(args: Iterable[bytes]) -> str:
    return " ".join(arg.decode() if arg.isalnum() else show(arg) for arg in args)


def show_commands(commands: list[list[bytes]]) -> str:
    return " | ".join(show_command(args) for args in commands)


_HEADS = [b"$%d\r\n" % n for n in range(6000)]


def encode(args: list[bytes]) -> bytes:
    out = b"*%d\r\n" % len(args)
    for arg in args:
        size = len(arg)
        out += (_HEADS[size] if size < 6000 else b"$%d\r\n" % size) + arg + b"\r\n"
    return out


def forget(link: Link, keys: list[bytes]) -> None:
    """Deletes what an earlier run may have left, in both databases."""
    link.open()
    for args in ([b"SELECT", b"1"], [b"DEL", *keys], [b"SELECT", b"0"], [b"DEL", *keys]):
        link.send(encode(args), show_command(args))
        link.reply()
    link.open()


CASES = {b"GET": [b"GET", b"get", b"Get", b"gEt"], b"SET": [b"SET", b"set", b"sET", b"Set"]}


class Own:
    """Private keys, all commands, exact replies."""

    def __init__(self, config: Config, rng: random.Random, links: list[Link], tag: bytes) -> None:
        self.config, self.rng, self.links = config, rng, links
        self.model = m.Model()
        self.keys = self._keys(tag)
        self.inline = [key for key in self.keys if key.isalnum() and len(key) < 40]
        self.pool = self._pool()
        self.count = 0
        self.slow: list[Callable[[list[bytes]], list[bytes]]] = self._slow()
        forget(links[0], self.keys)

    def _keys(self, tag: bytes) -> list[bytes]:
        rng = self.rng
        sizes = [len(tag) + 1, 8, 8, 12, 12, 16, 16, 16, 24, 31, 32, 33, 63, 64, 65, 128, 249, 250, 251, 300]
        keys = []
        for number, size in enumerate(itertools.islice(itertools.cycle(sizes), self.config.keys)):
            # The shortest key there is, once; the others have room for a number.
            stem = tag + b"0" if number == 0 else b"%b%04d" % (tag, number)
            fill = rng.randbytes(size) if number % 3 == 0 else bytes(rng.choices(b"abcdefgh0123", k=size))
            keys.append((stem + fill)[: max(size, len(stem))])
        return keys

    def _pool(self) -> list[bytes]:
        rng, pool = self.rng, []
        for _ in range(400):
            size = rng.choice(self.config.sizes) if rng.random() < 0.5 else rng.randrange(0, 120)
            pool.append(rng.randbytes(size))
        # What would hurt a parser that loses its place.
        pool += [
            b"\r\n",
            b"$-1\r\n",
            b"+OK\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"*3\r\n$3\r\nSET\r\n",
            b"\0",
            b" ",
        ]
        return pool

    def value(self) -> bytes:
        rng = self.rng
        roll = rng.random()
        if roll < 0.15:
            return b"%d" % rng.choice((0, 1, -1, 7, 10_000, 123_456_789, rng.getrandbits(62), m.LONG_MAX))
        value = rng.choice(self.pool)
        if roll < 0.75 and len(value) > 8:
            # Told apart from every other value of this worker.
            self.count += 1
            return b"%08d" % self.count + value[8:]
        return value

    # -- commands --

    def fast(self, keys: list[bytes]) -> list[bytes]:
        rng = self.rng
        if rng.random() < 0.55:
            return [rng.choice(CASES[b"GET"]), rng.choice(keys)]
        return [rng.choice(CASES[b"SET"]), rng.choice(keys), self.value()]

    def _slow(self) -> list[Callable[[list[bytes]], list[bytes]]]:
        rng, value = self.rng, self.value

        def pick(keys: list[bytes]) -> bytes:
            return rng.choice(keys)

        def two(keys: list[bytes]) -> list[bytes]:
            return [rng.choice(keys), rng.choice(keys)]

        def number() -> bytes:
            return b"%d" % rng.choice((0, 1, -1, 5, 100, 4096, -3, rng.randrange(-6000, 6000)))

        def some(keys: list[bytes]) -> list[bytes]:
            return [rng.choice(keys) for _ in range(rng.randrange(1, 5))]

        def pairs(keys: list[bytes]) -> list[bytes]:
            return [arg for key in some(keys) for arg in (key, value())]

        def small() -> bytes:
            return value()[:40]

        far = b"%d" % FAR
        table: list[tuple[int, Callable[[list[bytes]], list[bytes]]]] = [
            (6, lambda k: [b"GETRANGE", pick(k), b"0", b"-1"]),
            (2, lambda k: [b"GETRANGE", pick(k), number(), number()]),
            (4, lambda k: [b"STRLEN", pick(k)]),
            (6, lambda k: [b"APPEND", pick(k), small()]),
            (5, lambda k: [b"GETSET", pick(k), value()]),
            (3, lambda k: [b"GETDEL", pick(k)]),
            (4, lambda k: [b"SETRANGE", pick(k), b"%d" % rng.randrange(0, 80), small()]),
            (2, lambda k: [b"SETBIT", pick(k), b"%d" % rng.randrange(0, 900), b"%d" % rng.randrange(2)]),
            (1, lambda k: [b"BITCOUNT", pick(k)]),
            (4, lambda k: [b"INCR", pick(k)]),
            (2, lambda k: [b"INCRBY", pick(k), number()]),
            (2, lambda k: [b"DECR", pick(k)]),
            (5, lambda k: [rng.choice((b"DEL", b"UNLINK")), *some(k)]),
            (3, lambda k: [b"EXISTS", *some(k)]),
            (1, lambda k: [b"TOUCH", *some(k)]),
            (3, lambda k: [b"SETNX", pick(k), value()]),
            (4, lambda k: [b"MSET", *pairs(k)]),
            (1, lambda k: [b"MSETNX", *pairs(k)]),
            (4, lambda k: [b"MGET", *some(k)]),
            (3, lambda k: [b"RENAME", *two(k)]),
            (1, lambda k: [b"RENAMENX", *two(k)]),
            (2, lambda k: [b"COPY", *two(k)]),
            (2, lambda k: [b"COPY", *two(k), b"REPLACE"]),
            (1, lambda k: [b"COPY", *two(k), b"DB", b"%d" % rng.randrange(2), b"REPLACE"]),
            (2, lambda k: [b"MOVE", pick(k), b"%d" % rng.randrange(2)]),
            (3, lambda k: [b"EXPIREAT", pick(k), far]),
            (1, lambda k: [b"EXPIREAT", pick(k), b"1"]),
            (3, lambda k: [b"PERSIST", pick(k)]),
            (2, lambda k: [b"EXPIRETIME", pick(k)]),
            (2, lambda k: [b"TYPE", pick(k)]),
            (3, lambda k: [b"OBJECT", b"ENCODING", pick(k)]),
            (1, lambda k: [b"LPUSH", pick(k), small()]),
            (1, lambda k: [b"LLEN", pick(k)]),
            (2, lambda k: [b"LPOP", pick(k)]),
            (2, lambda k: [b"SET", pick(k), value(), b"EXAT", far]),
            (2, lambda k: [b"SET", pick(k), value(), rng.choice((b"NX", b"XX", b"GET", b"KEEPTTL"))]),
            (1, lambda k: [b"GETEX", pick(k)]),
            (1, lambda k: [b"GETEX", pick(k), b"PERSIST"]),
            (1, lambda k: [b"GETEX", pick(k), b"EXAT", far]),
            (3, lambda k: [b"EVAL", m.SCRIPT_SET_GET, b"1", pick(k), small()]),
            (2, lambda k: [b"EVAL", m.SCRIPT_GET, b"1", pick(k)]),
            (2, lambda k: [b"EVAL", m.SCRIPT_APPEND, b"1", pick(k), small()]),
            (1, lambda k: [b"EVAL", m.SCRIPT_MOVE, b"2", *two(k)] if len(set(k)) > 1 else [b"PING"]),
            (1, lambda k: [b"PING"]),
            (1, lambda k: [b"ECHO", value()]),
            (1, lambda k: [b"SELECT", b"0"]),
        ]
        return [make for weight, make in table for _ in range(weight)]

    def any(self, keys: list[bytes], slow: float) -> list[bytes]:
        if self.rng.random() < slow:
            return self.rng.choice(self.slow)(keys)
        return self.fast(keys)

    def size(self) -> int:
        rng = self.rng
        roll = rng.random()
        if roll < 0.5:
            return 1
        if roll < 0.95:
            return rng.randrange(2, 25)
        return rng.randrange(25, 50)

    def batch(self, link: Link, keys: list[bytes]) -> list[list[bytes]]:
        """Commands for one exchange; ends with the connection's replies on and no transaction open."""
        rng = self.rng
        roll = rng.random()
        if roll < self.config.demote:
            link.demoted = True
            return self.demoting(keys)
        if roll < 0.45:
            return [self.fast(keys) for _ in range(self.size())]
        if roll < 0.55:
            return [self.any(keys, 1.0)]
        if roll < 0.90:
            slow = rng.choice((0.1, 0.3, 0.6))
            return [self.any(keys, slow) for _ in range(self.size())]
        return self.transaction(keys)

    def transaction(self, keys: list[bytes]) -> list[list[bytes]]:
        rng = self.rng
        out = [self.any(keys, 0.2) for _ in range(rng.randrange(2))]
        out.append([rng.choice((b"MULTI", b"multi"))])
        inside = [self.any(keys, 0.4) for _ in range(rng.randrange(0, 8))]
        # CLIENT is modelled outside transactions only; SELECT 0 and unknown commands are welcome inside.
        if rng.random() < 0.1:
            inside.append([b"MULTI"])
        out += inside
        out.append([b"DISCARD" if rng.random() < 0.2 else b"EXEC"])
        out += [self.any(keys, 0.2) for _ in range(rng.randrange(3))]
        return out

    def demoting(self, keys: list[bytes]) -> list[list[bytes]]:
        rng = self.rng
        some = [self.any(keys, 0.3) for _ in range(rng.randrange(1, 5))]
        more = [self.any(keys, 0.3) for _ in range(rng.randrange(0, 4))]
        kind = rng.randrange(8)
        if kind == 0:
            return [[b"SELECT", b"1"], *some, [b"SELECT", b"0"], *more]
        if kind == 1:
            return [[b"CLIENT", b"REPLY", b"OFF"], *some, [b"CLIENT", b"REPLY", b"ON"], *more]
        if kind == 2:
            return [*more, [b"CLIENT", b"REPLY", b"SKIP"], self.any(keys, 0.3), *some]
        if kind == 3:
            channel = b"channel of " + keys[0][:8]
            return [*more, [b"SUBSCRIBE", channel], [b"PING"], [b"UNSUBSCRIBE", channel], *some]
        if kind == 4:
            return [[b"SELECT", b"1"], *some, [b"RESET"], *more]
        if kind == 5:
            return [*some, [b"NOSUCH", b"x", b"y"], *more]
        if kind == 6:
            return [[b"MULTI"], *some, [b"NOSUCH"], [b"EXEC"], *more]
        return [[b"MULTI"], *more, [b"RESET"], *some]

    # -- exchanges --

    def step(self) -> int:
        rng = self.rng
        if self.config.whole_server and rng.random() < 0.04:
            return self.whole_server_step()
        roll = rng.random()
        if roll < 0.01:
            return self.watch_step()
        if roll < 0.02:
            return self.inline_step()
        if roll < 0.0203:
            return self.monitor_step()
        link = rng.choice(self.links)
        if roll < 0.03 or (link.demoted and rng.random() < 0.5):
            link.open()
            return 1
        together = 1 if roll < 0.6 else rng.randrange(2, min(4, len(self.links)) + 1)
        if together == 1:
            keys = rng.sample(self.keys, rng.randrange(1, 6))
            return self.exchange(link, self.batch(link, keys))
        links = rng.sample(self.links, together)
        keys = rng.sample(self.keys, len(self.keys))
        share = len(keys) // together
        plans, ops = [], 0
        for number, each in enumerate(links):
            mine = keys[number * share : (number + 1) * share][: rng.randrange(1, 6)]
            commands = self.batch(each, mine)
            ops += len(commands)
            plans.append(deque(self.plan(each, commands)))
        while plans:
            plan = rng.choice(plans)
            plan.popleft()()
            if not plan:
                plans.remove(plan)
        return ops

    def exchange(self, link: Link, commands: list[list[bytes]]) -> int:
        for action in self.plan(link, commands):
            action()
        return len(commands)

    def plan(self, link: Link, commands: list[list[bytes]]) -> list[Callable[[], None]]:
        """How the commands are sent and the replies read: the model runs here, the actions come later."""
        rng = self.rng
        run, peer = self.model.run, link.peer
        requests = [encode(args) for args in commands]
        replies = [run(peer, args) for args in commands]
        style = rng.random()
        if style < 0.55 or len(commands) > 24:
            shown = (
                show_commands(commands)
                if len(commands) < 6
                else f"{len(commands)}: " + show_commands(commands)
            )
            return [
                lambda: link.send(b"".join(requests), shown),
                lambda: link.expect(b"".join(replies)),
            ]
        if style < 0.75:
            return [
                action
                for args, request, reply in zip(commands, requests, replies, strict=True)
                for action in (
                    lambda request=request, args=args: link.send(request, show_command(args)),
                    lambda reply=reply: link.expect(reply),
                )
            ]
        if style < 0.85:
            sends = [
                lambda request=request, args=args: link.send(request, show_command(args))
                for args, request in zip(commands, requests, strict=True)
            ]
            return [*sends, lambda: link.expect(b"".join(replies))]
        return self.dribble(link, commands, requests, replies, late=style > 0.93)

    def dribble(
        self, link: Link, commands: list[list[bytes]], requests: list[bytes], replies: list[bytes], late: bool
    ) -> list[Callable[[], None]]:
        """Several send() calls, cut anywhere; with ``late`` replies are read in pieces between them."""
        rng = self.rng
        # A cut inside a command's name demotes, so that most of these are: renewed soon.
        link.demoted = True
        data, answer = b"".join(requests), b"".join(replies)
        ends = list(itertools.accumulate(map(len, requests)))
        due = list(itertools.accumulate(map(len, replies)))
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(1, 8)))
        if late:
            # Cuts between commands too: a fast one sent while part of a slow one's reply is unread.
            cuts = sorted(cuts + rng.sample(ends, min(len(ends), 4)))
        actions: list[Callable[[], None]] = []
        sent = read = 0
        shown = show_commands(commands)
        for cut in [*cuts, len(data)]:
            if cut > sent:
                piece = data[sent:cut]
                # Not with replies awaited in between: MSG_MORE may hold a request back for 200 ms.
                more = not late and cut < len(data) and rng.random() < 0.2
                note = f"bytes {sent}..{cut}{' (more)' if more else ''} of: {shown}"
                actions.append(lambda piece=piece, note=note, more=more: link.send(piece, note, more))
                sent = cut
            if late:
                whole = sum(end <= sent for end in ends)
                limit = due[whole - 1] if whole else 0
                upto = rng.choice((read, limit, rng.randint(read, max(read, limit))))
                if upto > read:
                    part = answer[read:upto]
                    actions.append(lambda part=part: link.expect(part))
                    read = upto
        actions.append(lambda: link.expect(answer[read:]))
        return actions

    def watch_step(self) -> int:
        """WATCH, perhaps a change from here or elsewhere, MULTI … EXEC."""
        rng = self.rng
        link, other = rng.choice(self.links), rng.choice(self.links)
        keys = rng.sample(self.keys, 3)
        ops = self.exchange(
            link, [[b"WATCH", *keys[:2]], *[self.fast(keys) for _ in range(rng.randrange(2))]]
        )
        if rng.random() < 0.7:
            ops += self.exchange(other if rng.random() < 0.7 else link, [self.any(keys, 0.5)])
        if rng.random() < 0.2:
            ops += self.exchange(link, [[b"UNWATCH"]])
        inside = [self.any(keys, 0.3) for _ in range(rng.randrange(1, 4))]
        return ops + self.exchange(
            link, [[b"MULTI"], *inside, [b"EXEC" if rng.random() < 0.9 else b"DISCARD"]]
        )

    def inline_step(self) -> int:
        rng = self.rng
        if not self.inline:
            return 0
        link = rng.choice(self.links)
        key = rng.choice(self.inline)
        value = b"%d" % rng.getrandbits(40)
        commands = rng.choice(
            (
                [[b"GET", key]],
                [[b"SET", key, value], [b"GET", key]],
                [[b"APPEND", key, value], [b"STRLEN", key]],
            )
        )
        link.demoted = True
        replies = b"".join(self.model.run(link.peer, args) for args in commands)
        link.send(
            b"".join(b" ".join(args) + b"\r\n" for args in commands), f"inline: {show_commands(commands)}"
        )
        link.expect(replies)
        return len(commands)

    def monitor_step(self) -> int:
        """A MONITOR comes and goes: while it is there nothing is served, on any connection."""
        link = self.rng.choice(self.links)
        link.send(encode([b"MONITOR"]), "MONITOR")
        link.expect(m.OK)
        link.open()
        return 1

    def whole_server_step(self) -> int:
        rng = self.rng
        link = rng.choice(self.links)
        roll = rng.random()
        command: list[bytes]
        if roll < 0.4:
            command = [b"FLUSHALL"]
        elif roll < 0.6:
            command = [b"FLUSHDB"]
        elif roll < 0.97:
            command = [b"SWAPDB", b"0", b"1"]
        else:
            command = [b"DEBUG", b"RELOAD"]
            link.demoted = True
        before = [self.fast(self.keys) for _ in range(rng.randrange(0, 8))]
        after = [self.fast(self.keys) for _ in range(rng.randrange(0, 8))]
        ops = self.exchange(rng.choice(self.links), before) if before else 0
        if rng.random() < 0.3 and command[0] != b"DEBUG":
            return ops + self.exchange(link, [*before, [b"MULTI"], command, [b"EXEC"], *after])
        ops += self.exchange(link, [command])
        return ops + (self.exchange(rng.choice(self.links), after) if after else 0)

    def final(self) -> None:
        """Every key, by the slow way and by GET, from one connection."""
        link = self.links[0]
        link.open()
        for key in self.keys:
            self.exchange(link, [[b"TYPE", key], [b"GETRANGE", key, b"0", b"-1"], [b"GET", key]])


_PAD = bytes(range(48, 123)) * 80

# Sets a register to what it got, some time later; the loop gives everyone else time to slip in.
SLOW_COPY = (
    b'local v=redis.call("GET",KEYS[1]) local n=0 for i=1,tonumber(ARGV[1]) do n=n+i end '
    b'if v then redis.call("SET",KEYS[1],v) end return n'
)


class Registers:
    """Versioned values with one writer each, readers everywhere."""

    def __init__(
        self,
        config: Config,
        rng: random.Random,
        links: list[Link],
        shared: Shared,
        worker: int,
        prefix: bytes,
    ) -> None:
        self.config, self.rng, self.shared = config, rng, shared
        self.prefix, self.worker = prefix, worker
        # Those that wait in BLPOP are demoted: they do nothing else.
        self.blockers = links[: max(1, len(links) // 6)] if config.blocked else []
        self.links = links[len(self.blockers) :]
        self.mine = [pair for pair in range(config.pairs) if pair % config.workers == worker]
        self.version = dict.fromkeys(self.mine, 0)
        self.last: dict[int, int] = {}
        sizes = [size for size in config.sizes if size < 5000] + [20, 30, 40, 50, 64, 64, 64, 80]
        self.sizes = sizes
        self.queue = prefix + b"queue%d" % worker
        forget(self.links[0], [self.queue])
        for pair in self.mine:
            self.write(self.links[0], [pair], "pipeline")

    def key(self, register: int) -> bytes:
        pair, half = divmod(register, 2)
        stem = self.prefix + b"%d%c" % (pair, b"ab"[half])
        return stem.ljust((16, 16, 24, 40, 130, 250)[pair % 6], b".")

    def value(self, register: int, version: int) -> bytes:
        head = b"r%d.%d|" % (register, version)
        size = self.sizes[(version * 7 + register) % len(self.sizes)]
        start = version % 75
        return head + _PAD[start : start + max(0, size - len(head))]

    def read_version(self, link: Link, register: int, value: Any) -> int:
        """The version in a value that was read; a violation if it is none, or not whole."""
        if isinstance(value, bytes) and not isinstance(value, ErrorReply):
            head, bar, _ = value.partition(b"|")
            name, dot, version = head.partition(b".")
            if bar and dot and name == b"r%d" % register and version.isdigit():
                number = int(version)
                if value == self.value(register, number):
                    return number
        raise link.violation(f"register {register} ({show(self.key(register))}) reads {show(value)}")

    # -- writing --

    def write(self, link: Link, pairs: list[int], how: str) -> None:
        self.finish_write(link, *self.start_write(link, pairs, how))

    def start_write(self, link: Link, pairs: list[int], how: str) -> tuple[list[int], str, int]:
        words, issued = self.shared.words, self.shared.issued
        commands: list[list[bytes]] = []
        for pair in pairs:
            self.version[pair] = version = self.version[pair] + 1
            a, b = 2 * pair, 2 * pair + 1
            words[issued + a] = words[issued + b] = version
            va, vb = self.value(a, version), self.value(b, version)
            ka, kb = self.key(a), self.key(b)
            if how == "getset":
                commands += [[b"GETSET", ka, va], [b"GETSET", kb, vb]]
            elif how == "set get":
                commands += [[b"SET", ka, va, b"GET"], [b"SET", kb, vb, b"GET"]]
            elif how == "multi":
                commands += [[b"MULTI"], [b"SET", ka, va], [b"SET", kb, vb], [b"EXEC"]]
            elif how == "mset":
                commands += [[b"MSET", ka, va, kb, vb]]
            elif how == "eval":
                commands += [
                    [b"EVAL", m.SCRIPT_SET_GET, b"1", ka, va],
                    [b"EVAL", m.SCRIPT_SET_GET, b"1", kb, vb],
                ]
            elif how == "mixed":
                commands += [[b"GETSET", ka, va], [b"SET", kb, vb]]
            else:
                commands += [[b"SET", ka, va], [b"SET", kb, vb]]
        data = b"".join(map(encode, commands))
        note = f"{how} {', '.join(f'pair {pair} v{self.version[pair]}' for pair in pairs)}"
        if how == "one by one":
            for number, args in enumerate(commands):
                link.send(encode(args), f"{note} ({number})")
                if number < len(commands) - 1:
                    self.answer_write(link, link.reply(), args, pairs)
            return pairs, how, 1
        if how == "two sends":
            first = len(encode(commands[0]))
            link.send(data[:first], note)
            link.send(data[first:], "the rest")
        else:
            link.send(data, note)
        return pairs, how, len(commands)

    def answer_write(self, link: Link, reply: Any, args: list[bytes], pairs: list[int]) -> None:
        if reply != b"OK":
            raise link.violation(f"a write of {show(args[1])} answered {show(reply)}")

    def finish_write(self, link: Link, pairs: list[int], how: str, replies: int) -> None:
        words, acked = self.shared.words, self.shared.acked
        got = [link.reply() for _ in range(replies)]
        if how in ("getset", "set get", "mixed", "eval"):
            for number, pair in enumerate(pairs):
                version = self.version[pair]
                for half in range(2):
                    register, reply = 2 * pair + half, got[2 * number + half]
                    if how == "mixed" and half:
                        if reply != b"OK":
                            raise link.violation(f"SET answered {show(reply)}")
                    elif how == "eval":
                        if reply != self.value(register, version):
                            raise link.violation(f"EVAL set version {version} and got {show(reply)}")
                    elif version > 1 or reply is not None:
                        old = self.read_version(link, register, reply)
                        if old != version - 1:
                            raise link.violation(
                                f"register {register}: GETSET of v{version} found v{old}, not v{version - 1}"
                            )
        elif how == "multi":
            for at in range(0, len(got), 4):
                if got[at : at + 4] != [b"OK", b"QUEUED", b"QUEUED", [b"OK", b"OK"]]:
                    raise link.violation(f"MULTI SET SET EXEC answered {show(got[at : at + 4])}")
        elif any(reply != b"OK" for reply in got):
            raise link.violation(f"{how} answered {show(got)}")
        for pair in pairs:
            words[acked + 2 * pair] = words[acked + 2 * pair + 1] = self.version[pair]

    # -- reading --

    def start_read(self, link: Link) -> Callable[[], int]:
        """Sends a read and gives the function that takes and checks its replies."""
        rng, words = self.rng, self.shared.words
        how = rng.choices(
            ("single", "pair", "slow pair", "mixed pair", "mget", "multi", "burst", "eval"),
            (30, 25, 8, 8, 8, 4, 15, 2),
        )[0]
        if how == "single":
            registers = [rng.randrange(2 * self.config.pairs)]
        elif how == "burst":
            registers = [rng.randrange(2 * self.config.pairs) for _ in range(rng.randrange(2, 17))]
        else:
            pair = rng.randrange(self.config.pairs)
            registers = [2 * pair + 1, 2 * pair]
        commands: list[list[bytes]]
        keys = [self.key(register) for register in registers]
        if how == "slow pair":
            commands = [[b"GETRANGE", key, b"0", b"-1"] for key in keys]
        elif how == "mixed pair":
            commands = [[b"GET", keys[0]], [b"GETRANGE", keys[1], b"0", b"-1"]]
            if rng.random() < 0.5:
                commands = [[b"GETRANGE", keys[0], b"0", b"-1"], [b"GET", keys[1]]]
        elif how == "mget":
            commands = [[b"MGET", *keys]]
        elif how == "multi":
            commands = [[b"MULTI"], *[[b"GET", key] for key in keys], [b"EXEC"]]
        elif how == "eval":
            commands = [[b"EVAL", m.SCRIPT_GET, b"1", key] for key in keys]
        else:
            commands = [[b"GET", key] for key in keys]
        floors = [
            max(
                words[self.shared.acked + register],
                words[self.shared.seen + register],
                self.last.get(register, 0),
            )
            for register in registers
        ]
        note = f"{how} read of {registers}, at least v{floors}"
        if how == "mixed pair" and rng.random() < 0.5:
            link.send(encode(commands[0]), note)
            link.send(encode(commands[1]), "its second half")
        else:
            link.send(b"".join(map(encode, commands)), note)
        return lambda: self.finish_read(link, how, registers, floors, len(commands))

    def finish_read(self, link: Link, how: str, registers: list[int], floors: list[int], replies: int) -> int:
        words = self.shared.words
        got = [link.reply() for _ in range(replies)]
        values = got[-1] if how in ("mget", "multi") else got
        if not isinstance(values, list) or len(values) != len(registers):
            raise link.violation(f"{how} read of {registers} answered {show(got)}")
        versions = []
        for register, floor, value in zip(registers, floors, values, strict=True):
            version = self.read_version(link, register, value)
            versions.append(version)
            if version < floor:
                raise link.violation(
                    f"register {register} went back: read v{version} after v{floor} was known"
                )
            if version > words[self.shared.issued + register]:
                raise link.violation(f"register {register}: v{version} was never sent")
        for register, version in zip(registers, versions, strict=True):
            if version > self.last.get(register, 0):
                self.last[register] = version
            if version > words[self.shared.seen + register]:
                words[self.shared.seen + register] = version
        if how not in ("single", "burst"):
            late, early = versions
            if early < late:
                raise link.violation(f"read B at v{late}, then A, written before it, at v{early}")
            if how in ("mget", "multi") and early > late + 1:
                raise link.violation(f"one snapshot of A at v{early} and B at v{late}")
        return replies

    # -- rewriting without a new version --

    def mutation(self, register: int) -> list[list[bytes]]:
        rng, key = self.rng, self.key(register)
        kind = rng.randrange(8)
        if kind <= 2:
            return [[b"APPEND", key, b""]]
        if kind == 3:
            return [[b"SETRANGE", key, b"0", b"r"]]
        if kind == 4:
            return [[b"EVAL", SLOW_COPY, b"1", key, b"%d" % rng.choice((0, 0, 100, 2000))]]
        if kind == 5:
            return [[b"EXPIREAT", key, b"%d" % FAR], [b"PERSIST", key]]
        if kind == 6:
            return [[b"MULTI"], [b"APPEND", key, b""], [b"SETRANGE", key, b"0", b"r"], [b"EXEC"]]
        return [[b"APPEND", key, b""], [b"OBJECT", b"ENCODING", key], [b"TOUCH", key]]

    def start_mutation(self, link: Link) -> Callable[[], int]:
        rng = self.rng
        registers = [rng.randrange(2 * self.config.pairs) for _ in range(rng.choice((1, 1, 2, 8)))]
        commands = [args for register in registers for args in self.mutation(register)]
        link.send(b"".join(map(encode, commands)), f"rewrites {registers}: {show_commands(commands)}")

        def finish() -> int:
            for args in commands:
                reply = link.reply()
                if isinstance(reply, ErrorReply) or (isinstance(reply, list) and len(reply) != 2):
                    raise link.violation(f"{show_command(args)} answered {show(reply)}")
            return len(commands)

        return finish

    def start_write_step(self, link: Link, pairs: list[int]) -> Callable[[], int]:
        rng = self.rng
        if len(pairs) > 1:
            how = rng.choices(("pipeline", "mset", "mixed"), (8, 1, 1))[0]
        else:
            how = rng.choices(
                (
                    "pipeline",
                    "one by one",
                    "two sends",
                    "getset",
                    "set get",
                    "multi",
                    "mset",
                    "eval",
                    "mixed",
                ),
                (30, 30, 8, 6, 3, 5, 5, 3, 6),
            )[0]
        started = self.start_write(link, pairs, how)

        def finish() -> int:
            self.finish_write(link, *started)
            return 2 * len(pairs)

        return finish

    # -- steps --

    def step(self) -> int:
        rng, config = self.rng, self.config
        if self.blockers and rng.random() < config.blocked:
            return self.blocked_step()
        links = rng.sample(self.links, min(len(self.links), rng.randrange(1, 6)))
        if rng.random() < 0.003:
            links[0].open()
            return 1
        free = rng.sample(self.mine, len(self.mine))
        finish: list[Callable[[], int]] = []
        order: list[tuple[Link, str]] = []
        for link in links:
            roll = rng.random()
            order.append((link, "mutate" if roll < config.mutate else "write" if roll < 0.5 else "read"))
        if rng.random() < 0.7:
            # Slow ones first: they wake Redis, and the fast ones meet the closing gate.
            order.sort(key=lambda item: item[1] != "mutate")
        for link, what in order:
            if what == "mutate":
                finish.append(self.start_mutation(link))
            elif what == "write" and free:
                count = min(len(free), rng.randrange(2, 9)) if rng.random() < config.burst else 1
                finish.append(self.start_write_step(link, [free.pop() for _ in range(count)]))
            else:
                finish.append(self.start_read(link))
        return sum(end() for end in finish)

    def blocked_step(self) -> int:
        """Commands that Redis executes in its beforeSleep, for a client unblocked by another: meanwhile,
        writes."""
        rng = self.rng
        blocker, pusher, writer, reader = self.blockers[0], *rng.sample(self.links, 3)
        queue = self.queue
        pair = rng.choice(self.mine)
        targets = [2 * pair, 2 * pair + 1]
        behind: list[list[bytes]] = [
            [
                b"EVAL",
                SLOW_COPY,
                b"1",
                self.key(rng.choice(targets)),
                b"%d" % rng.choice((1000, 30_000, 100_000)),
            ]
            for _ in range(rng.randrange(1, 4))
        ]
        behind += [args for register in targets for args in self.mutation(register) if args[0] != b"MULTI"][
            :3
        ]
        behind = [args for args in behind if args[0] not in (b"EXEC", b"EXPIREAT", b"PERSIST")]
        data = b"".join(map(encode, [[b"BLPOP", queue, b"0"], *behind]))
        blocker.send(data, f"BLPOP, then {show_commands(behind)}")
        # Its own connection is answered in order: once this is, Redis has very likely read the BLPOP too.
        reader.send(encode([b"PING"]), "PING")
        if reader.reply() != b"PONG":
            raise reader.violation("PING without PONG")
        pusher.send(encode([b"LPUSH", queue, b"x"]), "LPUSH")
        ops = 3 + len(behind)
        for number in range(rng.choice((4, 12, 24))):
            how = "one by one" if number % 2 else "pipeline"
            self.write(writer, [pair], how)
            ops += 2
            if rng.random() < 0.3:
                ops += self.start_read(reader)()
        reply = pusher.reply()
        if reply != 1:
            raise pusher.violation(f"LPUSH answered {show(reply)}")
        replies = [blocker.reply() for _ in range(1 + len(behind))]
        if replies[0] != [queue, b"x"] or any(isinstance(reply, ErrorReply) for reply in replies):
            raise blocker.violation(f"BLPOP and what waited behind it answered {show(replies)}")
        return ops + self.verify([pair], reader)

    def verify(self, pairs: list[int], link: Link) -> int:
        """Registers of ours that nobody writes now must be exactly at their last version, slowly and by
        GET."""
        registers = [2 * pair + half for pair in pairs for half in range(2)]
        commands = [
            args
            for register in registers
            for args in ([b"GET", self.key(register)], [b"GETRANGE", self.key(register), b"0", b"-1"])
        ]
        for args in commands:
            link.send(encode(args), show_command(args))
            register = registers[commands.index(args) // 2]
            version = self.read_version(link, register, link.reply())
            if version != self.version[register // 2]:
                raise link.violation(
                    f"{args[0].decode()} of register {register}: v{version}, "
                    f"but v{self.version[register // 2]} was acknowledged and is the last"
                )
        return len(commands)

    def final(self) -> None:
        link = self.links[0]
        link.open()
        self.verify(self.mine, link)


# -- races --

State = bytes | None
Step = Callable[[State], "tuple[State, Any]"]


def race_command(rng: random.Random, key: bytes, fresh: bytes) -> tuple[list[bytes], Step]:
    """A command on a key and what it does: state -> (state, reply)."""
    kind = rng.choices(range(11), (40, 12, 14, 8, 8, 5, 4, 4, 4, 4, 6))[0]
    if kind == 0:
        return [b"SET", key, fresh], lambda s: (fresh, b"OK")
    if kind == 1:
        return [b"GET", key], lambda s: (s, s)
    if kind == 2:
        piece = fresh[:3]
        return [b"APPEND", key, piece], lambda s: ((s or b"") + piece, len(s or b"") + len(piece))
    if kind == 3:
        return [b"GETSET", key, fresh], lambda s: (fresh, s)
    if kind == 4:
        return [b"EVAL", m.SCRIPT_SET_GET, b"1", key, fresh], lambda s: (fresh, fresh)
    if kind == 5:
        return [b"DEL", key], lambda s: (None, 0 if s is None else 1)
    if kind == 6:
        return [b"GETDEL", key], lambda s: (None, s)
    if kind == 7:
        return [b"SETNX", key, fresh], lambda s: (fresh, 1) if s is None else (s, 0)
    if kind == 8:
        return [b"STRLEN", key], lambda s: (s, len(s or b""))
    if kind == 9:
        return [b"SET", key, fresh, b"XX"], lambda s: (None, None) if s is None else (fresh, b"OK")
    piece = fresh[:2]

    def setrange(s: State) -> tuple[State, Any]:
        grown = piece + (s or b"")[len(piece) :]
        return grown, len(grown)

    return [b"SETRANGE", key, b"0", piece], setrange


def explanations(start: State, steps: list[Step], replies: list[Any]) -> set[State]:
    """The final states of all orders of the steps that give exactly these replies."""
    found: set[State] = set()

    def go(state: State, left: tuple[int, ...]) -> None:
        if not left:
            found.add(state)
        for at in left:
            after, reply = steps[at](state)
            if reply == replies[at] and type(reply) in (type(replies[at]), bytes):
                go(after, tuple(each for each in left if each != at))

    go(start, tuple(range(len(steps))))
    return found


class Races:
    """Commands that meet on a key: any order may explain them, but one must."""

    def __init__(self, config: Config, rng: random.Random, links: list[Link], tag: bytes) -> None:
        self.config, self.rng, self.links = config, rng, links
        self.keys = [b"%brace%02d" % (tag, number) + b"." * (4 * number) for number in range(12)]
        forget(links[0], self.keys)
        self.state: dict[bytes, State] = dict.fromkeys(self.keys)
        self.count = 0

    def fresh(self) -> bytes:
        self.count += 1
        return b"%d:" % self.count + _PAD[: self.rng.choice((4, 30, 60, 500, 4000))]

    def step(self) -> int:
        rng = self.rng
        links = rng.sample(self.links, min(len(self.links), rng.randrange(2, 5)))
        keys = rng.sample(self.keys, rng.choice((1, 2, 6)))
        work: dict[bytes, list[tuple[Link, list[bytes], Step]]] = {key: [] for key in keys}
        queues: list[tuple[Link, list[tuple[bytes, list[bytes]]]]] = []
        for number, link in enumerate(links):
            queue = []
            # One of them slow, the others mostly SETs in one message: they run while Redis wakes up.
            fast = number > 0 and rng.random() < 0.7
            for key in rng.sample(keys, len(keys)):
                if fast:
                    value = self.fresh()
                    command: list[bytes] = [b"SET", key, value]
                    step: Step = lambda s, value=value: (value, b"OK")  # noqa: E731
                else:
                    command, step = race_command(rng, key, self.fresh())
                work[key].append((link, command, step))
                queue.append((key, command))
            queues.append((link, queue))
        for link, queue in queues:
            link.send(b"".join(encode(args) for _, args in queue), show_commands([args for _, args in queue]))
        answers: dict[tuple[int, bytes], Any] = {}
        for link, queue in queues:
            for key, _ in queue:
                answers[id(link), key] = link.reply()
        ops = sum(map(len, work.values()))
        reader = rng.choice(self.links)
        for key in keys:
            replies = [answers[id(link), key] for link, _, _ in work[key]]
            possible = explanations(self.state[key], [step for _, _, step in work[key]], replies)
            finals = []
            for args in ([b"GET", key], [b"GETRANGE", key, b"0", b"-1"], [b"GET", key]):
                reader.send(encode(args), show_command(args))
                finals.append(reader.reply())
            ops += 3
            told = "; ".join(
                f"{show_command(args)} -> {show(reply)}"
                for (_, args, _), reply in zip(work[key], replies, strict=True)
            )
            if not possible:
                raise reader.violation(
                    f"no order explains {show(key)}, {show(self.state[key])} before: {told}"
                )
            if finals[0] not in possible:
                raise reader.violation(
                    f"{show(key)} ends as {show(finals[0])}; {show(self.state[key])} before; "
                    f"possible: {show(list(possible))}; {told}"
                )
            if (finals[1] or None) != (finals[0] or None) or finals[2] != finals[0]:
                raise reader.violation(f"{show(key)} at rest reads {show(finals)} by GET, GETRANGE, GET")
            self.state[key] = finals[0]
        return ops

    def final(self) -> None:
        """Nothing is left to look at: each step ends with reads."""


# -- running --


def _worker(
    config: Config, shared: Shared, index: int, result: multiprocessing.connection.Connection
) -> None:
    rng = random.Random(f"{config.seed}/{index}")
    counts = {name: 0 for name, _ in config.weights}
    violation = ""
    links: list[Link] = []
    try:
        share = config.connections // config.workers + (index < config.connections % config.workers)
        total = sum(weight for _, weight in config.weights)
        kinds: list[tuple[str, Any, float]] = []
        left = share
        for number, (name, weight) in enumerate(config.weights):
            last = number == len(config.weights) - 1
            count = left if last else min(left, max(6, round(share * weight / total)))
            left -= count
            mine = [Link(config, rng, f"worker {index}, {name} link {each}") for each in range(max(count, 5))]
            links += mine
            tag = b"%c%d" % (65 + index, config.seed % 1000)
            made: Any
            if name == "own":
                made = Own(config, rng, mine, tag)
            elif name == "registers":
                made = Registers(config, rng, mine, shared, index, b"reg%d:" % (config.seed % 1000))
            else:
                made = Races(config, rng, mine, tag)
            kinds.append((name, made, weight))
        shared.words[shared.done + 2 * index + 1] = len(links)
        _meet(shared, config)
        names = [name for name, _, _ in kinds]
        roles = {name: made for name, made, _ in kinds}
        weights = list(itertools.accumulate(weight for _, _, weight in kinds))
        deadline = time.monotonic() + config.seconds
        words, done = shared.words, shared.done + 2 * index
        others = range(shared.done, shared.done + 2 * config.workers, 2)
        while True:
            for name in rng.choices(names, cum_weights=weights, k=16):
                counts[name] += roles[name].step()
            words[done] = sum(counts.values())
            if words[0] or sum(words[each] for each in others) >= config.ops or time.monotonic() > deadline:
                break
        for made in roles.values():
            made.final()
    except Violation as error:
        violation = f"seed {config.seed}, worker {index}, after {sum(counts.values())} operations: {error}"
    except OSError as error:
        violation = f"seed {config.seed}, worker {index}: {error!r}"
    except Exception:
        violation = f"worker {index}: the checker itself failed:\n{traceback.format_exc()}"
    if violation and not config.keep_going:
        shared.stop_all()
    shared.words[shared.done + 2 * index] = sum(counts.values())
    result.send((counts, len(links), violation))
    result.close()


def _meet(shared: Shared, config: Config) -> None:
    """Waits until every worker has its connections and has written its registers once."""
    deadline = time.monotonic() + 30
    ready = range(shared.done + 1, shared.done + 2 * config.workers, 2)
    while not all(shared.words[each] for each in ready):
        if shared.stop or time.monotonic() > deadline:
            raise Violation("the other workers did not come up")
        time.sleep(0.001)


def run(config: Config, until: Callable[[], bool] = lambda: False) -> Report:
    """Runs the checker against a server and says what it found. Its processes have ended when it returns.

    It ends early, without that being a violation, when ``until()`` is true (asked a few times a second).
    """
    if config.whole_server and config.workers != 1:
        raise ValueError("whole_server needs workers=1")
    if 2 * config.pairs > MAX_REGISTERS:
        raise ValueError(f"at most {MAX_REGISTERS // 2} register pairs")
    if config.pairs < config.workers:
        raise ValueError("each worker needs a register pair")
    context = multiprocessing.get_context("fork")
    shared = Shared(config.workers)
    start = time.monotonic()
    ends, processes = [], []
    for index in range(config.workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(config, shared, index, theirs), daemon=True)
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    by_kind: dict[str, int] = {}
    violations, connections = [], 0
    limit = start + config.seconds + 60
    try:
        for index, end in enumerate(ends):
            try:
                while not end.poll(0.05) and time.monotonic() < limit:
                    if until():
                        shared.stop_all()
                if not end.poll(0):
                    violations.append(f"worker {index} hangs")
                    continue
                counts, links, violation = end.recv()
            except EOFError:
                violations.append(f"worker {index} ended without a word")
                continue
            connections += links
            for name, count in counts.items():
                by_kind[name] = by_kind.get(name, 0) + count
            if violation:
                violations.append(violation)
    finally:
        shared.stop_all()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return Report(sum(by_kind.values()), time.monotonic() - start, connections, by_kind, violations)


# -- profiles: what finds which mistake --

PROFILES: dict[str, dict[str, Any]] = {
    "mixed": {},
    # A reply that overtakes another, a command that misses a SET, a GET that misses a command: exact
    # replies show it.
    "own": {"weights": (("own", 1.0),)},
    "registers": {"weights": (("registers", 1.0),)},
    # More, and larger, than a small table holds.
    "crowded": {
        "weights": (("own", 0.7), ("registers", 0.3)),
        "keys": 1500,
        "pairs": 300,
        "sizes": (64, 1000, 2000, 3000, 4000, 4096),
    },
    "whole_server": {
        "weights": (("own", 1.0),),
        "workers": 1,
        "whole_server": True,
    },
    # The kernel still works on a SET when Redis begins to execute: long messages of SETs, while others
    # rewrite.
    "tug": {
        "weights": (("registers", 0.7), ("races", 0.3)),
        "mutate": 0.35,
        "burst": 0.8,
        "blocked": 0.0,
        "sizes": (4000, 4095, 4096, 1000, 64),
    },
    # Commands of a client that another one unblocked, executed in beforeSleep.
    "blocked": {
        "weights": (("registers", 1.0),),
        "blocked": 0.5,
        "mutate": 0.1,
    },
}


def configure(profile: str, **settings: Any) -> Config:
    """A Config by profile name; ``settings`` win over the profile's."""
    return replace(Config(port=0), **{**PROFILES[profile], **settings})


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a redis-server's answers against a model.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ops", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--connections", type=int, default=56)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", choices=PROFILES, default="mixed")
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    report = run(configure(options.pop("profile"), **options))
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
