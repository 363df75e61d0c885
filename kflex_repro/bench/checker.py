"""A checker beside the load: a few connections, one model, every answer compared.

One thread drives several connections in turn, so the model is exact: whatever was acknowledged on one
connection must be seen by the next command on any other. That is what a stale entry, a lost SET or a reply
out of order breaks.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from kflex_repro.bench.load import PREFIX
from kflex_repro.patience import patient

CHECK_PREFIX = f"{PREFIX}chk:"
COHERENT_OPS = ("SET", "GET", "GET", "GET", "APPEND", "INCR", "DEL", "SET")
# In store mode the table is the only home of its keys: anything that passes makes an entry stale by design.
STORE_OPS = ("SET", "GET", "GET")
_KEPT = 20


@dataclass(frozen=True)
class Checked:
    """How many answers were compared, and how many were wrong (``examples``: the first few)."""

    ops: int
    mismatches: int
    examples: tuple[str, ...] = ()

    def __add__(self, other: Checked) -> Checked:
        examples = (*self.examples, *other.examples)[:_KEPT]
        return Checked(self.ops + other.ops, self.mismatches + other.mismatches, examples)


def encode(args: Sequence[bytes]) -> bytes:
    """A RESP array of bulk strings."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        parts.append(b"$%d\r\n%s\r\n" % (len(arg), arg))
    return b"".join(parts)


class Wire:
    """A blocking RESP2 connection that keeps replies as they are on the wire (``+OK``, ``:3``, ``$…``,
    ``-ERR``).
    """

    def __init__(self, host: str, port: int, timeout: float | None = None) -> None:
        self._sock = socket.create_connection((host, port), patient(10.0) if timeout is None else timeout)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def reply(self) -> bytes | None:
        """The next reply: a bulk's bytes (None for the null bulk), or the line with its type byte."""
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        if line[:1] != b"$":
            return line[:-2]
        length = int(line[1:])
        if length < 0:
            return None
        body = self._file.read(length + 2)
        if len(body) != length + 2:
            raise ConnectionError("the server closed the connection")
        return body[:-2]

    def ask(self, *args: bytes) -> bytes | None:
        self.send(encode(args))
        return self.reply()

    def close(self) -> None:
        for closable in (self._file, self._sock):
            with suppress(OSError):
                closable.close()


class Model:
    """What Redis must answer for string keys: SET, GET, APPEND, INCR, DEL."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}

    def apply(self, args: Sequence[bytes]) -> bytes | None:
        """The expected reply, as ``Wire.reply`` gives it; the model takes the command's effect."""
        op, key = args[0], args[1]
        if op == b"SET":
            self._values[key] = args[2]
            return b"+OK"
        if op == b"GET":
            return self._values.get(key)
        if op == b"APPEND":
            self._values[key] = self._values.get(key, b"") + args[2]
            return b":%d" % len(self._values[key])
        if op == b"DEL":
            return b":%d" % (self._values.pop(key, None) is not None)
        if op == b"INCR":
            try:
                number = int(self._values.get(key, b"0")) + 1
            except ValueError:
                return b"-ERR value is not an integer or out of range"
            self._values[key] = b"%d" % number
            return b":%d" % number
        raise ValueError(f"not modelled: {op!r}")


class Checker:
    """Compares ``rate`` answers per second against a model while it runs (``start`` … ``stop``).

    Writes only keys that begin with ``kflex:bench:chk:``. A connection that fails counts as one mismatch
    and ends the check. ``stop`` may be called more than once.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rate: float = 200.0,
        connections: int = 3,
        keys: int = 32,
        ops: Sequence[str] = COHERENT_OPS,
        seed: int | None = None,
    ) -> None:
        self._host, self._port = host, port
        self._period = 1.0 / rate
        self._connections = connections
        self._keys = [f"{CHECK_PREFIX}{index}".encode() for index in range(keys)]
        self._counters = [f"{CHECK_PREFIX}n{index}".encode() for index in range(max(1, keys // 4))]
        self._ops = tuple(ops)
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checker", daemon=True)
        self._ops_done = 0
        self._wrong: list[str] = []
        self._mismatches = 0

    def keys(self) -> list[bytes]:
        """Every key it may write."""
        return [*self._keys, *self._counters]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> Checked:
        """End the check and return what it found."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(patient(30.0))
        if self._thread.is_alive():
            self._note("the checker's connection hangs: no answer within 30 s")
        return Checked(self._ops_done, self._mismatches, tuple(self._wrong))

    def _note(self, text: str) -> None:
        self._mismatches += 1
        if len(self._wrong) < _KEPT:
            self._wrong.append(text)

    def _command(self) -> list[bytes]:
        op = self._random.choice(self._ops)
        if op == "INCR":
            return [b"INCR", self._random.choice(self._counters)]
        key = self._random.choice(self._keys + self._counters if op == "GET" else self._keys)
        if op in ("SET", "APPEND"):
            size = self._random.choice((1, 8, 64, 300)) if op == "SET" else 5
            return [op.encode(), key, self._random.randbytes(size).hex()[:size].encode()]
        return [op.encode(), key]

    def _run(self) -> None:
        wires: list[Wire] = []
        try:
            wires = [Wire(self._host, self._port) for _ in range(self._connections)]
            self._compare(wires)
        except (OSError, ValueError) as error:
            self._note(f"the checker's connection failed: {error}")
        finally:
            for wire in wires:
                wire.close()

    def _compare(self, wires: list[Wire]) -> None:
        model = Model()
        for wire in wires:
            # Also the request that the server answers itself before the offload may serve the connection.
            wire.ask(b"PING")
        if "DEL" in self._ops:
            wires[0].ask(b"DEL", *self.keys())
        else:
            # A DEL would pass, and the entries of an earlier check would stay in the table.
            for key in self.keys():
                model.apply([b"SET", key, b"0"])
                wires[0].ask(b"SET", key, b"0")
        due = time.monotonic()
        while not self._stop.is_set():
            command = self._command()
            expected = model.apply(command)
            answer = self._random.choice(wires).ask(*command)
            self._ops_done += 1
            if answer != expected:
                text = b" ".join(command)[:60].decode(errors="replace")
                self._note(f"{text}: expected {_short(expected)}, got {_short(answer)}")
            due += self._period
            pause = due - time.monotonic()
            if pause > 0:
                self._stop.wait(pause)
            else:
                due = time.monotonic()
        if "DEL" in self._ops:
            wires[0].ask(b"DEL", *self.keys())


def _short(reply: bytes | None) -> str:
    return "nil" if reply is None else repr(reply[:40].decode(errors="replace"))
