"""Load for the linearizability checker: many connections from several processes on few keys, every request
timed, every history checked by tests/redis/linear.py.

Work comes in rounds. In one, all processes work on the same *hot* groups of keys (from one key to all two
hundred); then they meet, and each reads its share of the groups at rest: by GET, and by a PIN. Rounds come in
batches, after each of which the histories are exchanged and checked by the processes that made them.

What connections do, by their role: **fast** ones everything that leaves a connection to be served: GET and
SET (alone, in pipelines, in flight without waiting), mixed with commands that Redis must execute; **block**
ones wait in BLPOP with commands behind it, while others hammer their keys; **far** ones are in database 1. Of
some the connection breaks while requests are under way. Subscribers have connections of their own.

``python -m tests.redis.linear_load --port 6379 --ops 1000000`` runs it by hand.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import marshal
import multiprocessing
import multiprocessing.connection
import random
import select
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kflex_repro.redis.resp import Decoder, ErrorReply, encode_command
from tests.redis import linear
from tests.redis.linear import LOST, MS, Op

GROUPS = 50
KEYS = 4
"""String keys of a group; each has a queue besides. 50 groups of 4 are the 200 keys."""
HALF = KEYS + 1
"""Slots of a group in one database: its keys, then its queue."""
EVERYWHERE = -1
"""The group of what happens to all of them."""
CHANNEL = b"linear"
SLACK = MS // 2
"""What two clocks may differ by, ns: Redis reads the wall clock. Its drift in a batch comes on top."""
NAME_SIZES = (0, 16, 16, 24, 64, 130, 250)
VALUE_SIZES = (0,) * 6 + (8, 20, 40, 64, 64, 100, 300, 1000, 4000)
PADDING = bytes(range(48, 123)) * 60

TOUCH = (
    b'local v=redis.call("GET",KEYS[1]) local n=0 for i=1,tonumber(ARGV[1]) do n=n+i end '
    b'if v then redis.call("SET",KEYS[1],v) end return v'
)
EXCHANGE = (
    b'local a=redis.call("GET",KEYS[1]) local b=redis.call("GET",KEYS[2]) '
    b'if a then redis.call("SET",KEYS[2],a) else redis.call("DEL",KEYS[2]) end '
    b'if b then redis.call("SET",KEYS[1],b) else redis.call("DEL",KEYS[1]) end return {a,b}'
)


@dataclass(frozen=True)
class Config:
    """What to do: ``ops`` operations, or as many as fit into ``seconds`` (never less than one batch)."""

    port: int
    ops: int = 100_000
    seconds: float = 600.0
    workers: int = 4
    links: int = 14
    """Connections of each worker, beside one to control and perhaps one that subscribes."""
    subscribers: int = 2
    batch: int = 20_000
    seed: int = 1
    reply_timeout: float = 10.0
    blocked: float = 0.02
    """Share of actions that are a BLPOP with commands behind it."""
    breaks: float = 0.002
    """Share of messages whose connection breaks before the reply is read."""


@dataclass
class Report:
    """What a run did and found; ``violations`` are complete texts."""

    ops: int = 0
    seconds: float = 0.0
    connections: int = 0
    segments: int = 0
    longest: int = 0
    undecided: int = 0
    looked: int = 0
    lost: int = 0
    messages: int = 0
    by_name: collections.Counter[str] = field(default_factory=collections.Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = ", ".join(f"{name} {count}" for name, count in self.by_name.most_common())
        line = (
            f"{self.ops} operations over {self.connections} connections in {self.seconds:.1f} s, "
            f"{self.lost} of them without an answer; {self.segments} segments of up to {self.longest}, "
            f"{self.looked} configurations looked at, {self.undecided} undecided; "
            f"{self.messages} messages published; {len(self.violations)} violations\n({names})"
        )
        return "\n\n".join([line, *self.violations[:3]])


class Wrong(Exception):
    """The server said something that is no answer to what was asked."""


def key_name(group: int, slot: int) -> bytes:
    slot %= HALF
    if slot == KEYS:
        return b"lin%d:queue" % group
    return (b"lin%d:%d" % (group, slot)).ljust(NAME_SIZES[(group + slot) % len(NAME_SIZES)], b".")


# -- requests --


@dataclass
class Unit:
    """One operation of the history as it is sent: its commands, of which the last one's reply is its own."""

    group: int
    name: str
    keys: tuple[int, ...]
    args: tuple[Any, ...]
    commands: list[list[Any]]
    call: int = 0
    then: Callable[[Any], None] | None = None
    """Called with the reply."""
    reply: Callable[[Any], Any] | None = None
    """Makes the reply of the history out of the decoded one."""


