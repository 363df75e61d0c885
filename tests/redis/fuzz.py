"""RESP fuzzing by comparison: the same bytes, in the same send() calls, to an offloaded and to a plain
redis-server.

What comes back must be the same bytes, and the connections must end the same way. Every stream runs on a
connection that was made eligible first, over keys that are in the table, so that the kernel's path is what
is tested. Streams come in rounds that begin with the same data; a round is replayed by its number:

``python -m tests.redis.fuzz --offloaded 6379 --plain 6380 --seed 1 --only 17``
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kflex_repro.redis.resp import Decoder, ErrorReply, ProtocolError, encode_command

STALL = 5.0
ROUND = 40

KEY_SIZES = (1, 2, 15, 63, 64, 65, 127, 249, 250, 251, 255, 256)
VALUE_SIZES = (0, 1, 2, 63, 64, 65, 1000, 4095, 4096, 4097, 6000)


@dataclass
class Chunk:
    """One piece of a stream: the bytes of a send(), and how many replies must be read before the next."""

    data: bytes
    replies: int = 0
    short: bool = False
    """Sent without blocking, the rest again and again, while the server stands still for a moment."""


@dataclass
class Stream:
    """What one connection sends."""

    kind: str
    chunks: list[Chunk]
    proto: int = 2
    sndbuf: int = 0
    sentinel: bool = False
    """It ends between two commands: a last PING must be answered, and the connection must stay open."""

    def __str__(self) -> str:
        shown = "\n    ".join(
            f"{'short ' if chunk.short else ''}send {len(chunk.data)}: {_shown(chunk.data)}"
            f"{f', then read {chunk.replies} replies' if chunk.replies else ''}"
            for chunk in self.chunks
        )
        return f"{self.kind} (RESP{self.proto}{', small SO_SNDBUF' if self.sndbuf else ''}):\n    {shown}"


def _shown(data: bytes) -> str:
    return repr(data) if len(data) < 600 else f"{data[:300]!r} … {data[-200:]!r}"


@dataclass
class Outcome:
    """What a server did with a stream."""

    received: bytes = b""
    end: str = ""
    reset: bool = False
    """The end came as a RST, which takes with it what the kernel had not delivered yet."""

    def same(self, other: Outcome) -> bool:
        if self.end != other.end:
            return False
        mine, theirs = self.received, other.received
        # A server that closes with input unread resets, at a moment that is not always the same.
        return (
            mine == theirs
            or (self.reset and theirs.startswith(mine))
            or (other.reset and mine.startswith(theirs))
        )

    def __str__(self) -> str:
        return f"{len(self.received)} bytes, then {self.end}: {_shown(self.received)}"


@dataclass
class Target:
    """A server to send streams to. ``pid`` lets it be stopped for a moment; 0: never."""

    port: int
    pid: int = 0
    host: str = "127.0.0.1"

    def open(self, stream: Stream | None = None) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        if stream is not None and stream.sndbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, stream.sndbuf)
        sock.settimeout(STALL)
        sock.connect((self.host, self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


class _Reader:
    """Collects what a server sends, and counts replies as long as they make sense."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.outcome = Outcome()
        self.decoder: Decoder | None = Decoder()
        self.replies = 0

    def take(self) -> bool:
        """Reads once. False when the connection has ended, or stalls."""
        try:
            data = self.sock.recv(1 << 17)
        except TimeoutError:
            self.outcome.end = "silence"
            return False
        except ConnectionError:
            # Whether a closing server resets depends on what it had not read: both are its end.
            self.outcome.end, self.outcome.reset = "close", True
            return False
        if not data:
            self.outcome.end = "close"
            return False
        self.outcome.received += data
        if self.decoder is not None:
            try:
                self.decoder.feed(data)
                self.replies += sum(1 for _ in self.decoder)
            except ProtocolError:
                self.decoder = None
        return True


