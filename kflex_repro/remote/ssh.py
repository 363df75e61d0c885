"""A connection to a host by SSH: who it is, that it is the one we know, and what to do if not."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import re
import shlex
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko

from kflex_repro.errors import KflexError

# Tries of one connection, and the wait after the first failed one (s; doubles).
TRIES = 3
_PAUSE_S = 0.5

# Its messages are for its developers; what the user needs is in our errors.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


@dataclass(frozen=True)
class Target:
    """A host and how to log in there; ``name`` is what it is called in messages."""

    name: str
    addresses: tuple[tuple[str, int], ...]
    user: str
    identities: tuple[str, ...] = ()
    password: str | None = field(default=None, repr=False)
    connect_s: float = 10.0


def parse(text: str, identities: tuple[str, ...] = ()) -> Target:
    """``USER@HOST[:PORT]`` (IPv6 in brackets), completed from ~/.ssh/config. KflexError if it is none."""
    user, at, rest = text.rpartition("@")
    host, port = address(rest, text)
    if at and not user:
        raise KflexError(f"no user before the @ of {text!r}", "--host", "USER@HOST[:PORT]")
    config = _config(host)
    for option in ("proxyjump", "proxycommand"):
        if config.get(option, "none") != "none":
            raise KflexError(
                f"{host} is reached by {option} in ~/.ssh/config, which is not supported",
                "--host",
                f"forward a port: ssh -N -L 2222:localhost:22 {host}, then --host USER@localhost:2222",
            )
    wanted = port if port is not None else int(config.get("port", 22))
    configured = tuple(one for one in config.get("identityfile", []) if Path(one).is_file())
    return Target(
        text,
        ((config.get("hostname", host), wanted),),
        user or config.get("user") or getpass.getuser(),
        identities or configured,
    )


def address(text: str, whole: str = "") -> tuple[str, int | None]:
    """``HOST[:PORT]`` as (host, port or None)."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:@\[\]/]+))(?::(\d{1,5}))?", text)
    host = (match[1] or match[2]) if match else ""
    if match is None or host.startswith("-") or (match[3] and not 0 < int(match[3]) < 65536):
        raise KflexError(f"no host: {whole or text!r}", "--host", "USER@HOST[:PORT], [IPv6]:PORT")
    return host, int(match[3]) if match[3] else None


def _config(host: str) -> Any:
    path = Path("~/.ssh/config").expanduser()
    if not path.is_file():
        return {}
    try:
        return paramiko.SSHConfig.from_path(str(path)).lookup(host)
    except (OSError, ValueError, paramiko.SSHException) as error:
        raise KflexError(f"cannot read it: {error}", str(path), "correct that line") from None


# --- host keys --------------------------------------------------------------------------------------------


def known_hosts() -> list[Path]:
    """The files of known host keys; the first is the user's."""
    return [Path("~/.ssh/known_hosts").expanduser(), Path("/etc/ssh/ssh_known_hosts")]


def _entry(host: str, port: int) -> str:
    return host if port == 22 else f"[{host}]:{port}"


class _Refuse(paramiko.MissingHostKeyPolicy):
    """A host key that is not in known_hosts: never accepted, always explained."""

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        kind = key.get_name().removeprefix("ssh-").split("-")[0]
        line = f"{hostname} {key.get_name()} {key.get_base64()}"
        path = known_hosts()[0]
        make = "" if path.parent.is_dir() else "mkdir -p -m 700 ~/.ssh && "
        raise KflexError(
            f"the host key is not known: {key.get_name()} {key.fingerprint}",
            hostname,
            f"compare that with `ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub` on the host; if they "
            f"are the same, accept it: {make}echo '{line}' >> ~/.ssh/known_hosts",
        )


def _changed(where: str, offered: paramiko.PKey, known: paramiko.PKey) -> KflexError:
    return KflexError(
        f"THE HOST KEY HAS CHANGED: known is {known.get_name()} {known.fingerprint}, "
        f"offered {offered.get_name()} {offered.fingerprint}; someone may be in between; nothing was sent",
        where,
        f"if the host was installed anew, and its key compared: ssh-keygen -R '{where}', then again",
    )