def words(group: int, name: str, keys: tuple[int, ...], args: tuple[Any, ...]) -> list[Any]:
    """The command that does this."""
    names = [key_name(group, key) for key in keys]
    match name:
        case "SET PX":
            return ["SET", *names, args[0], "PX", args[1]]
        case "GETRANGE":
            return [name, *names, "0", "-1"]
        case "PEXPIRE" if args[0] % 1000 == 0:
            return ["EXPIRE", *names, args[0] // 1000]
        case "MSET":
            return [name, *itertools.chain(*zip(names, args, strict=True))]
        case "COPY":
            return [name, *names, "DB", keys[1] // HALF, "REPLACE"]
        case "EVAL touch":
            return ["EVAL", TOUCH, 1, *names, args[0]]
        case "EVAL exchange":
            return ["EVAL", EXCHANGE, 2, *names]
        case "SWAPDB":
            return [name, "0", "1"]
        case "BLPOP":
            return [name, *names, "1"]
    return [name, *names, *args]


def unit(group: int, name: str, keys: Sequence[int] = (), args: tuple[Any, ...] = ()) -> Unit:
    keys = tuple(keys)
    return Unit(
        group, name, keys, args, [words(group, name, keys, args)], reply=_BLPOP if name == "BLPOP" else None
    )


def _BLPOP(reply: Any) -> Any:
    return reply[1] if type(reply) is tuple else reply


def transaction(group: int, inside: list[tuple[str, tuple[int, ...], tuple[Any, ...]]]) -> Unit:
    """MULTI … EXEC; a first command named WATCHED is not sent."""
    commands = [words(group, *each) for each in inside if each[0] != "WATCHED"]
    keys = {key for _, keys, _ in inside for key in keys}
    return Unit(group, "EXEC", tuple(sorted(keys)), tuple(inside), [["MULTI"], *commands, ["EXEC"]])


def pin(group: int) -> Unit:
    """Reads all slots of a group in one transaction."""
    commands: list[list[Any]] = [["MULTI"]]
    for database in range(2):
        commands.append(["SELECT", database])
        for slot in range(KEYS):
            name = key_name(group, slot)
            commands += [["GET", name], ["PTTL", name]]
        commands.append(["LRANGE", key_name(group, KEYS), "0", "-1"])
    commands += [["SELECT", "0"], ["EXEC"]]
    return Unit(group, "PIN", (), (), commands, reply=_slots)


def _slots(reply: Any) -> Any:
    out: list[Any] = []
    for database in range(2):
        start = database * (2 * KEYS + 2) + 1
        for slot in range(KEYS):
            value, ttl = reply[start + 2 * slot : start + 2 * slot + 2]
            out.append(None if value is None else (value, ttl))
        items = reply[start + 2 * KEYS]
        out.append((items,) if items else None)
    return tuple(out)


def normal(reply: Any) -> Any:
    """A decoded reply as histories have it."""
    if isinstance(reply, ErrorReply):
        return reply.code
    if isinstance(reply, bytes):
        return bytes(reply)
    if isinstance(reply, list):
        return tuple(map(normal, reply))
    return reply


class Link:
    """A connection, and the requests on it that wait for their replies."""

    def __init__(self, load: Worker, role: str, number: int) -> None:
        self.load, self.role, self.number = load, role, number
        self.sock: socket.socket | None = None
        self.history: deque[str] = deque(maxlen=30)
        self.waiting: deque[tuple[Unit, int]] = deque()
        """Units, and how many replies (OK, QUEUED) come before each one's own."""
        self.open()

    def open(self) -> None:
        config = self.load.config
        host = "::1" if self.number % 8 == 7 else "127.0.0.1"
        self.sock = sock = socket.create_connection((host, config.port), timeout=config.reply_timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(True)
        whole, part = divmod(config.reply_timeout, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole), int(part * 1e6)))
        address, port = sock.getsockname()[:2]
        self.address = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self.client = next(self.load.clients)
        self.decoder = Decoder()
        self.waiting.clear()
        self.load.watch(self)
        if self.number % 6 == 5:
            self.ask("HELLO", "3")
        self.ask("SELECT", "1") if self.role == "far" else self.ask("PING")
        self.history.append("-- connected")

    def close(self, abort: bool = False) -> None:
        if self.sock is not None:
            self.load.unwatch(self)
            if abort:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()
            self.sock = None

    def ask(self, *command: Any) -> Any:
        """One command outside of the history; its reply."""
        assert self.sock is not None
        self.sock.sendall(encode_command(*command))
        while True:
            reply = self.decoder.pop()
            if reply is not Decoder.INCOMPLETE:
                return normal(reply)
            self.receive()

    def send(self, units: list[Unit]) -> None:
        """The units in one send()."""
        assert self.sock is not None
        for each in units:
            self.waiting.append((each, len(each.commands) - 1))
            self.history.append(f"> {each.name} {each.group}{each.keys}")
        data = b"".join(encode_command(*command) for each in units for command in each.commands)
        call = time.monotonic_ns()
        for each in units:
            each.call = call
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise self.wrong(f"send failed: {error}") from None

    def receive(self) -> None:
        """Takes what has come, waiting for it if there is nothing."""
        assert self.sock is not None
        began = time.monotonic()
        while True:
            try:
                data = self.sock.recv(1 << 16)
                break
            except BlockingIOError:
                if time.monotonic() - began > self.load.config.reply_timeout * 0.9:
                    raise self.wrong("no reply in time") from None
            except OSError as error:
                raise self.wrong(f"recv failed: {error}") from None
        if not data:
            raise self.wrong("closed by the server")
        self.decoder.feed(data)

    def take(self) -> None:
        """Reads once, and completes what has been answered."""
        self.receive()
        self.complete()

    def complete(self) -> None:
        now = time.monotonic_ns()
        while self.waiting:
            reply = self.decoder.pop()
            if reply is Decoder.INCOMPLETE:
                return
            self.history.append(f"< {linear._show(normal(reply))}")
            each, before = self.waiting[0]
            if before:
                if reply not in (b"OK", b"QUEUED"):
                    raise self.wrong(f"{each.name}: {reply!r} before its reply")
                self.waiting[0] = (each, before - 1)
                continue
            self.waiting.popleft()
            said = normal(reply)
            if each.reply is not None:
                try:
                    said = each.reply(said)
                except (TypeError, ValueError, IndexError):
                    raise self.wrong(f"{each.name} answered {said!r}") from None
            self.load.record(self, each, now, said)
            if each.then is not None:
                each.then(said)
        if self.decoder.pending:
            raise self.wrong("more replies than requests")

    def finish(self) -> None:
        """Reads until everything is answered."""
        while self.waiting:
            self.take()

    def lose(self) -> None:
        """What waits will not be answered any more; it cannot take effect after this moment."""
        now = time.monotonic_ns()
        for each, _ in self.waiting:
            self.load.record(self, each, now, LOST)
        self.waiting.clear()

    def wrong(self, what: str) -> Wrong:
        tail = "\n    ".join(self.history)
        return Wrong(
            f"{what}\n  on a {self.role} connection ({self.address}), its last exchanges:\n    {tail}"
        )


@dataclass(frozen=True)
class Plan:
    """What all workers do in a round."""

    groups: list[int]
    keys: int
    ops: int
    """Of each worker."""
    flight: int
    """Connections of a worker that may wait at once."""
    others: float
    """Share of commands that are no GET or SET."""
    whole: float
    """FLUSHALLs and SWAPDBs of each worker."""


def plan(config: Config, batch: int, number: int) -> Plan:
    rng = random.Random(f"plan/{config.seed}/{batch}/{number}")
    keys = rng.choice((1, 2, 4, 4))
    count = rng.choice((1, 2, 6, 15, 50, 50))
    flight = rng.choice((1, 2, 4, config.links if count > 2 else 3))
    # More at once, or on fewer keys: shorter segments, for what they may cost to search.
    ops = count * (10 if flight < 4 else 8) + rng.randrange(10)
    return Plan(
        groups=rng.sample(range(GROUPS), count),
        keys=keys,
        ops=max(12, ops),
        flight=flight,
        others=rng.choice((0.02, 0.1, 0.3, 0.6)),
        whole=rng.choice((0, 0, 0.2, 1)),
    )


class Worker:
    """One process: its connections, and the histories of what it did on them."""

    def __init__(self, config: Config, index: int, barrier: Any) -> None:
        self.config, self.index, self.barrier = config, index, barrier
        self.rng = random.Random(f"linear/{config.seed}/{index}")
        self.clients = itertools.count(index * 1_000_000)
        self.count = 0
        self.epoll = select.epoll()
        self.by_fd: dict[int, Link] = {}
        self.records: list[tuple[Any, ...]] = []
        self.published: list[tuple[int, int, bytes]] = []
        self.control = Link(self, "control", 0)
        roles = ["block", "block", "far", *["fast"] * (config.links - 3)]
        self.links = [Link(self, role, number) for number, role in enumerate(roles)]
        self.fast = [link for link in self.links if link.role == "fast"]
        self.subscriber: Link | None = None
        if index < config.subscribers:
            self.subscriber = Link(self, "subscriber", 0)
            self.subscriber.ask("SUBSCRIBE", CHANNEL)
        self.plan = plan(config, 0, 0)
        self.pushes: deque[tuple[int, int]] = deque()

    @property
    def connections(self) -> int:
        return len(self.links) + 1 + (self.subscriber is not None)

    def watch(self, link: Link) -> None:
        assert link.sock is not None
        if link.role not in ("control", "subscriber"):
            self.epoll.register(link.sock, select.EPOLLIN)
            self.by_fd[link.sock.fileno()] = link

    def unwatch(self, link: Link) -> None:
        assert link.sock is not None
        if self.by_fd.pop(link.sock.fileno(), None):
            self.epoll.unregister(link.sock)

    def record(self, link: Link, each: Unit, ret: int, reply: Any) -> None:
        if each.name == "PUBLISH":
            self.published.append((each.call, ret, each.args[1]))
            if reply != self.config.subscribers:
                raise link.wrong(f"PUBLISH reached {reply} subscribers")
            return
        self.records.append((each.group, each.call, ret, link.client, each.name, each.keys, each.args, reply))

    # -- what is sent --

    def value(self) -> bytes:
        """One that nobody ever wrote or will write; INCR does not make one of another either."""
        rng = self.rng
        self.count += 1
        number = self.count * 64 + self.index
        if rng.random() < 0.4:
            return b"%d" % (number * 1000)
        size = rng.choice(VALUE_SIZES)
        return b"v%d:%b" % (number, PADDING[:size])

    def two(self) -> list[int]:
        return self.rng.sample(range(self.plan.keys), 2)

    def one(self) -> list[int]:
        return [self.rng.randrange(self.plan.keys)]

    def get_or_set(self, group: int, base: int = 0) -> Unit:
        key = [base + self.one()[0]]
        return (
            unit(group, "GET", key) if self.rng.random() < 0.55 else unit(group, "SET", key, (self.value(),))
        )

    def other(self, group: int, base: int = 0) -> Unit:
        """A command that Redis must execute."""
        name, keys, args = self.change(group)
        keys = tuple(base + key for key in keys)
        if name == "COPY" and self.rng.random() < 0.3:
            keys = (keys[0], (keys[1] + HALF) % (2 * HALF))
        return unit(group, name, keys, args)

    def change(self, group: int) -> tuple[str, tuple[int, ...], tuple[Any, ...]]:
        rng = self.rng
        roll = rng.randrange(100 if self.plan.keys > 1 else 76)
        one = tuple(self.one())
        ms = rng.randrange(1, 51) if rng.random() < 0.9 else 1000
        if roll < 12:
            return "INCR", one, ()
        if roll < 22:
            return "APPEND", one, (b"%d" % rng.randrange(10) if rng.random() < 0.5 else self.value()[:30],)
        if roll < 32:
            return "DEL", one, ()
        if roll < 42:
            return "PEXPIRE", one, (ms,)
        if roll < 47:
            return "SET PX", one, (self.value(), ms)
        if roll < 53:
            return "GETSET", one, (self.value(),)
        if roll < 59:
            return "SETNX", one, (self.value(),)
        if roll < 65:
            return "EVAL touch", one, (rng.choice((10, 1000, 30_000)),)
        if roll < 70:
            return rng.choice(("GETRANGE", "STRLEN", "EXISTS")), one, ()
        if roll < 73:
            return "PERSIST", one, ()
        if roll < 76:
            return "GETDEL", one, ()
        two = tuple(self.two())
        if roll < 82:
            return "MSET", two, (self.value(), self.value())
        if roll < 86:
            return "MGET", two, ()
        if roll < 91:
            return "RENAME", two, ()
        if roll < 95:
            return "COPY", two, ()
        return "EVAL exchange", two, ()

    def transaction(self, group: int) -> Unit:
        inside = []
        for _ in range(self.rng.randrange(1, 5)):
            each = self.get_or_set(group) if self.rng.random() < 0.5 else self.other(group)
            # A script's clock stands, a deadline set in the same transaction does not.
            if each.name not in ("EVAL touch", "EVAL exchange", "PEXPIRE", "SET PX", "PERSIST"):
                inside.append((each.name, each.keys, each.args))
        return transaction(group, inside or [("GET", (0,), ())])

    def act(self, link: Link) -> int:
        """Sends something on an idle connection; how many operations that are."""
        rng = self.rng
        group = rng.choice(self.plan.groups)
        if link.role == "block":
            return self.block(link, group)
        if link.role == "far":
            units = [
                self.other(group, HALF) if rng.random() < 0.5 else self.get_or_set(group, HALF)
                for _ in range(rng.choice((1, 1, 3)))
            ]
            return self.sent(link, units)
        roll = rng.random()
        if roll < self.plan.others:
            if roll < 0.001:
                return self.publish(link)
            kind = rng.random()
            if kind < 0.6:
                return self.sent(link, [self.other(group)])
            if kind < 0.7:
                return self.sent(link, [self.transaction(group)])
            if kind < 0.75:
                return self.optimistic(link, group)
            if kind < 0.77:
                return self.publish(link)
            units = [
                self.other(group) if rng.random() < 0.4 else self.get_or_set(group)
                for _ in range(rng.randrange(2, 6))
            ]
            # Some in one message, some each in its own, without waiting.
            return self.sent(link, units) if kind < 0.87 else self.hurry(link, units)
        if rng.random() < 0.75:
            return self.sent(link, [self.get_or_set(group)])
        count = rng.randrange(2, 9)
        groups = rng.choices(self.plan.groups, k=count)
        units = [self.get_or_set(each) for each in groups]
        return self.sent(link, units) if rng.random() < 0.7 else self.hurry(link, units)

    def sent(self, link: Link, units: list[Unit]) -> int:
        link.send(units)
        return self.after(link, len(units))

    def hurry(self, link: Link, units: list[Unit]) -> int:
        for each in units:
            link.send([each])
        return self.after(link, len(units))

    def after(self, link: Link, count: int) -> int:
        """What follows a message: the connection breaks, or its reply is awaited at once, or it is left."""
        if self.rng.random() < self.config.breaks:
            self.sever(link)
        elif link.role == "fast" and self.rng.random() < 0.5:
            link.finish()
        return count

    def publish(self, link: Link) -> int:
        self.count += 1
        message = b"%d:%d" % (self.index, self.count)
        link.send([Unit(0, "PUBLISH", (), (CHANNEL, message), [["PUBLISH", CHANNEL, message]])])
        return 1

    def optimistic(self, link: Link, group: int) -> int:
        """WATCH, GET, and with what it says MULTI … EXEC."""
        key = self.one()
        value = self.value()

        def then(seen: Any) -> None:
            if seen is not LOST:
                inside = [("WATCHED", tuple(key), (seen,)), ("SET", tuple(key), (value,))]
                link.send([transaction(group, inside)])

        read = unit(group, "GET", key)
        read.commands.insert(0, ["WATCH", key_name(group, key[0])])
        read.then = then
        link.send([read])
        return 2

    def block(self, link: Link, group: int) -> int:
        """BLPOP with commands behind it: executed late in Redis's loop, when somebody pushes."""
        rng = self.rng
        behind = [
            unit(group, "EVAL touch", self.one(), (rng.choice((1000, 30_000, 100_000)),))
            for _ in range(rng.randrange(3))
        ]
        behind += [self.other(group) for _ in range(rng.randrange(3))]
        behind += [self.get_or_set(group) for _ in range(rng.randrange(2))]
        link.send([unit(group, "BLPOP", [KEYS]), *behind])
        self.pushes.append((group, 1 + len(behind)))
        return 1 + len(behind)

    def push(self, hammer: bool = True) -> int:
        """Unblocks somebody, and at that moment sets the keys of what waits behind."""
        group, _ = self.pushes.popleft()
        idle = [link for link in self.fast if not link.waiting]
        if not idle:
            self.pushes.append((group, 0))
            return 0
        idle[0].send([unit(group, "RPUSH", [KEYS], (self.value()[:30],))])
        count = 1
        if hammer and len(idle) > 1:
            for _ in range(self.rng.choice((2, 4, 12))):
                self.sent(idle[1], [self.get_or_set(group) for _ in range(self.rng.choice((1, 1, 2)))])
                idle[1].finish()
                count += 1
        return count

    def sever(self, link: Link) -> None:
        """Ends a connection while requests are under way. When CLIENT KILL has been answered Redis has
        forgotten it, so that what it had not executed by then it never will."""
        if any(each.name in ("PUBLISH", "BLPOP") for each, _ in link.waiting):
            return
        for each, _ in link.waiting:
            each.then = None
        how = self.rng.randrange(3)
        if how:
            address = link.address
            link.close(abort=how == 1)
            self.control.ask("CLIENT", "KILL", "ADDR", address)
            link.lose()
        else:
            self.control.ask("CLIENT", "KILL", "ADDR", link.address)
            with contextlib.suppress(Wrong):
                # What had been answered is still there; anything else is a wrong answer even now.
                while link.waiting:
                    link.receive()
                    link.complete()
            link.lose()
            link.close()
        link.open()

    # -- rounds --

    def meet(self) -> None:
        self.barrier.wait(60)

    def poll(self, seconds: float) -> bool:
        ready = self.epoll.poll(seconds)
        for fd, _ in ready:
            if fd in self.by_fd:
                link = self.by_fd[fd]
                if not link.waiting:
                    raise link.wrong("something to read that nobody asked for")
                link.take()
        return bool(ready)

    def pick(self, idle: list[Link]) -> Link:
        """A connection to use next: mostly one that may be served."""
        roll = self.rng.random()
        blocked = self.config.blocked
        role = "block" if roll < blocked else "far" if roll < blocked + 0.03 else "fast"
        return self.rng.choice([link for link in idle if link.role == role] or idle)

    def round(self, plan: Plan) -> None:
        rng = self.rng
        self.plan = plan
        self.meet()
        left = plan.ops
        whole = int(plan.whole) + (rng.random() < plan.whole % 1)
        at = sorted((rng.randrange(plan.ops) for _ in range(whole)), reverse=True)
        last_reply = time.monotonic()
        while True:
            idle = [link for link in self.links if not link.waiting]
            busy = len(self.links) - len(idle)
            if self.pushes and rng.random() < 0.5:
                left -= self.push()
            elif left > 0 and idle and (busy < plan.flight or not any(x.waiting for x in self.fast)):
                link = self.pick(idle)
                if at and left <= at[-1]:
                    at.pop()
                    link.send([unit(EVERYWHERE, rng.choice(("FLUSHALL", "SWAPDB")))])
                else:
                    left -= self.act(link)
                if rng.random() < 0.3:
                    self.poll(0)
            elif busy:
                if self.poll(0.005):
                    last_reply = time.monotonic()
                elif time.monotonic() - last_reply > self.config.reply_timeout:
                    stuck = next(link for link in self.links if link.waiting)
                    raise stuck.wrong("no reply in time")
                else:
                    # A queue may have been flushed or swapped away from under those who wait.
                    for link in self.links:
                        if link.waiting and link.waiting[0][0].name == "BLPOP":
                            self.pushes.append((link.waiting[0][0].group, 0))
            elif left <= 0 and not self.pushes:
                break
        self.meet()
        self.rest(plan.groups)

    def rest(self, groups: Sequence[int], get: bool = True) -> None:
        """Reads this worker's share of the groups while nobody writes, by GET (unless told not to) and by
        PIN."""
        for group in groups:
            if group % self.config.workers == self.index:
                if get:
                    link = self.rng.choice(self.fast)
                    self.sent_and_read(link, [unit(group, "GET", [key]) for key in range(self.plan.keys)])
                self.sent_and_read(self.control, [pin(group)])

    @staticmethod
    def sent_and_read(link: Link, units: list[Unit]) -> None:
        link.send(units)
        link.finish()

    def batch(self, number: int, ops: int) -> bytes:
        """So many operations of all workers together; the histories, for marshal."""
        self.records, self.published = [], []
        offset = time.time_ns() - time.monotonic_ns()
        self.meet()
        self.rest(range(GROUPS), get=False)
        done = 0
        for round_ in itertools.count():
            following = plan(self.config, number, round_)
            self.round(following)
            done += following.ops * self.config.workers
            if done >= ops:
                break
        self.meet()
        self.rest(range(GROUPS))
        drift = abs(time.time_ns() - time.monotonic_ns() - offset)
        return marshal.dumps((self.records, self.published, self.heard(number), drift, self.connections))

    def heard(self, number: int) -> list[bytes] | None:
        """What this worker's subscriber got in the batch."""
        self.meet()
        end = b"end %d" % number
        if self.index == 0 and self.config.subscribers:
            self.control.ask("PUBLISH", CHANNEL, end)
        if self.subscriber is None:
            return None
        heard: list[bytes] = []
        while True:
            reply = self.subscriber.decoder.pop()
            if reply is Decoder.INCOMPLETE:
                self.subscriber.receive()
            elif reply[:2] != [b"message", CHANNEL]:
                raise self.subscriber.wrong(f"a subscriber got {reply!r}")
            elif reply[2] == end:
                return heard
            else:
                heard.append(reply[2])


def check_groups(data: bytes) -> bytes:
    """The histories of some groups, each beginning with a PIN: what linear.check says of them."""
    slack, groups = marshal.loads(data)
    total = linear.Verdict()
    for group, records in groups:
        ops = sorted((Op(*record) for record in records), key=lambda op: op.call)
        first = ops[0]
        if first.name != "PIN" or any(op.call <= first.ret for op in ops[1:]):
            raise AssertionError(f"the history of group {group} does not begin with a pin: {ops[:3]}")
        verdict = linear.check(ops[1:], linear.pinned(first, slack), slack, f"keys {group}")
        total.segments += verdict.segments
        total.longest = max(total.longest, verdict.longest)
        total.undecided += verdict.undecided
        total.looked += verdict.looked
        total.violations += verdict.violations
    return marshal.dumps((total.segments, total.longest, total.undecided, total.looked, total.violations))


def _worker(config: Config, index: int, barrier: Any, pipe: multiprocessing.connection.Connection) -> None:
    """Obeys the parent: ("run", batch, ops) or ("check", histories); answers ("ok" or "wrong", data)."""
    worker: Worker | None = None
    while True:
        try:
            what, *rest = pipe.recv()
        except EOFError:
            return
        try:
            if what == "stop":
                return
            if what == "check":
                answer = check_groups(*rest)
            else:
                worker = worker or Worker(config, index, barrier)
                answer = worker.batch(*rest)
            pipe.send(("ok", answer))
        except threading.BrokenBarrierError:
            pipe.send(("wrong", ""))
        except Wrong as error:
            barrier.abort()
            pipe.send(("wrong", f"seed {config.seed}, worker {index}: {error}"))
        except Exception:
            barrier.abort()
            pipe.send(("wrong", f"worker {index}: the load itself failed:\n{traceback.format_exc()}"))


def run(config: Config, until: Callable[[Report], bool] = lambda report: bool(report.violations)) -> Report:
    """Runs load and checker; ends at the first violation. Its processes have ended when it returns."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(config.workers)
    report = Report()
    start = time.monotonic()
    pipes, processes = [], []
    for index in range(config.workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(config, index, barrier, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for number in itertools.count():
            # A small one first: what is badly broken shows at once.
            _batch(config, pipes, report, number, config.batch // 5 if number == 0 else config.batch)
            report.seconds = time.monotonic() - start
            if until(report) or report.ops >= config.ops or report.seconds > config.seconds:
                break
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(("stop",))
    finally:
        for process in processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
    return report


def _batch(config: Config, pipes: list[Any], report: Report, number: int, ops: int) -> None:
    answers = _ask(pipes, [("run", number, ops)] * len(pipes), report, config)
    if answers is None:
        return
    parts = [marshal.loads(answer) for answer in answers]
    histories: list[list[Any]] = [[] for _ in range(GROUPS)]
    for records, *_ in parts:
        for group, *op in records:
            report.by_name[op[3]] += 1
            report.lost += op[6] is LOST
            for each in range(GROUPS) if group == EVERYWHERE else (group,):
                histories[each].append(op)
    published = [message for _, messages, *_ in parts for message in messages]
    report.messages += len(published)
    report.ops = report.by_name.total() - report.by_name["PIN"] + report.messages
    report.connections = sum(part[4] for part in parts)
    report.violations += linear.check_channel(published, [part[2] for part in parts if part[2] is not None])
    slack = SLACK + max(part[3] for part in parts)
    shares = [
        (
            "check",
            marshal.dumps((slack, [(g, histories[g]) for g in range(GROUPS) if g % len(pipes) == index])),
        )
        for index in range(len(pipes))
    ]
    for answer in _ask(pipes, shares, report, config) or []:
        count, longest, undecided, looked, violations = marshal.loads(answer)
        report.segments += count
        report.longest = max(report.longest, longest)
        report.undecided += undecided
        report.looked += looked
        report.violations += violations


def _ask(pipes: list[Any], questions: list[Any], report: Report, config: Config) -> list[bytes] | None:
    """Everybody's answers, or None: then somebody's is a violation, which is in the report."""
    for pipe, question in zip(pipes, questions, strict=True):
        pipe.send(question)
    answers, wrong = [], False
    for index, pipe in enumerate(pipes):
        try:
            if not pipe.poll(300):
                report.violations.append(f"worker {index} hangs")
                return None
            said, answer = pipe.recv()
        except EOFError:
            report.violations.append(f"worker {index} ended without a word")
            return None
        if said == "ok":
            answers.append(answer)
        else:
            wrong = True
            if answer:
                report.violations.append(answer)
    return None if wrong else answers


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that a redis-server is linearizable under load.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ops", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    report = run(Config(**options))
    print(report)
    return 1 if report.violations or report.undecided else 0


if __name__ == "__main__":
    sys.exit(main())