def play(target: Target, stream: Stream) -> Outcome:
    """Sends a stream and collects everything that comes back until the connection has ended."""
    with target.open(stream) as sock:
        reader = _Reader(sock)
        # The first request, answered, makes the connection eligible.
        hello = encode_command("HELLO", "3") if stream.proto == 3 else b""
        sock.sendall(hello + encode_command("ECHO", "ready"))
        while reader.replies < (2 if hello else 1):
            if not reader.take():
                return reader.outcome
        reader.outcome.received = b""
        due = reader.replies
        try:
            for chunk in stream.chunks:
                if chunk.short:
                    _send_short(target, sock, chunk.data)
                else:
                    sock.sendall(chunk.data)
                if chunk.replies:
                    due += chunk.replies
                    while reader.replies < due and reader.decoder is not None:
                        if not reader.take():
                            return reader.outcome
            if stream.sentinel:
                sock.sendall(encode_command("ECHO", "still here"))
                while not reader.outcome.received.endswith(b"$10\r\nstill here\r\n"):
                    if not reader.take():
                        return reader.outcome
                if select.select([sock], [], [], 0)[0] and not reader.take():
                    return reader.outcome
                reader.outcome.end = "still open"
                return reader.outcome
            sock.shutdown(socket.SHUT_WR)
        except TimeoutError:
            reader.outcome.end = "a send that blocks"
            return reader.outcome
        except OSError:
            # Closed by the server: what it said before that is still to be read.
            reader.outcome.reset = True
        while reader.take():
            pass
        return reader.outcome


def _send_short(target: Target, sock: socket.socket, data: bytes) -> None:
    """Non-blocking sends into a server that does not read: the socket takes a part, the rest goes again."""
    deadline = time.monotonic() + STALL
    stopped = bool(target.pid)
    if stopped:
        os.kill(target.pid, signal.SIGSTOP)
    # With a timeout Python would wait for room by itself.
    sock.setblocking(False)
    try:
        at = 0
        while at < len(data):
            try:
                at += sock.send(data[at:])
            except BlockingIOError:
                if stopped:
                    os.kill(target.pid, signal.SIGCONT)
                    stopped = False
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                select.select([], [sock], [], STALL)
    finally:
        sock.settimeout(STALL)
        if stopped:
            os.kill(target.pid, signal.SIGCONT)


# -- streams --


