"""CLIENT LIST, parsed and judged; what `offload status --connections` says of each connection."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kflex_repro.offload import adopt, clients, connections

LINE = (
    "id=7 addr=127.0.0.1:50001 laddr=127.0.0.1:6379 fd=9 name= age=3 idle=1 flags=N db=0 sub=0 psub=0 ssub=0 "
    "multi=-1 qbuf=0 qbuf-free=20474 argv-mem=0 multi-mem=0 rbs=1024 rbp=5 obl=0 oll=0 omem=0 tot-mem=22400 "
    "events=r cmd=get user=default redir=-1 resp=2"
)


def client(**changed: str) -> clients.Client:
    """A client at rest, but for these fields (``argv_mem`` for argv-mem)."""
    fields = dict(part.split("=", 1) for part in LINE.split(" "))
    fields.update({name.replace("_", "-"): value for name, value in changed.items()})
    (found,) = clients.parse(" ".join(f"{name}={value}" for name, value in fields.items()) + "\n")
    return found


def test_a_client_at_rest() -> None:
    found = client(name="web-1", user="app")
    assert (found.id, found.addr, found.user, found.name) == (7, "127.0.0.1:50001", "app", "web-1")
    assert clients.hindrance(found) is None
    mapped = b"\0" * 10 + b"\xff\xff\x7f\0\0\1"
    assert found.key == mapped + mapped + (50001).to_bytes(4, "little") + (6379).to_bytes(4, "little")


def test_ipv6_and_paths() -> None:
    six = client(addr="[::1]:50001", laddr="[::1]:6379")
    assert clients.TUPLE.unpack(six.key)[0] == b"\0" * 15 + b"\1"
    assert clients.unpacked(b"\0" * 15 + b"\1", 5) == "[::1]:5"
    assert clients.unpacked(clients.packed("10.0.0.1"), 5) == "10.0.0.1:5"
    unix = client(addr="/tmp/redis.sock:0", laddr="/tmp/redis.sock:0", flags="U")
    assert unix.key == b""
    wrong = clients.hindrance(unix)
    assert wrong is not None and wrong.text == "on a unix socket"
    assert client(addr="?:0").key == b""
    assert client(addr="").key == b""


@pytest.mark.parametrize(
    ("field", "value", "why", "passing"),
    [
        ("flags", "P", "subscribed", False),
        ("flags", "S", "a replica", False),
        ("flags", "O", "a MONITOR client", False),
        ("flags", "x", "in MULTI", True),
        ("flags", "b", "blocked", True),
        ("flags", "t", "tracks keys", False),
        ("flags", "eA", "closing", True),
        ("flags", "T", "flag T", False),
        ("db", "3", "in database 3", False),
        ("ssub", "1", "subscribed", False),
        ("multi", "0", "in MULTI", True),
        ("qbuf", "14", "a request is half sent", True),
        ("argv_mem", "3", "a request is half sent", True),
        ("obl", "5", "replies are not sent yet", True),
        ("omem", "16400", "replies are not sent yet", True),
        ("events", "rw", "replies are not sent yet", True),
        ("redir", "0", "tracks keys", False),
    ],
)
def test_who_is_not_at_rest(field: str, value: str, why: str, passing: bool) -> None:
    wrong = clients.hindrance(client(**{field: value}))
    assert wrong == clients.Hindrance(why, passing)


def test_a_server_that_says_less_is_not_trusted() -> None:
    found = client()
    for name in ("argv-mem", "multi", "oll", "redir"):
        fields = {key: value for key, value in found.fields.items() if key != name}
        less = clients.Client(1, "", "", found.key, "default", "", fields)
        wrong = clients.hindrance(less)
        assert wrong is not None and name in wrong.text


def test_harmless_flags() -> None:
    assert clients.hindrance(client(flags="de")) is None


def test_lines_that_are_none() -> None:
    assert clients.parse("") == []
    assert clients.parse("\r\nERR nonsense\n") == []
    assert [found.id for found in clients.parse(f"{LINE}\n{LINE.replace('id=7', 'id=8')}\n")] == [7, 8]


@pytest.mark.parametrize(
    ("release", "version", "safe"),
    [
        ("6.18.5", "#1 SMP", True),
        ("6.5.0-1-amd64", "#1 SMP", True),
        ("6.1.0-56-cloud-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-01-01)", True),
        ("6.1.0-10-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.37-1 (2023-07-03)", False),
        ("6.1.20", "#1 SMP", False),
        ("6.4.16", "#1 SMP", False),
        ("5.15.0", "#1 SMP", False),
    ],
)
def test_kernels_where_the_iterator_locks_twice(release: str, version: str, safe: bool) -> None:
    assert (adopt.kernel_hindrance(release, version) == "") is safe


# -- status --

CONSTANTS = {
    "KFLEX_C_DEMOTED": 1,
    "KFLEX_C_MULTI": 2,
    "KFLEX_S_DEMOTED": 1,
    "KFLEX_S_OWNED": 2,
    "KFLEX_USER_NONE": 63,
}
COMMON = connections.Common("", frozenset({0}), 63, 512, CONSTANTS)


def conn(**changed: Any) -> SimpleNamespace:
    """What the kernel says of the client above, served, but for these fields."""
    address = (ctypes.c_uint8 * 16)(*clients.packed("127.0.0.1"))
    fields = {
        "cflags": 0,
        "sflags": 2,
        "paired": 1,
        "requests": 1,
        "idle": 0,
        "user": 0,
        "adopted": 1,
        "served": 10,
        "passed": 2,
        "client": address,
        "server": address,
        "ports": 50001 << 16 | 6379,
        "name": b"GET\0\0",
    }
    return SimpleNamespace(**{**fields, **changed})


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"cflags": 1, "name": b"SUBSCRIBE\0"}, "demoted: its last command was SUBSCRIBE"),
        ({"cflags": 1, "name": b"\0"}, "demoted: framing not followed"),
        ({"cflags": 1, "idle": 513}, "parked: no GET or SET among its last 512 messages"),
        ({"sflags": 3}, "demoted: its replies could not be followed"),
        ({"paired": 0}, "its server socket is not known"),
        ({"user": 63}, "user default may not GET and SET every key"),
        ({"user": 5}, "user default may not GET and SET every key"),
        ({"requests": 0}, "new: its first request always passes"),
        ({"sflags": 0}, "new: its first request always passes"),
        ({"cflags": 2}, "in MULTI"),
    ],
)
def test_why_it_passes(changed: dict[str, Any], why: str) -> None:
    (row,) = connections.join([conn(**changed)], [client()], COMMON)
    assert (row.state, row.why) == ("passing" if why else "served", why)


def test_what_only_one_side_knows() -> None:
    stranger = client(id="8", addr="10.0.0.9:4000", laddr="10.0.0.1:6379")
    rows = connections.join([conn()], [client(), stranger], COMMON)
    assert [row.state for row in rows] == ["served", "passing"]
    assert rows[1].why.startswith("not adopted: of another host")
    # Redis was not asked: the kernel's are shown. It was, and does not know it: it is closing.
    assert [row.client for row in connections.join([conn()], None, COMMON)] == ["127.0.0.1:50001"]
    assert connections.join([conn()], [], COMMON) == []
    forbidden = connections.Common("forbidden by replica", frozenset({0}), 63, 512, CONSTANTS)
    assert connections.summary(connections.join([conn()], [client()], forbidden)) == {
        "served": 0,
        "forbidden by replica": 1,
    }


def test_the_table() -> None:
    rows = connections.join([conn()], [client(), client(id="8", addr="10.0.0.9:4000", db="1")], COMMON)
    before = {"127.0.0.1:50001": connections.join([conn(served=4)], None, COMMON)[0]}
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(connections.render(rows, before, 2.0), connections.reasons(rows))
    text = capture.get()
    assert "2 connections: 1 served, 1 passing" in text
    assert "served (adopted)" in text
    assert " 3 " in text  # (10 - 4) / 2 s
    assert text.count("not adopted: in database 1") == 2
    with console.capture() as capture:
        console.print(connections.render(rows, limit=1))
    assert "and 1 more" in capture.get()


def test_what_an_adoption_says() -> None:
    done = adopt.Adoption(adopted=3, already=2, seconds=0.5, gil_ms_max=0.25, gil_ms=0.75)
    done.passing["subscribed"] = 2
    assert str(done) == (
        "adopted 3 connections in 0.50 s, Redis held for at most 0.25 ms at a time, 2 are enrolled already\n"
        "not adopted: 2 (subscribed)"
    )
    assert done.as_dict()["passing"] == {"subscribed": 2}
    assert str(adopt.Adoption(unavailable="why")) == "not adopted: why"
