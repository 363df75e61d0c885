"""The redis-server at a port: is it there, is it one we know, is the module in it, which process is it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kflex_repro.errors import KflexError
from kflex_repro.offload import netns
from kflex_repro.patience import patient

_NO_LOGIN = (
    "give it: --askpass, or in the environment variable REDISCLI_AUTH (--user NAME for another than default)"
)
LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Login:
    """As whom the toolkit talks to a server."""

    user: str = "default"
    password: str = field(default="", repr=False)


@dataclass(frozen=True)
class Target:
    """What INFO says of a server: ``software`` is Redis or Valkey, ``version`` its own; ``module_abi`` is
    None without our module, ``pid`` is as it sees itself.

    ``config`` is its configuration file, "" if it was started without.
    """

    host: str
    port: int
    software: str
    version: str
    run_id: str
    pid: int
    module_abi: int | None
    attached: bool
    where: netns.Namespace
    config: str = ""

    @property
    def version_numbers(self) -> tuple[int, ...]:
        """``version`` as far as it is numbers."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version.partition("-")[0]))

    @property
    def server_id(self) -> str:
        """Name of this incarnation: the directory of its pins. Each network namespace has its own ports."""
        name = f"{self.port}-{self.run_id[:12]}"
        return name if self.where.is_first else f"{name}-{self.where.inode}"


def probe(
    port: int,
    host: str = "127.0.0.1",
    timeout: float | None = None,
    login: Login | None = None,
    inside: netns.Namespace | None = None,
) -> Target:
    """Ask the server at ``host:port`` who it is, after ``login`` if given.

    ``inside`` is the network namespace where that address is the server's (None: ours). KflexError for
    whatever is not a usable Redis, or does not let us in.
    """
    namespace = inside or netns.here()
    seconds = patient(3.0) if timeout is None else timeout
    return netns.call(namespace, lambda: _probe(port, host, seconds, login, namespace))


def _probe(port: int, host: str, timeout: float, login: Login | None, namespace: netns.Namespace) -> Target:
    where = f"{host}:{port}" + ("" if namespace.inode == netns.here().inode else f" in {namespace.path}")
    client = redis.Redis(
        host=host,
        port=port,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
        protocol=2,
        # With the user's name, because a default user without a password refuses an AUTH that names nobody.
        username=login.user if login else None,
        password=login.password if login else None,
    )
    try:
        server = client.info("server")
        module = client.info("kflex")
    except redis.exceptions.AuthenticationError as error:
        if login:
            raise KflexError(
                f"the server does not let user {login.user!r} in: {error}",
                where,
                "check --user and the password",
            ) from None
        raise KflexError("the server wants a password", where, _NO_LOGIN) from None
    except redis.exceptions.NoPermissionError as error:
        raise KflexError(
            f"user {login.user if login else 'default'!r} may not ask who the server is: {error}",
            where,
            "give that user +info, or take another one: --user NAME",
        ) from None
    except redis.exceptions.TimeoutError:
        raise KflexError(
            f"no answer within {timeout:g} s", where, "is it busy, paused, or not a Redis (TLS port)?"
        ) from None
    except redis.exceptions.ConnectionError as error:
        text = str(error)
        if "refused" in text:
            raise KflexError("nothing listens there", where, _elsewhere(port)) from None
        raise KflexError(
            f"no plain Redis there: {text}", where, "TLS ports and other protocols cannot be offloaded"
        ) from None
    except (redis.exceptions.RedisError, ValueError) as error:
        if str(error).startswith("BUSY"):
            raise KflexError(
                "the server is busy running a script", where, "wait for its end, or: redis-cli SCRIPT KILL"
            ) from None
        raise KflexError(f"not a Redis: {error}", where, "give the --port of a redis-server") from None
    finally:
        client.close()
    if not isinstance(server, dict) or "redis_version" not in server or "run_id" not in server:
        raise KflexError("not a Redis: INFO has no redis_version and run_id", where)
    abi = module.get("kflex_abi") if isinstance(module, dict) else None
    return Target(
        host=host,
        port=port,
        # Valkey calls itself a Redis 7.2.4 besides.
        software="Valkey" if "valkey_version" in server else "Redis",
        version=str(server.get("valkey_version", server["redis_version"])),
        run_id=str(server["run_id"]),
        pid=int(server["process_id"]),
        module_abi=int(abi) if abi is not None else None,
        attached=bool(module.get("kflex_attached", 0)) if isinstance(module, dict) else False,
        where=namespace,
        config=str(server.get("config_file", "")),
    )


def _elsewhere(port: int) -> str:
    """What to do when nothing listens on a port here."""
    pids = netns.listeners_elsewhere(port)
    if not pids:
        return "start redis-server, or give its --port"
    names = " or ".join(f"--pid {pid}" for pid in pids[:4])
    return f"something in another network namespace (a container?) listens on this port: {names}"


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of ``pid`` (/proc/PID/stat field 22); KflexError when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        raise KflexError(f"no process {pid}", "/proc", "did the server end just now?") from None
    return int(stat.rpartition(")")[2].split()[19])