class Maker:
    """Streams from a seed."""

    def __init__(self, seed: object) -> None:
        self.rng = random.Random(f"fuzz/{seed}")
        rng = self.rng
        names = [b"k", b"n1", b"list", b"\x00\r\n", b"a b", b"$3", b"*1\r\n$4\r\nPING\r\n", b"\xff\xfe"]
        self.keys = names + [bytes(rng.choices(b"abcxyz019:", k=size)) for size in KEY_SIZES]
        self.keys += [rng.randbytes(20), b""]

    def key(self) -> bytes:
        return self.rng.choice(self.keys)

    def value(self) -> bytes:
        rng = self.rng
        roll = rng.random()
        if roll < 0.2:
            return b"%d" % rng.getrandbits(rng.choice((1, 8, 40, 63)))
        if roll < 0.4:
            # Looks like commands: a parser that loses its place will show.
            return encode_command("SET", self.key(), "stolen") + encode_command("GET", self.key())
        size = rng.choice(VALUE_SIZES) if roll < 0.7 else rng.randrange(200)
        return rng.randbytes(size)

    def case(self, name: bytes) -> bytes:
        rng = self.rng
        if rng.random() < 0.6:
            return name
        return bytes(byte ^ 0x20 if rng.random() < 0.5 and 65 <= byte <= 90 else byte for byte in name)

    def command(self) -> list[bytes]:
        """A command that any server answers with the same single reply."""
        rng, key, value = self.rng, self.key, self.value
        roll = rng.random()
        if roll < 0.38:
            return [self.case(b"GET"), key()]
        if roll < 0.70:
            return [self.case(b"SET"), key(), value()]
        makers: tuple[Callable[[], list[bytes]], ...] = (
            lambda: [b"GETRANGE", key(), b"0", b"-1"],
            lambda: [b"STRLEN", key()],
            lambda: [b"APPEND", key(), value()[:30]],
            lambda: [b"INCR", b"n1"],
            lambda: [b"DEL", key()],
            lambda: [b"EXISTS", key(), key()],
            lambda: [b"TYPE", key()],
            lambda: [b"MGET", key(), key(), key()],
            lambda: [b"MSET", key(), value(), key(), value()],
            lambda: [b"SETNX", key(), value()],
            lambda: [b"GETSET", key(), value()],
            lambda: [b"RENAME", key(), key()],
            lambda: [b"COPY", key(), key(), b"REPLACE"],
            lambda: [b"EXPIREAT", key(), b"4102444800"],
            lambda: [b"PERSIST", key()],
            lambda: [b"EXPIRETIME", key()],
            lambda: [b"OBJECT", b"ENCODING", key()],
            lambda: [b"LPUSH", b"list", value()[:10]],
            lambda: [b"ECHO", value()],
            lambda: [b"PING"],
            lambda: [b"SET", key(), value(), b"NX"],
            lambda: [b"SET", key(), value(), b"GET"],
            lambda: [b"SET", key(), value(), b"EX"],
            lambda: [b"SET", key()],
            lambda: [b"GET"],
            lambda: [b"GET", key(), key()],
            lambda: [b"GETX", key()],
            lambda: [b"GET ", key()],
            lambda: [b"SET\0", key(), value()],
            lambda: [b"", key()],
            lambda: [b"SELECT", b"0"],
        )
        return rng.choice(makers)()

    def encode(self, args: Sequence[bytes]) -> bytes:
        return encode_command(*args)

    def mix(self, most: int) -> list[list[bytes]]:
        return [self.command() for _ in range(self.rng.randrange(1, most + 1))]

    def cut(self, data: bytes, *counts: int) -> list[Chunk]:
        """The bytes in pieces, cut at random in one of so many places."""
        cuts = self.rng.choices(range(len(data) + 1), k=self.rng.choice(counts))
        return _cut(data, sorted(cuts))

    # Each kind makes one stream.

    def valid(self) -> Stream:
        """Whole commands, a reply awaited after each message."""
        rng = self.rng
        chunks = []
        for _ in range(rng.randrange(1, 6)):
            commands = self.mix(rng.choice((1, 1, 3, 16, 40)))
            chunks.append(Chunk(b"".join(map(self.encode, commands)), len(commands)))
        return Stream("valid", chunks, sentinel=True)

    def hurried(self) -> Stream:
        """Whole commands, a send() each, no reply awaited."""
        commands = self.mix(20)
        return Stream("hurried", [Chunk(self.encode(args)) for args in commands], sentinel=True)

    def split(self) -> Stream:
        """Cut anywhere."""
        data = b"".join(map(self.encode, self.mix(8)))
        return Stream("split", self.cut(data, 1, 2, 3, 5, 8), sentinel=True)

    def transaction(self) -> Stream:
        rng = self.rng
        commands = [[b"MULTI"], *self.mix(5), [rng.choice((b"EXEC", b"DISCARD"))], *self.mix(3)]
        if rng.random() < 0.3:
            commands.insert(0, [b"WATCH", self.key()])
        if rng.random() < 0.5:
            return Stream("transaction", [Chunk(b"".join(map(self.encode, commands)))], sentinel=True)
        return Stream("transaction", [Chunk(self.encode(args), 1) for args in commands], sentinel=True)

    def demoting(self) -> Stream:
        """Commands that change the connection; no HELLO: its reply names the connection."""
        rng = self.rng
        special = rng.choice(
            (
                [[b"SELECT", b"1"], *self.mix(3), [b"SELECT", b"0"]],
                [[b"CLIENT", b"REPLY", b"OFF"], *self.mix(3), [b"CLIENT", b"REPLY", b"ON"]],
                [[b"CLIENT", b"REPLY", b"SKIP"], self.command()],
                [[b"SUBSCRIBE", b"c"], [b"PING"], [b"GET", b"k"], [b"UNSUBSCRIBE", b"c"]],
                [[b"RESET"]],
                [[b"QUIT"]],
                [[b"CLIENT", b"NO-EVICT", b"on"]],
                [[b"CLIENT", b"SETNAME", b"me"]],
                [[b"CLIENT", b"TRACKING", b"on"], [b"CLIENT", b"TRACKING", b"off"]],
                [[b"SELECT", b"00"]],
                [[b"select", b"9999"]],
                [[b"MULTI", b"x"]],
                [[b"EXEC"]],
                [[b"EXEC", b"x"]],
                [[b"AUTH", b"x"]],
                [[b"ASKING"]],
                [[b"READONLY"]],
                [[b"BLPOP", b"list", b"k", b"1"]],
                [[b"WAIT", b"0", b"0"]],
            )
        )
        commands = [*self.mix(3), *special, *self.mix(4)]
        if rng.random() < 0.5:
            return Stream("demoting", [Chunk(b"".join(map(self.encode, commands)))])
        return Stream("demoting", [Chunk(self.encode(args)) for args in commands])

    def inline(self) -> Stream:
        rng = self.rng
        lines = [
            b"GET k",
            b"  get   k  ",
            b"SET k inline",
            b'SET k "quo\\x41ted"',
            b"SET k 'single'",
            b'SET k "open',
            b"",
            b" ",
            b"\t",
            b"PING",
            b"ECHO x",
            b"EXISTS k n1",
            b"GET",
            b"NOSUCH a b",
            b"*",
            b"GET\0k",
            b"x" * rng.choice((10, 300_000)),
        ]
        # After these Redis drops the connection with all that was not sent yet: only as the first line.
        data = rng.choice((b"POST / HTTP/1.1\r\n", b"Host: x\r\n")) if rng.random() < 0.06 else b""
        for _ in range(rng.randrange(1, 5)):
            data += rng.choice(lines) + rng.choice((b"\r\n", b"\r\n", b"\n"))
            if rng.random() < 0.5:
                data += self.encode(self.command())
        return Stream("inline", self.cut(data, 0, 1, 2))

    NUMBERS = (
        b"0", b"-0", b"-1", b"-2", b"00", b"03", b"003", b"+3", b" 3", b"3 ", b"0x3", b"3.0", b"", b"-", b"a",
        b"1048576", b"1048577", b"2147483647", b"2147483648", b"4294967299", b"-2147483648",
        b"18446744073709551619", b"9223372036854775807", b"9223372036854775808", b"536870912", b"536870913",
        b"1e3",
    )  # fmt: skip

    def lie(self) -> Stream:
        """One count or length is not what it should be."""
        rng = self.rng
        commands = self.mix(3)
        data = b"".join(map(self.encode, commands))
        heads = [head for head in re.finditer(rb"[*$]([0-9]+)\r\n", data) if len(head[1]) < 6]
        head = rng.choice(heads)
        said = int(head[1])
        number = rng.choice(
            (*self.NUMBERS, b"%d" % (said + 1), b"%d" % max(said - 1, 0), b"%d" % (said + 1000))
        )
        data = data[: head.start(1)] + number + data[head.end(1) :]
        if rng.random() < 0.3:
            data += self.encode(self.command())
        return Stream("lie", self.cut(data, 0, 0, 1, 3))

    def line_ends(self) -> Stream:
        """CRLF replaced by something else, once."""
        rng = self.rng
        data = b"".join(map(self.encode, self.mix(3)))
        ends = [end.start() for end in re.finditer(rb"\r\n", data)]
        at = rng.choice(ends)
        other = rng.choice(
            (b"\n", b"\r", b"\r\r\n", b"\n\r", b"", b"\r\n\r\n", b"XY", b"\0\0", b"\rX", b" \r\n")
        )
        return Stream("line ends", [Chunk(data[:at] + other + data[at + 2 :] + self.encode([b"PING"]))])

    def mutated(self) -> Stream:
        rng = self.rng
        data = bytearray(b"".join(map(self.encode, self.mix(4))))
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(5)
            if kind == 0 and at < len(data):
                data[at] = rng.randrange(256)
            elif kind == 1 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                data[at:at] = rng.choice((b"\r\n", b"*", b"$", b"0", b" ", b"\0", rng.randbytes(3)))
            elif kind == 3:
                del data[at : at + rng.randrange(1, 6)]
            else:
                data[at:at] = data[at : at + rng.randrange(1, 20)]
        # A byte more or less can make another command: ones whose answer differs between two servers.
        if re.search(rb"(?i)hello|info|time|client|keys|scan|random|role|debug|config|lolwut|memory", data):
            return self.valid()
        return Stream(
            "mutated",
            self.cut(bytes(data), 0, 0, 1, 4),
        )

    def noise(self) -> Stream:
        rng = self.rng
        alphabet = b"*$0123456789\r\n\r\n\r\nGETSETgetset kK-+\0"
        data = bytes(rng.choices(alphabet, k=rng.randrange(1, 200)))
        return Stream("noise", self.cut(data, 0, 1, 2, 3))

    def truncated(self) -> Stream:
        rng = self.rng
        data = b"".join(map(self.encode, self.mix(3)))
        data = data[: rng.randrange(len(data))]
        return Stream("truncated", self.cut(data, 0, 1))

    def numbers(self) -> Stream:
        """A frame of nothing but a strange count, and what a claim of 512 MB does."""
        rng = self.rng
        number = rng.choice(self.NUMBERS)
        data = rng.choice(
            (
                b"*%b\r\n" % number,
                b"*%b\r\n$3\r\nGET\r\n$1\r\nk\r\n" % number,
                b"*2\r\n$%b\r\nGET\r\n$1\r\nk\r\n" % number,
                b"*2\r\n$3\r\nGET\r\n$%b\r\nk\r\n" % number,
                b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%b\r\nxyz\r\n" % number,
                b"*3\r\n$3\r\nSET\r\n$%b\r\nk\r\n$1\r\nx\r\n" % number,
            )
        )
        return Stream(
            "numbers", [Chunk(self.encode([b"GET", b"k"]), 1), Chunk(data), Chunk(self.encode([b"PING"]))]
        )

    def short_sends(self) -> Stream:
        """Messages that the socket takes in parts, and whose later parts look like commands."""
        rng = self.rng
        fake = encode_command("SET", "k", "stolen") + encode_command("GET", "k")
        sndbuf, copies = rng.choice(((4608, 90), (4608, 2000), (65536, 8000), (0, 80_000)))
        big = fake * copies
        big = big[rng.randrange(len(fake)) :]
        key = self.key()
        # Gone again at once: a client that half-closes before it has read a large reply may not get all of
        # it, from any server.
        commands = [*self.mix(3), [b"SET", key, big], [b"GET", key], [b"SET", key, b"small"], *self.mix(3)]
        data = b"".join(map(self.encode, commands))
        if rng.random() < 0.5:
            return Stream(
                "short sends", [Chunk(data, len(commands), short=True)], sndbuf=sndbuf, sentinel=True
            )
        chunks = [Chunk(self.encode(args), rng.randrange(2), short=True) for args in commands]
        return Stream("short sends", chunks, sndbuf=sndbuf, sentinel=True)

    KINDS = (
        (20, valid), (10, hurried), (14, split), (6, transaction), (5, demoting), (5, inline), (10, lie),
        (6, line_ends), (12, mutated), (4, noise), (5, truncated), (3, numbers), (0.7, short_sends),
    )  # fmt: skip

    def stream(self) -> Stream:
        weights = [weight for weight, _ in self.KINDS]
        make = self.rng.choices([make for _, make in self.KINDS], weights)[0]
        stream = make(self)
        if self.rng.random() < 0.15 and stream.kind != "demoting":
            stream.proto = 3
        return stream


