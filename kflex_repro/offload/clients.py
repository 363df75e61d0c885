"""Redis's own list of its clients: read in batches through the module, parsed, and judged for adoption."""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kflex_repro.bpf.btf import Btf
from kflex_repro.offload import link, netns
from kflex_repro.patience import patient

BATCH = 256
# struct kflex_tuple: client's and server's address (IPv4 as v4-mapped), their ports in host order.
TUPLE = struct.Struct("16s16sII")

# What a letter of CLIENT LIST's flags means for a connection that the kernel would serve; N, d (a watched key
# was touched: the next EXEC fails, which passes) and e (no-evict) are harmless, what is not here is unknown.
_FLAGS = {
    "S": "a replica",
    "O": "a MONITOR client",
    "M": "the master",
    "P": "subscribed",
    "x": "in MULTI",
    "b": "blocked",
    "t": "tracks keys",
    "R": "tracks keys",
    "B": "tracks keys",
    "c": "closing",
    "u": "just unblocked",
    "A": "closing",
    "U": "on a unix socket",
    "r": "readonly",
}
_NUMBERS = (
    *("db", "sub", "psub", "ssub", "multi", "redir"),
    *("qbuf", "argv-mem", "multi-mem", "obl", "oll", "omem"),
)
_HARMLESS = frozenset("Nde")
_PASSING = frozenset("xbucA")


@dataclass(frozen=True)
class Client:
    """A line of CLIENT LIST. ``key`` is its struct kflex_tuple, b"" when it is not a TCP connection."""

    id: int
    addr: str
    laddr: str
    key: bytes
    user: str
    name: str
    fields: dict[str, str]


@dataclass(frozen=True)
class Hindrance:
    """Why a client cannot be adopted; ``passing``: soon it may."""

    text: str
    passing: bool = False


@dataclass(frozen=True)
class Batch:
    """Clients by ascending id; ``cursor`` for the next batch, 0 at the end; how long Redis stood still."""

    clients: list[Client]
    cursor: int
    gil_ns: int


def parse(text: str) -> list[Client]:
    """The clients of a CLIENT LIST reply; lines without an id (there are none) are left out."""
    found = []
    for line in text.splitlines():
        # No value holds a space: Redis refuses them in names and users.
        fields = dict(part.partition("=")[::2] for part in line.split(" "))
        if not fields.get("id", "").isdigit():
            continue
        addr, laddr = fields.get("addr", ""), fields.get("laddr", "")
        found.append(
            Client(
                id=int(fields["id"]),
                addr=addr,
                laddr=laddr,
                key=_key(addr, laddr),
                user=fields.get("user", ""),
                name=fields.get("name", ""),
                fields=fields,
            )
        )
    return found


def _key(addr: str, laddr: str) -> bytes:
    try:
        (client, client_port), (server, server_port) = _address(addr), _address(laddr)
        return TUPLE.pack(client, server, client_port, server_port)
    except (ValueError, struct.error):
        return b""


def _address(text: str) -> tuple[bytes, int]:
    """``1.2.3.4:5`` or ``[::1]:5``; ValueError for a path."""
    host, _, port = text.rpartition(":")
    return packed(host.removeprefix("[").removesuffix("]")), int(port)


def packed(host: str) -> bytes:
    """An address as 16 bytes, IPv4 as v4-mapped."""
    parsed = ipaddress.ip_address(host)
    return parsed.packed if parsed.version == 6 else b"\0" * 10 + b"\xff\xff" + parsed.packed


def unpacked(address: bytes, port: int) -> str:
    """What CLIENT LIST would say of an address and a port."""
    parsed = ipaddress.IPv6Address(address)
    return f"{parsed.ipv4_mapped}:{port}" if parsed.ipv4_mapped else f"[{parsed}]:{port}"


def hindrance(client: Client) -> Hindrance | None:
    """Why this client must not be taken over as it is now; None when Redis holds nothing of it but its name.

    What CLIENT LIST cannot show: a request of which only ``*N`` has come (the next byte is then a ``$``,
    which demotes the connection at once), and CLIENT REPLY OFF (then no reply is ever counted, and nothing
    served).
    """
    fields = client.fields
    flags = fields.get("flags", "?")
    if not client.key:
        return Hindrance("on a unix socket" if "U" in flags or client.addr.startswith("/") else "no address")
    for flag in flags:
        if flag not in _HARMLESS:
            return Hindrance(_FLAGS.get(flag, f"flag {flag}"), flag in _PASSING)
    try:
        numbers = {name: int(fields[name]) for name in _NUMBERS}
    except (KeyError, ValueError) as error:
        return Hindrance(f"CLIENT LIST of this server does not say {error}")
    if numbers["db"]:
        return Hindrance(f"in database {numbers['db']}", passing=False)
    if numbers["sub"] or numbers["psub"] or numbers["ssub"]:
        return Hindrance("subscribed")
    if numbers["redir"] != -1:
        return Hindrance("tracks keys")
    if numbers["multi"] != -1 or numbers["multi-mem"]:
        return Hindrance("in MULTI", passing=True)
    if numbers["qbuf"] or numbers["argv-mem"]:
        return Hindrance("a request is half sent", passing=True)
    if numbers["obl"] or numbers["oll"] or numbers["omem"] or fields.get("events") != "r":
        return Hindrance("replies are not sent yet", passing=True)
    return None


def batch(
    run_id: str,
    btf: Btf,
    cursor: int = 0,
    count: int = BATCH,
    timeout: float | None = None,
    where: netns.Namespace | None = None,
) -> Batch:
    """The next ``count`` clients with ids above ``cursor``; ``where`` as for link.call().

    ConnectionError when no such server listens, KflexError when it does not answer.
    """
    seconds = patient(5.0) if timeout is None else timeout
    fd = os.memfd_create("kflex-clients", os.MFD_CLOEXEC)
    try:
        answer = link.call(run_id, "KFLEX_CLIENTS", btf, [fd], seconds, where, cursor=cursor, count=count)
        link.require(answer, "list its clients")
        size = os.fstat(fd).st_size
        text = os.pread(fd, size, 0).decode(errors="replace") if size else ""
    finally:
        os.close(fd)
    return Batch(parse(text), answer.cursor, answer.gil_ns)


def everyone(run_id: str, btf: Btf, where: netns.Namespace | None = None) -> Iterator[Client]:
    """All clients, batch by batch: those that come meanwhile are in it, those that go may be."""
    cursor = 0
    while True:
        part = batch(run_id, btf, cursor, where=where)
        yield from part.clients
        if not part.cursor:
            return
        cursor = part.cursor