# --- connecting -------------------------------------------------------------------------------------------


class Link:
    """A logged-in connection; ``again`` makes it anew."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.client = _connected(target)

    def again(self) -> None:
        """Connect anew: TRIES times, then KflexError."""
        self.close()
        self.client = _connected(self.target)

    def close(self) -> None:
        """Close it; whatever ran over it sees its end."""
        with contextlib.suppress(Exception):
            self.client.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connected(target: Target) -> paramiko.SSHClient:
    failed: list[str] = []
    pause = _PAUSE_S
    for left in reversed(range(TRIES)):
        failed.clear()
        for host, port in target.addresses:
            try:
                return _connect(target, host, port)
            except (OSError, EOFError, paramiko.SSHException) as error:
                failed.append(f"{_entry(host, port)}: {_why(error)}")
                if isinstance(error, socket.gaierror):
                    left = 0
        if not left:
            break
        time.sleep(pause)
        pause *= 2
    raise KflexError(
        f"cannot connect: {'; '.join(failed)}", target.name, "is the host up, and its sshd on that port?"
    )


def _why(error: BaseException) -> str:
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        return " / ".join({one.strerror or str(one) for one in error.errors.values()})
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, EOFError):
        return "it closed the connection"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _connect(target: Target, host: str, port: int) -> paramiko.SSHClient:
    """One try at one address. KflexError where another try would end the same."""
    client = paramiko.SSHClient()
    for path in known_hosts():
        try:
            if path.is_file():
                client.load_system_host_keys(str(path))
        except (OSError, ValueError, paramiko.SSHException) as error:
            raise KflexError(f"cannot read it: {error}", str(path), "correct or remove that line") from None
    client.set_missing_host_key_policy(_Refuse())
    for identity in target.identities:
        _readable(Path(identity).expanduser())
    seconds = target.connect_s
    try:
        client.connect(
            host,
            port,
            target.user,
            password=target.password,
            key_filename=[str(Path(one).expanduser()) for one in target.identities] or None,
            # A key that was chosen is the one meant; an agent full of others would use up the tries.
            allow_agent=not target.identities,
            look_for_keys=not target.identities,
            timeout=seconds,
            banner_timeout=seconds,
            auth_timeout=3 * seconds,
            channel_timeout=seconds,
        )
    except BaseException as error:
        client.close()
        if isinstance(error, paramiko.BadHostKeyException):
            raise _changed(_entry(host, port), error.key, error.expected_key) from None
        if refused := _not_let_in(error, target):
            raise refused from None
        raise
    transport = client.get_transport()
    assert transport is not None
    transport.set_keepalive(15)
    return client


def _readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise KflexError(
            f"cannot read the key: {error.strerror}", str(path), "choose another --identity"
        ) from None


def _not_let_in(error: BaseException, target: Target) -> KflexError | None:
    """The error for a login that failed; None if it is not about the login."""
    keys = ", ".join(target.identities) or "the agent's and ~/.ssh/id_*"
    if isinstance(error, paramiko.PasswordRequiredException):
        return KflexError(
            "the key has a passphrase", keys, "unlock it in an agent: ssh-add, or use another --identity"
        )
    no_keys = isinstance(error, paramiko.SSHException) and "No authentication methods" in str(error)
    if not (isinstance(error, paramiko.AuthenticationException) or no_keys):
        return None
    tried = f"keys: {keys}" + ("; and the password" if target.password is not None else "")
    if isinstance(error, paramiko.BadAuthenticationType):
        tried += f"; it accepts {', '.join(error.allowed_types)}"
    return KflexError(
        f"login as {target.user} refused ({tried})",
        target.name,
        f"add the key there with ssh-copy-id, choose one with --identity, or use --password-prompt; "
        f"try: ssh {shlex.quote(target.user)}@{target.addresses[0][0]} -p {target.addresses[0][1]} true",
    )


def ask_password(target: Target) -> str:
    """From the terminal, never shown. KflexError where there is none."""
    if not os.isatty(0):
        raise KflexError("--password-prompt needs a terminal", target.name, "use a key, or an agent")
    return getpass.getpass(f"password of {target.user} on {target.name}: ")