def _cut(data: bytes, cuts: Sequence[int]) -> list[Chunk]:
    edges = [0, *cuts, len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    return [Chunk(piece) for piece in pieces if piece] or [Chunk(data)]


SYSTEMATIC: tuple[bytes, ...] = (
    encode_command("SET", "k", "value"),
    encode_command("GET", "k"),
    encode_command("GET", "k") + encode_command("SET", "k", "12") + encode_command("gEt", "k"),
    encode_command("GET", "k") + encode_command("APPEND", "k", "x") + encode_command("GET", "k"),
    encode_command("MULTI")
    + encode_command("SET", "k", "m")
    + encode_command("EXEC")
    + encode_command("GET", "k"),
)
"""Short streams that are cut and split at every byte."""


def systematic() -> Iterator[Stream]:
    """Each of SYSTEMATIC truncated at every byte, split in two at every byte, and sent byte by byte."""
    for data in SYSTEMATIC:
        for at in range(len(data)):
            yield Stream("truncated at every byte", [Chunk(data[:at])] if at else [])
            yield Stream("split at every byte", _cut(data, [at]), sentinel=True)
        yield Stream("byte by byte", [Chunk(data[at : at + 1]) for at in range(len(data))], sentinel=True)


# -- running --


@dataclass
class Report:
    """How many streams were played, of which kinds, and the differences found (complete texts)."""

    streams: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kinds.items()))
        found = len(self.differences)
        line = f"{self.streams} streams in {self.seconds:.1f} s ({kinds}): {found} differences"
        return "\n\n".join([line, *self.differences[:3]])


