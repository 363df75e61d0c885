"""The two servers that a scenario compares, and the offload's switch.

``own_bed``: two redis-servers of ours (one plain, one with kflex.so and a session). ``attached_bed``: the
user's server, compared with itself, offload off and on. The session is suspended whenever the offload is
not the one being measured, so that plain Redis is measured without a single hook in the system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import redis

from kflex_repro.bench.checker import Wire, encode
from kflex_repro.bench.load import (
    COUNTERS,
    LISTS,
    PREFIX,
    Target,
    counter_key,
    list_key,
    numbered_key,
    short_key,
)
from kflex_repro.bench.netns import VethPair, inside
from kflex_repro.errors import KflexError
from kflex_repro.patience import patient

_BATCH = 500


class Session(Protocol):
    """What the benchmark needs of an offload session."""

    def stats(self) -> Mapping[str, int]: ...

    def suspend(self) -> None: ...

    def resume(self) -> None: ...

    def reset_max(self) -> None: ...

    def stop(self, timeout: float | None = None) -> None: ...


@dataclass(frozen=True)
class Endpoint:
    """A server. ``load_host`` is where load is sent (another address than ``host`` for clients over veth)."""

    host: str
    port: int
    unix_path: str | None
    pid: int | None
    load_host: str
    client_netns: str | None = None

    def target(self, arm: str) -> Target:
        """Where the load of ``arm`` (baseline, unix or offload) goes."""
        unix = self.unix_path if arm == "unix" else None
        return Target(self.load_host, self.port, unix, self.client_netns)


@dataclass(eq=False)
class Bed:
    """A place to run scenarios in; ``session`` is suspended unless ``offload_on`` was the last call."""

    baseline: Endpoint
    offload: Endpoint
    session: Session
    redis_version: str
    redis_args: tuple[str, ...]
    mode: str = "coherent"
    notes: list[str] = field(default_factory=list)
    _on: bool = False
    _filled: dict[str, tuple[int, int]] = field(default_factory=dict)

    def endpoint(self, arm: str) -> Endpoint:
        return self.offload if arm == "offload" else self.baseline

    def endpoints(self) -> tuple[Endpoint, ...]:
        return (self.baseline,) if self.baseline == self.offload else (self.baseline, self.offload)

    def offload_on(self) -> None:
        """Put the hooks on; connections made from now on are enrolled."""
        if not self._on:
            self.session.resume()
            self.session.reset_max()
            self._on = True

    def offload_off(self) -> None:
        """Take the system-wide hooks off."""
        if self._on:
            self.session.suspend()
            self._on = False

    def served(self) -> int:
        """Requests answered in the kernel so far."""
        stats = self.session.stats()
        return stats.get("served_get", 0) + stats.get("served_set", 0)

    def passed(self) -> int:
        """Requests handed on to Redis so far."""
        return self.session.stats().get("passed", 0)

    def oldest_set_ms(self) -> float | None:
        """How long an accepted SET waited at most until Redis had it since offload_on(), in ms.

        None where the module does not tell.
        """
        with suppress(redis.RedisError, OSError):
            with self._client(self.offload) as client:
                info = client.info("kflex")
            value = info.get("kflex_dirty_age_us_max")
            if isinstance(value, int | float):
                return value / 1000
        return None

    def _client(self, endpoint: Endpoint) -> redis.Redis:
        return redis.Redis(host=endpoint.host, port=endpoint.port, socket_timeout=patient(30))

    def fill(self, family: str, keys: int, value_bytes: int) -> None:
        """SET ``keys`` keys of ``value_bytes`` bytes on every server, past the offload (which is switched
        off).
        """
        if self._filled.get(family) == (keys, value_bytes):
            return
        self.offload_off()
        self._filled[family] = (keys, value_bytes)
        value = b"x" * value_bytes
        for endpoint in self.endpoints():
            with self._wire(endpoint) as wire:
                for batch in _batches(family_keys(family, keys)):
                    wire.send(b"".join(encode([b"SET", key, value]) for key in batch))
                    for _ in batch:
                        answer = wire.reply()
                        if answer != b"+OK":
                            raise KflexError(f"the server refused a SET, {answer!r}", f"port {endpoint.port}")

    def delete(self, keys: Sequence[bytes], endpoint: Endpoint) -> None:
        with self._wire(endpoint) as wire:
            for batch in _batches(keys):
                wire.ask(b"UNLINK", *batch)

    @contextmanager
    def _wire(self, endpoint: Endpoint) -> Iterator[Wire]:
        wire = Wire(endpoint.host, endpoint.port, patient(60.0))
        try:
            yield wire
        finally:
            wire.close()

    def clean(self) -> None:
        """Delete every key that the benchmark may have written (all begin with ``kflex:bench:``)."""
        self.offload_off()
        for endpoint in self.endpoints():
            for family, (keys, _size) in self._filled.items():
                self.delete(family_keys(family, keys), endpoint)
            for family in ("counters", "lists"):
                self.delete(family_keys(family, 0), endpoint)


def family_keys(family: str, keys: int) -> list[bytes]:
    """The keys of one family: ``numbered`` and ``short`` hold ``keys`` each, counters and lists a fixed
    number.
    """
    if family == "counters":
        return [counter_key(index).encode() for index in range(COUNTERS)]
    if family == "lists":
        return [list_key(index).encode() for index in range(LISTS)]
    name = {"numbered": numbered_key, "short": short_key}[family]
    return [name(index).encode() for index in range(keys)]


def _batches(items: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def server_args(command: Sequence[str]) -> tuple[str, ...]:
    """What a result says about a server's command line: without the places of this one run."""
    places = ("--port", "--dir", "--unixsocket", "--unixsocketperm")
    kept: list[str] = []
    words = iter(command[1:])
    for word in words:
        if word in places:
            next(words, None)
        else:
            kept.append(Path(word).name if word.endswith(".so") else word)
    return tuple(kept)


