"""Open-loop load at a fixed rate: ``python -m kflex_repro.bench.rate_worker SPEC`` (see load.py).

Request ``k`` is due at ``start + k / rate`` whether or not earlier ones were answered; it goes out on the
first free connection, and its latency runs from the moment it was due. A server that stalls therefore shows
the stall in every request that fell into it, not in one per connection.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import select
import socket
import struct
import sys
import time
from array import array
from collections import deque

from kflex_repro.bench.load import numbered_key
from kflex_repro.bench.stats import percentile

_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_TIMER_ABSTIME = 1
_CLOCK_MONOTONIC = 1
# Requests that are this late when the schedule ends are given up (and counted as errors by the caller's
# timeout).
_DRAIN_S = 5.0


class Alarm:
    """A timerfd: epoll's own timeout is in whole milliseconds, twenty requests at 20,000/s."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = int(self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def at(self, monotonic_ns: int) -> None:
        seconds, nanoseconds = divmod(max(1, monotonic_ns), 1_000_000_000)
        spec = struct.pack("qqqq", 0, 0, seconds, nanoseconds)
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, spec, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")


def reply_size(data: bytes | bytearray) -> int:
    """Length of the first reply (a simple string, an error, an integer or a bulk string) in ``data``.

    0: incomplete.
    """
    end = data.find(b"\r\n")
    if end < 0:
        return 0
    if data[:1] != b"$":
        return end + 2
    length = int(data[1:end])
    total = end + 2 if length < 0 else end + 2 + length + 2
    return total if len(data) >= total else 0


def _connect(spec: dict[str, object]) -> socket.socket:
    if spec["unix_path"]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(spec["unix_path"]))
    else:
        sock = socket.create_connection((str(spec["host"]), int(str(spec["port"]))))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The offload serves a connection only after the server itself answered once on it.
    sock.sendall(b"*1\r\n$4\r\nPING\r\n")
    if sock.recv(64) != b"+PONG\r\n":
        raise OSError("the server did not answer PING")
    sock.setblocking(False)
    return sock


class Generator:
    """One run: ``run()`` returns the latencies in ns, in order of completion, and the seconds it took."""

    def __init__(self, spec: dict[str, object]) -> None:
        self.keys = int(str(spec["keys"]))
        self.rate = int(str(spec["rate"]))
        self.total = int(self.rate * float(str(spec["seconds"])))
        self.op = str(spec["op"])
        value = "x" * int(str(spec["value_bytes"]))
        self._tail = f"${len(value)}\r\n{value}\r\n" if self.op == "SET" else ""
        self._head = f"*{3 if self.op == 'SET' else 2}\r\n$3\r\n{self.op}\r\n"
        self.sockets = [_connect(spec) for _ in range(int(str(spec["clients"])))]

    def _request(self) -> bytes:
        key = numbered_key(random.randrange(self.keys))
        return f"{self._head}${len(key)}\r\n{key}\r\n{self._tail}".encode()

    def run(self) -> tuple[array[int], float]:
        alarm = Alarm()
        epoll = select.epoll()
        epoll.register(alarm.fd, select.EPOLLIN)
        by_fd = {sock.fileno(): sock for sock in self.sockets}
        for fd in by_fd:
            epoll.register(fd, select.EPOLLIN)
        free = deque(self.sockets)
        due_of: dict[int, int] = {}
        partial: dict[int, bytearray] = {}
        latencies = array("q")
        clock = time.monotonic_ns
        step = 1_000_000_000 / self.rate
        start = clock() + 1_000_000
        sent = 0
        limit = start + int(self.total * step) + int(_DRAIN_S * 1e9)
        while len(latencies) < self.total:
            now = clock()
            due = start + int(sent * step)
            while sent < self.total and due <= now and free:
                sock = free.popleft()
                due_of[sock.fileno()] = due
                # One small request on an idle connection: the send buffer has room for it.
                sock.sendall(self._request())
                sent += 1
                due = start + int(sent * step)
            if sent < self.total and free:
                alarm.at(due)
            elif now > limit:
                raise TimeoutError(f"{self.total - len(latencies)} requests were never answered")
            for fd, _events in epoll.poll(_DRAIN_S):
                if fd == alarm.fd:
                    os.read(fd, 8)
                    continue
                sock = by_fd[fd]
                data = partial.setdefault(fd, bytearray())
                received = sock.recv(65536)
                if not received:
                    raise ConnectionError("the server closed the connection")
                data += received
                if reply_size(data):
                    if data[:1] == b"-":
                        raise OSError(f"the server answered {data[:80]!r}")
                    latencies.append(clock() - due_of[fd])
                    data.clear()
                    free.append(sock)
        return latencies, (clock() - start) / 1e9


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        generator = Generator(spec)
        print("ready", flush=True)
        if not sys.stdin.readline():
            return 1
        gc.disable()
        latencies, seconds = generator.run()
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    ordered = sorted(latencies)
    outcome = {
        "ops": len(ordered),
        "rps": len(ordered) / seconds,
        "p50_ms": percentile(ordered, 0.5) / 1e6,
        "p99_ms": percentile(ordered, 0.99) / 1e6,
        "p999_ms": percentile(ordered, 0.999) / 1e6,
    }
    print(json.dumps(outcome), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