def prepare(target: Target, keys: Sequence[bytes]) -> None:
    """The same data on every server, and (where there is one) in the table."""
    with target.open() as sock:
        decoder = Decoder()

        def do(*args: bytes | str) -> object:
            sock.sendall(encode_command(*args))
            while True:
                reply = decoder.pop()
                if reply is not Decoder.INCOMPLETE:
                    assert not isinstance(reply, ErrorReply), (args, reply)
                    return reply
                decoder.feed(sock.recv(1 << 16))

        do("FLUSHALL")
        do("RPUSH", "list", "a", "b", "c")
        for number, key in enumerate(keys):
            if key not in (b"list", b""):
                do(
                    "SET",
                    key,
                    b"%d" % number if key == b"n1" else b"value of key %d " % number + bytes(range(40)),
                )
        for key in keys:
            if key != b"list":
                do("GET", key)


def compare(offloaded: Target, plain: Target, stream: Stream, report: Report, name: str) -> None:
    """Plays a stream on both servers and notes a difference."""
    got, expected = play(offloaded, stream), play(plain, stream)
    report.streams += 1
    report.kinds[stream.kind] = report.kinds.get(stream.kind, 0) + 1
    if not got.same(expected):
        report.differences.append(f"{name}: {stream}\n  offloaded: {got}\n  plain:     {expected}")


