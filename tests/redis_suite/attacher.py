"""Attaches the offload to the suite's servers as they come, and counts what it served when they go.

Servers are announced by hooks.tcl, a line each over TCP: ``attach PORT PID`` or ``gone PORT PID``. The answer
comes when it is done (or cannot be), so a test's own connections are made to an attached server.
"""

from __future__ import annotations

import collections
import contextlib
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kflex_repro import build
from kflex_repro.errors import KflexError
from kflex_repro.offload import attach
from kflex_repro.offload import session as offload

TABLE_BYTES = 8 << 20
# A server that does not answer by then (its test may want that) is left alone.
PATIENCE_S = 3.0
# Of the module: what must never happen.
PROMISES = ("open_commands", "refused")


@dataclass
class Count:
    """What happened in a run: servers, how many were attached and why others were not, requests."""

    servers: int = 0
    attached: int = 0
    not_attached: collections.Counter[str] = field(default_factory=collections.Counter)
    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    trouble: list[str] = field(default_factory=list)
    """Sessions that could not be taken off."""

    @property
    def served(self) -> int:
        return self.requests["served_get"] + self.requests["served_set"]

    @property
    def broken_promises(self) -> dict[str, int]:
        return {name: self.requests[name] for name in PROMISES if self.requests[name]}

    def as_dict(self) -> dict[str, Any]:
        return {
            "trouble": self.trouble,
            "servers": self.servers,
            "attached": self.attached,
            "not_attached": dict(self.not_attached),
            "served": self.served,
            **{name: self.requests[name] for name in ("served_get", "served_set", "passed", *PROMISES)},
        }


def alive(pid: int) -> bool:
    """Whether the process runs (the suite reaps its servers late)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _state(port: int) -> str:
    """``ready``, ``loading``, or why it cannot be asked; ConnectionError while it is not there."""
    client = redis.Redis(port=port, socket_timeout=PATIENCE_S, retry=Retry(NoBackoff(), 0))
    try:
        return "loading" if client.info("persistence").get("loading") else "ready"
    except redis.exceptions.AuthenticationError:
        return "wants a password"
    except redis.exceptions.TimeoutError:
        return "does not answer"
    except redis.exceptions.ConnectionError as error:
        raise ConnectionError(str(error)) from None
    except redis.exceptions.RedisError as error:
        return f"answers {str(error)[:40]}"
    finally:
        client.close()


class Attacher:
    """The sessions of one run. ``built`` None: the servers are looked at, nothing is attached."""

    def __init__(self, built: build.Built | None) -> None:
        self.count = Count()
        self._built = built
        self._sessions: dict[int, offload.Session] = {}
        self._seen: set[int] = set()
        self._lock = threading.RLock()

    def attach(self, port: int, pid: int) -> str:
        """Attach, unless this very process was seen before; what came of it."""
        with self._lock:
            if pid in self._seen:
                return "as before"
            self._seen.add(pid)
            self.count.servers += 1
            self._collect(port)
            state = self._wait(port, pid)
            if state == "ready" and self._built is not None:
                try:
                    self._sessions[port] = attach.start(port, table_bytes=TABLE_BYTES, built=self._built)
                    self.count.attached += 1
                except KflexError as error:
                    state = error.what
            if state != "ready":
                self.count.not_attached[state] += 1
            return state

    def _wait(self, port: int, pid: int) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while alive(pid):
            with contextlib.suppress(ConnectionError):
                return _state(port)
            if time.monotonic() > deadline:
                return "does not listen"
            time.sleep(0.01)
        return "exited"

    def gone(self, port: int, _pid: int) -> str:
        with self._lock:
            self._collect(port)
        return "ok"

    def _collect(self, port: int) -> None:
        """Count and take off what is attached at this port."""
        session = self._sessions.pop(port, None)
        if session is None:
            return
        self.count.requests.update(session.stats())
        try:
            session.stop(force=True)
        except KflexError as error:
            self.count.trouble.append(str(error))

    def close(self) -> None:
        """Take everything off."""
        with self._lock:
            for port in list(self._sessions):
                self._collect(port)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


@contextlib.contextmanager
def listening(attacher: Attacher) -> Iterator[int]:
    """Serve hooks.tcl's requests at a port of 127.0.0.1; takes everything off at the end."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            what, port, pid = self.rfile.readline().decode().split()
            answer = {"attach": attacher.attach, "gone": attacher.gone}[what](int(port), int(pid))
            self.wfile.write(f"{answer}\n".encode())

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()
            attacher.close()