def _version_of(client: redis.Redis) -> str:
    return str(client.info("server").get("redis_version", "?"))


# --- beds -----------------------------------------------------------------------------------------


@contextmanager
def own_bed(
    *,
    mode: str = "coherent",
    aof: bool = False,
    port: int | None = None,
    veth: VethPair | None = None,
    built: Any = None,
) -> Iterator[Bed]:
    """Two redis-servers of our own, on free ports (``port``: the offloaded one's), both with a unix socket.

    With ``veth`` both servers live in its server namespace and load comes from its client namespace; the
    calling thread stays inside the server namespace until the bed is left.
    """
    from kflex_repro.offload import attach
    from kflex_repro.redis.server import ManagedServer

    bind = f"127.0.0.1 {veth.server_host}" if veth else "127.0.0.1"
    # Only our own namespaces can reach the veth address.
    args: tuple[str, ...] = ("--protected-mode", "no") if veth else ()
    if aof:
        args += ("--appendonly", "yes", "--appendfsync", "everysec")
    with ExitStack() as stack:
        stack.enter_context(inside(veth.server_ns if veth else None))
        plain = stack.enter_context(ManagedServer(args=args, unix=True, bind=bind))
        if mode == "coherent":
            if built is None:
                from kflex_repro.build import objects

                built = objects.ensure()
            served = stack.enter_context(
                ManagedServer(args=args, module=built.module, port=port, unix=True, bind=bind)
            )
        else:
            served = stack.enter_context(ManagedServer(args=args, port=port, unix=True, bind=bind))
        session = attach.start(served.port, mode=mode, built=built)
        stack.callback(session.stop)
        session.suspend()

        def endpoint(server: Any) -> Endpoint:
            load_host = veth.server_host if veth else "127.0.0.1"
            netns = veth.client_ns if veth else None
            return Endpoint("127.0.0.1", server.port, str(server.unix_path), server.pid, load_host, netns)

        with plain.client() as client:
            version = _version_of(client)
        yield Bed(endpoint(plain), endpoint(served), session, version, server_args(served.args), mode)


def parse_host_port(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[V6]:PORT`` or ``:PORT``; KflexError (exit code 2) for anything else."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise KflexError(f"{text!r} is not HOST:PORT", fix="for example --attach 127.0.0.1:6379", exit_code=2)
    return host, int(port)


def _local_pid(pid: object) -> int | None:
    """``pid`` if it is a redis-server on this machine, as this process sees pids."""
    if not isinstance(pid, int):
        return None
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None
    return pid if name.startswith(("redis", "valkey")) else None


@contextmanager
def attached_bed(host: str, port: int) -> Iterator[Bed]:
    """The user's server at ``host:port``, as it is.

    The module must be loaded in it; keys of ours are deleted after.
    """
    from kflex_repro.offload import attach
    from kflex_repro.offload import session as offload

    client = redis.Redis(host=host, port=port, socket_timeout=patient(10), socket_connect_timeout=patient(5))
    where = f"{host}:{port}"
    try:
        server = client.info("server")
        unix = client.config_get("unixsocket").get("unixsocket") or None
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise KflexError(
            f"the server wants a login, {error}", where, "benchmark one whose default user may do everything"
        ) from error
    except redis.ConnectionError as error:
        raise KflexError("no server answers", where, "is redis-server running there?") from error
    except redis.TimeoutError as error:
        raise KflexError("the server does not answer in time", where) from error
    except redis.ResponseError:
        # CONFIG may be forbidden: then there is no unix socket to compare with.
        server, unix = client.info("server"), None
    except redis.RedisError as error:
        raise KflexError(f"not a usable Redis, {error}", where) from error
    finally:
        client.close()
    if isinstance(unix, bytes):
        unix = unix.decode()
    if unix is not None and not os.access(unix, os.R_OK | os.W_OK):
        unix = None
    existing = offload.find(port)
    if existing is not None:
        raise KflexError(
            "the offload is already attached there",
            where,
            f"run `kflex-repro offload stop --port {port}` first",
        )
    session = attach.start(port, host=host)
    try:
        session.suspend()
        endpoint = Endpoint(host, port, unix, _local_pid(server.get("process_id")), host)
        note = (
            f"attached to {where}: both sides are that server with kflex.so loaded, hooks off and on; "
            f"only keys that begin with {PREFIX} were written, and deleted again"
        )
        bed = Bed(endpoint, endpoint, session, str(server.get("redis_version", "?")), (), notes=[note])
        try:
            yield bed
        finally:
            with suppress(redis.RedisError, OSError, KflexError):
                bed.clean()
    finally:
        session.stop()