def run(
    offloaded: Target,
    plain: Target,
    streams: int,
    seed: int = 1,
    seconds: float = 3600.0,
    every_byte: bool = True,
    only: int | None = None,
    most: int = 3,
) -> Report:
    """Compares the servers on so many random streams (and SYSTEMATIC); stops after ``most`` differences."""
    report = Report()
    start = time.monotonic()
    if every_byte and only is None:
        for target in (offloaded, plain):
            prepare(target, [b"k"])
        for stream in systematic():
            compare(offloaded, plain, stream, report, "systematic")
            if len(report.differences) >= most:
                break
    for number in range(-(-streams // ROUND)) if only is None else (only,):
        if len(report.differences) >= most or time.monotonic() - start > seconds:
            break
        maker = Maker(f"{seed}/{number}")
        for target in (offloaded, plain):
            prepare(target, maker.keys)
        for _ in range(ROUND):
            compare(offloaded, plain, maker.stream(), report, f"seed {seed}, round {number}")
            if report.differences:
                # The two servers' data may differ from here on: only the first difference of a round counts.
                break
    report.seconds = time.monotonic() - start
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two redis-servers on the same byte streams.")
    parser.add_argument("--offloaded", type=int, required=True, help="port")
    parser.add_argument("--plain", type=int, required=True, help="port")
    parser.add_argument("--offloaded-pid", type=int, default=0, help="lets short sends happen")
    parser.add_argument("--plain-pid", type=int, default=0)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one round")
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        report = run(
            Target(args.offloaded, args.offloaded_pid),
            Target(args.plain, args.plain_pid),
            args.streams,
            args.seed,
            only=args.only,
        )
        print(report)
        return 1 if report.differences else 0
    return 130


if __name__ == "__main__":
    sys.exit(main())
