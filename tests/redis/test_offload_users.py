"""Passwords and ACL: who is served, as whom, from when until when.

Each story is told to two servers at once, ours and a plain one: the replies are the same, and the kernel
serves exactly those whose user may GET or SET every key.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis
import redis.asyncio

from kflex_repro import build
from kflex_repro.offload import attach
from kflex_repro.offload.target import Login, probe
from kflex_repro.redis.resp import ErrorReply, Map, Reply, encode_command, encode_pipeline, strictly_equal
from kflex_repro.redis.server import ManagedServer
from tests.redis.harness import (
    PLAIN_ONLY,
    Conn,
    Sut,
    cli,
    eventually,
    need_offload,
    offloaded_server,
    plain_server,
    rng,
)

pytestmark = pytest.mark.bpf

PASSWORD = "open-sesame"
Word = bytes | str | int
Command = Sequence[Word]


class Both:
    """A connection to each of the two servers; both are told the same and must answer the same."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.ours, self.theirs = lab.sut.connect(), lab.twin.connect()

    def same(self) -> Reply:
        """The next reply, of both."""
        ours, theirs = self.ours.read(), self.theirs.read()
        assert strictly_equal(without_identity(ours), without_identity(theirs)), (ours, theirs)
        return ours

    def do(self, *args: Word) -> Reply:
        return self.send_bytes(encode_command(*args))[0]

    def pipeline(self, *commands: Command) -> list[Reply]:
        return self.send_bytes(encode_pipeline(commands), replies=len(commands))

    def send_bytes(self, data: bytes, *at: int, replies: int = 1) -> list[Reply]:
        """Bytes in several messages, cut at these offsets, and so many replies."""
        for conn in (self.ours, self.theirs):
            conn.split(data, *at)
        return [self.same() for _ in range(replies)]

    def ok(self, *args: Word) -> None:
        reply = self.do(*args)
        assert reply == b"OK", reply

    def refused(self, code: str, *args: Word) -> None:
        reply = self.do(*args)
        assert isinstance(reply, ErrorReply), reply
        assert reply.code == code

    def login(self, user: Word = "default", password: Word = PASSWORD) -> Both:
        self.ok("AUTH", user, password)
        return self

    def hello(self, *args: Word) -> Reply:
        reply = self.do("HELLO", *args)
        assert not isinstance(reply, ErrorReply), reply
        return reply

    # --- who answers ---------------------------------------------------------------------------------------

    def served(self, get: bool = True, set_: bool = True) -> None:
        """GETs, SETs of this connection are served in the kernel from now on; the others pass."""
        if get:
            self.do("GET", "k")
            self.lab.sut.must_serve(self.ours, ("GET", "k"))
        if set_:
            self.do("SET", "k", "v")
            self.lab.sut.must_serve(self.ours, ("SET", "k", "v"))
        commands = ([] if get else [("GET", "k")]) + ([] if set_ else [("SET", "k", "v")])
        if commands:
            self.passes(*commands)

    def passes(self, *commands: Command, rounds: int = 10) -> None:
        """None of these is served in the kernel; the replies are those of plain Redis."""
        before = self.lab.sut.served()
        for _ in range(rounds):
            for command in commands or (("GET", "k"), ("SET", "k", "v")):
                self.do(*command)
        assert self.lab.sut.served() == before

    def closed(self) -> bool:
        return self.ours.closed() and self.theirs.closed()

    def gone(self) -> bool:
        """Whether Redis has hung up, on both (what is there to read between two replies is its end)."""
        ends = [not conn.quiet() for conn in (self.ours, self.theirs)]
        return any(ends) and self.closed()

    def hang_up(self) -> None:
        self.ours.close()
        self.theirs.close()


def without_identity(reply: Reply) -> Reply:
    """HELLO's reply names the connection and the modules: what is left is to be the same, also in EXEC's."""
    if isinstance(reply, Map) and reply and reply[0][0] == b"server":
        return Map(pair for pair in reply if pair[0] not in (b"id", b"modules"))
    if isinstance(reply, list) and reply[:1] == [b"server"]:
        pairs = zip(reply[::2], reply[1::2], strict=True)
        return [word for pair in pairs if pair[0] not in (b"id", b"modules") for word in pair]
    if type(reply) is list:
        return [without_identity(part) for part in reply]
    return reply


class Lab:
    """The two servers, and an administrator on each."""

    def __init__(self, sut: Sut, twin: Sut) -> None:
        self.sut, self.twin = sut, twin
        self.admin = Both(self)
        if sut.server.password is not None:
            self.admin.login()
        # Of its own name, so that the default user can be changed.
        self.admin.ok("ACL", "SETUSER", "admin", "on", "nopass", "~*", "&*", "+@all")
        self.admin.login("admin", "any")
        self.admin.ok("SET", "k", "v")

    def connect(self) -> Both:
        return Both(self)

    def user(self, name: Word, *rules: str) -> None:
        """Makes a user with this password and these rules, from nothing."""
        self.admin.ok("ACL", "SETUSER", name, "reset", "on", f">{PASSWORD}", *rules)

    def rules(self) -> tuple[str, ...]:
        return self.sut.session.rules if self.sut.offloaded else ()


@contextlib.contextmanager
def laboratory(
    args: Sequence[str] = (), twin_args: Sequence[str] | None = None, **kw: object
) -> Iterator[Lab]:
    with (
        offloaded_server(args, **kw) as sut,
        plain_server(args if twin_args is None else twin_args, password=kw.get("password")) as twin,
    ):
        yield Lab(sut, twin)
        sut.hang_up()
        twin.hang_up()
        assert sut.broken_promises() == {}


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Sut, Sut]]:
    with laboratory(password=PASSWORD) as lab:
        yield lab.sut, lab.twin


@pytest.fixture
def lab(servers: tuple[Sut, Sut]) -> Iterator[Lab]:
    """Two servers with a password, and no other users than default and admin."""
    made = Lab(*servers)
    yield made
    for name in made.admin.do("ACL", "USERS"):
        if name not in (b"default", b"admin"):
            made.admin.do("ACL", "DELUSER", name)
    made.admin.ok("ACL", "SETUSER", "default", "reset", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    for sut in servers:
        sut.hang_up()
    assert servers[0].broken_promises() == {}


# -- a server with a password --


def test_a_connection_is_served_from_its_auth_on(lab: Lab) -> None:
    conn = lab.connect()
    conn.refused("NOAUTH", "GET", "k")
    conn.refused("NOAUTH", "SET", "k", "stolen")
    conn.passes()
    conn.ok("AUTH", PASSWORD)
    conn.served()
    assert conn.do("GET", "k") == b"v"
    assert lab.rules() == ()


def test_auth_with_the_users_name(lab: Lab) -> None:
    lab.connect().login("default").served()


def test_a_wrong_password(lab: Lab) -> None:
    """It lets nobody in, and does not take away what was there: AUTH that fails changes nothing."""
    conn = lab.connect()
    conn.refused("WRONGPASS", "AUTH", "guess")
    conn.refused("WRONGPASS", "AUTH", "nobody", PASSWORD)
    conn.passes()
    conn.login()
    conn.served()
    conn.refused("WRONGPASS", "AUTH", "guess")
    conn.refused("WRONGPASS", "AUTH", "nobody", PASSWORD)
    conn.served()


@pytest.mark.parametrize("args", [(), ("a", "b", "c"), ("a", "b", "c", "d")], ids=len)
def test_auth_with_the_wrong_number_of_arguments(lab: Lab, args: tuple[str, ...]) -> None:
    conn = lab.connect()
    conn.refused("ERR", "AUTH", *args)
    conn.passes()
    conn.login()
    conn.refused("ERR", "AUTH", *args)
    conn.served()


@pytest.mark.parametrize("version", ["2", "3"])
@pytest.mark.parametrize(
    "options",
    [
        ("AUTH", "default", PASSWORD),
        ("auth", "default", PASSWORD, "setname", "me"),
        ("SETNAME", "me", "AUTH", "default", PASSWORD),
        ("AUTH", "other", PASSWORD, "AUTH", "default", PASSWORD),
        ("SETNAME", "AUTH", "AUTH", "default", PASSWORD, "SETNAME", "AUTH"),
    ],
    ids=" ".join,
)
def test_hello_with_auth(lab: Lab, version: str, options: tuple[str, ...]) -> None:
    lab.user("other", "~k", "+get")
    conn = lab.connect()
    conn.hello(version, *options)
    conn.do("CLIENT", "GETNAME")
    assert conn.do("ACL", "WHOAMI") == b"default"
    conn.served()


def test_hello_without_auth(lab: Lab) -> None:
    """Before AUTH it is refused; afterwards it changes the protocol and nothing else."""
    conn = lab.connect()
    for args in ((), ("3",), ("2", "SETNAME", "me")):
        conn.refused("NOAUTH", "HELLO", *args)
        conn.passes()
    conn.login()
    for args in ((), ("3",), ("3", "SETNAME", "me"), ("2",)):
        conn.hello(*args)
        conn.served()


def test_hello_with_a_wrong_password(lab: Lab) -> None:
    conn = lab.connect()
    conn.refused("WRONGPASS", "HELLO", "3", "AUTH", "default", "guess")
    conn.passes()
    conn.hello("3", "AUTH", "default", PASSWORD)
    conn.served()
    # Whether it failed at the password or behind it cannot be told: nothing is served until the next AUTH.
    conn.refused("WRONGPASS", "HELLO", "3", "AUTH", "default", "guess")
    conn.passes()
    conn.login()
    conn.served()


def test_hello_that_authenticates_and_then_fails(lab: Lab) -> None:
    """Redis has changed the user although the reply is an error."""
    lab.user("other", "~*", "+get", "+acl")
    conn = lab.connect().login()
    conn.served()
    conn.refused("ERR", "HELLO", "3", "AUTH", "other", PASSWORD, "SETNAME", "not a name")
    assert conn.do("ACL", "WHOAMI") == b"other"
    conn.refused("NOPERM", "SET", "k", "w")
    conn.passes()


@pytest.mark.parametrize("option", [b"AUTH\0", b"auth\0x"], ids=repr)
def test_an_option_of_hello_that_redis_reads_up_to_its_nul(lab: Lab, option: bytes) -> None:
    lab.user("other", "~*", "+get", "+acl")
    conn = lab.connect().login()
    conn.served()
    conn.hello("2", option, "other", PASSWORD)
    assert conn.do("ACL", "WHOAMI") == b"other"
    conn.refused("NOPERM", "SET", "k", "w")
    conn.passes()


@pytest.mark.parametrize(
    "args", [("9",), ("x",), ("3", "AUTH", "default"), ("3", "SETNAME"), ("3", "NO", "x")]
)
def test_hello_that_is_wrong(lab: Lab, args: tuple[str, ...]) -> None:
    conn = lab.connect()
    assert isinstance(conn.do("HELLO", *args), ErrorReply)
    conn.passes()


def test_hello_with_more_options_than_anyone_has(lab: Lab) -> None:
    lab.user("other", "~*", "+get", "+acl")
    conn = lab.connect().login()
    conn.hello("2", *("SETNAME", "me") * 150, "AUTH", "other", PASSWORD)
    assert conn.do("ACL", "WHOAMI") == b"other"
    conn.passes()


# -- how it arrives --


def test_auth_and_more_in_one_message(lab: Lab) -> None:
    conn = lab.connect()
    replies = conn.pipeline(
        ("AUTH", PASSWORD), ("SELECT", "0"), ("CLIENT", "SETNAME", "me"), ("SET", "k", "w"), ("GET", "k")
    )
    assert replies == [b"OK", b"OK", b"OK", b"OK", b"w"]
    conn.served()


def test_requests_before_auth_in_one_message(lab: Lab) -> None:
    conn = lab.connect()
    replies = conn.pipeline(("GET", "k"), ("HELLO", "3", "AUTH", "default", PASSWORD), ("GET", "k"))
    assert isinstance(replies[0], ErrorReply)
    assert replies[2] == b"v"
    conn.served()


def test_a_pipeline_that_changes_the_user_in_its_middle(lab: Lab) -> None:
    lab.user("reader", "~*", "+get")
    conn = lab.connect().login()
    replies = conn.pipeline(("SET", "k", "w"), ("AUTH", "reader", PASSWORD), ("SET", "k", "x"), ("GET", "k"))
    assert isinstance(replies[2], ErrorReply)
    assert replies[3] == b"w"
    conn.served(set_=False)


def test_two_auths_in_one_message(lab: Lab) -> None:
    """More than is kept track of: such a connection is not served any more, whoever it is then."""
    lab.user("reader", "~*", "+get")
    conn = lab.connect()
    assert conn.pipeline(("AUTH", PASSWORD), ("AUTH", "reader", PASSWORD)) == [b"OK", b"OK"]
    conn.refused("NOPERM", "SET", "k", "x")
    conn.passes()


def test_auth_split_anywhere(lab: Lab) -> None:
    """Served afterwards if the command's name and the user's each came in one piece with their lengths."""
    lab.user("somebody", "~*", "+get", "+set")
    data = encode_command("AUTH", "somebody", PASSWORD)
    whole = [range(data.index(word), data.index(word) + len(word)) for word in (b"AUTH", b"somebody")]
    for cut in range(1, len(data)):
        conn = lab.connect()
        assert conn.send_bytes(data, cut) == [b"OK"]
        if any(cut in inside for inside in whole):
            conn.passes(rounds=2)
        else:
            conn.served()
        lab.sut.connections.pop().close()
        lab.twin.connections.pop().close()


def test_hello_byte_by_byte(lab: Lab) -> None:
    lab.user("other", "~*", "+get", "+acl")
    for data in (
        encode_command("HELLO", "2", "SETNAME", "me", "AUTH", "other", PASSWORD),
        encode_command("AUTH", "other", PASSWORD),
    ):
        conn = lab.connect().login()
        conn.send_bytes(data, *range(1, len(data)))
        assert conn.do("ACL", "WHOAMI") == b"other"
        conn.refused("NOPERM", "SET", "k", "x")


def test_auth_inside_a_transaction(lab: Lab) -> None:
    """Its reply is QUEUED, and what came of it is in EXEC's: too much to follow."""
    lab.user("reader", "~*", "+get", "+multi", "+exec")
    conn = lab.connect().login()
    conn.served()
    conn.ok("MULTI")
    assert conn.do("AUTH", "reader", PASSWORD) == b"QUEUED"
    assert conn.do("EXEC") == [b"OK"]
    conn.refused("NOPERM", "SET", "k", "x")
    conn.passes()


def test_a_transaction_that_its_user_may_not_discard(lab: Lab) -> None:
    """It stays open, and everything is queued. One that is discarded is over."""
    lab.user("stuck", "~*", "+@all", "-discard")
    conn = lab.connect().login("stuck")
    conn.served()
    conn.ok("MULTI")
    conn.refused("NOPERM", "DISCARD")
    for _ in range(5):
        assert conn.do("GET", "k") == b"QUEUED"
    conn.refused("EXECABORT", "EXEC")
    conn.do("GET", "k")
    free = lab.connect().login()
    free.ok("MULTI")
    free.ok("DISCARD")
    free.served()
    free.refused("ERR", "DISCARD")
    free.served()


def test_a_transaction_that_its_user_may_not_execute(lab: Lab) -> None:
    lab.user("stuck", "~*", "+@all", "-exec")
    conn = lab.connect().login("stuck")
    conn.ok("MULTI")
    assert conn.do("SET", "k", "w") == b"QUEUED"
    conn.refused("EXECABORT", "EXEC")
    conn.served()


def test_multi_before_auth(lab: Lab) -> None:
    conn = lab.connect()
    conn.refused("NOAUTH", "MULTI")
    conn.login()
    conn.do("GET", "k")
    conn.do("SET", "k", "v")


# -- other users --


@pytest.mark.parametrize(
    ("rules", "get", "set_"),
    [
        (("~*", "+get", "+set"), True, True),
        (("~*", "+@all"), True, True),
        (("allkeys", "+@all", "-@dangerous"), True, True),
        (("~*", "+get"), True, False),
        (("~*", "+@all", "-set"), True, False),
        (("~*", "+set"), False, True),
        (("%R~*", "+@all"), True, False),
        (("%W~*", "+@all"), False, True),
        (("%R~*", "%W~*", "+@all"), True, True),
        (("%R~*", "~other:*", "+@all"), True, False),
        (("~k*", "+@all"), False, False),
        (("~?*", "+@all"), False, False),
        (("~*", "+ping"), False, False),
        (("+@all",), False, False),
        (("~*", "+get|k", "+set|k"), False, False),
        (("~*", "+get", "(~* +set)"), False, False),
        (("~*", "(~k* +get +set)"), False, False),
        (("~k", "+get", "(~* +get +set)"), False, False),
        (("~*", "+@all", "(~k +get)"), True, True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_what_a_user_may_do_is_what_is_served(
    lab: Lab, rules: tuple[str, ...], get: bool, set_: bool
) -> None:
    """Those that may do it with some keys only ask Redis. Selectors count where they add nothing."""
    lab.user("somebody", *rules)
    conn = lab.connect().login("somebody")
    conn.served(get, set_)
    for command in (("GET", "k"), ("GET", "other:k"), ("SET", "k", "v"), ("SET", "other:k", "v"), ("PING",)):
        conn.do(*command)


def test_a_connection_changes_its_user_and_back(lab: Lab) -> None:
    lab.user("reader", "~*", "+get")
    lab.user("keyless", "+@all")
    conn = lab.connect().login()
    for _ in range(5):
        conn.served()
        conn.login("reader")
        conn.refused("NOPERM", "SET", "k", "w")
        conn.served(set_=False)
        conn.login("keyless")
        conn.refused("NOPERM", "GET", "k")
        conn.passes()
        conn.login()
        conn.ok("SET", "k", "v")


def test_each_connection_is_its_own_users(lab: Lab) -> None:
    lab.user("reader", "~*", "+get")
    writer, reader, stranger = lab.connect().login(), lab.connect().login("reader"), lab.connect()
    for _ in range(5):
        writer.served()
        reader.served(set_=False)
        stranger.passes()


def test_reset_ends_it(lab: Lab) -> None:
    conn = lab.connect().login()
    conn.served()
    assert conn.do("RESET") == b"RESET"
    conn.refused("NOAUTH", "GET", "k")
    conn.passes()


# -- rights that come and go --


def test_rights_are_taken_and_given_while_connected(lab: Lab) -> None:
    """From the very moment on in which ACL SETUSER is answered."""
    lab.user("somebody", "~*", "+get", "+set")
    conn = lab.connect().login("somebody")
    for _ in range(3):
        conn.served()
        lab.admin.ok("ACL", "SETUSER", "somebody", "-set")
        conn.refused("NOPERM", "SET", "k", "w")
        conn.served(set_=False)
        lab.admin.ok("ACL", "SETUSER", "somebody", "resetkeys", "~k")
        conn.refused("NOPERM", "GET", "other")
        conn.served(get=False, set_=False)
        lab.admin.ok("ACL", "SETUSER", "somebody", "allkeys", "-get", "+set")
        conn.refused("NOPERM", "GET", "k")
        conn.served(get=False)
        lab.admin.ok("ACL", "SETUSER", "somebody", "+get")


def test_rights_flip_quickly(lab: Lab) -> None:
    lab.user("somebody", "~*", "+get", "+set")
    conn = lab.connect().login("somebody")
    conn.served()
    for number in range(300):
        lab.admin.ok("ACL", "SETUSER", "somebody", "-get", "-set")
        conn.refused("NOPERM", "GET", "k")
        conn.refused("NOPERM", "SET", "k", "w")
        lab.admin.ok("ACL", "SETUSER", "somebody", "+get", "+set")
        conn.ok("SET", "k", number)
        assert conn.do("GET", "k") == b"%d" % number
    conn.served()


def test_rights_are_taken_in_a_transaction(lab: Lab) -> None:
    lab.user("somebody", "~*", "+get", "+set")
    conn = lab.connect().login("somebody")
    conn.served()
    lab.admin.pipeline(("MULTI",), ("ACL", "SETUSER", "somebody", "-get"), ("EXEC",))
    conn.refused("NOPERM", "GET", "k")
    conn.served(get=False)


@pytest.mark.skipif(PLAIN_ONLY, reason="there is nothing to start on a plain server")
def test_rights_are_taken_by_what_was_queued_before_the_start() -> None:
    """The module did not see it go into the transaction, but sees its EXEC."""
    need_offload()
    built = build.ensure()
    with ManagedServer(module=built.module) as server, Conn(server.port) as admin:
        assert admin.pipeline(("MULTI",), ("ACL", "SETUSER", "default", "-get")) == [b"OK", b"QUEUED"]
        with attach.start(server.port, table_bytes=64 << 20, built=built) as session:
            sut = Sut(server, session)
            conn = sut.connect()
            sut.must_serve(conn, ("SET", "k", "v"))
            assert admin.do("EXEC") == [b"OK"]
            assert isinstance(conn.do("GET", "k"), ErrorReply)
            assert not sut.serves_get(conn, "k")
            sut.must_serve(conn, ("SET", "k", "v"))
            sut.hang_up()


def test_transactions_are_not_suspected_for_ever(lab: Lab) -> None:
    """An EXEC may run what was queued, and stops service for a moment, but only while anybody is in MULTI."""
    if not lab.sut.offloaded:
        pytest.skip("a plain server stops nothing")
    lab.admin.ok("CONFIG", "SET", "slowlog-max-len", "100")
    conn = lab.connect().login()

    def unsuspected() -> bool:
        before = lab.sut.session._ctl.default_open
        conn.pipeline(("MULTI",), ("GET", "k"), ("EXEC",))
        return lab.sut.session._ctl.default_open == before

    eventually(unsuspected, timeout=10, every=0.05, what="an EXEC that is taken for harmless")


def test_the_default_user_is_restricted_and_set_free(lab: Lab) -> None:
    conn = lab.connect().login()
    conn.served()
    lab.admin.ok("ACL", "SETUSER", "default", "-set")
    conn.refused("NOPERM", "SET", "k", "w")
    conn.served(set_=False)
    lab.admin.ok("ACL", "SETUSER", "default", "+set")
    conn.served()


def test_a_deleted_user_is_cut_off(lab: Lab) -> None:
    lab.user("somebody", "~*", "+get", "+set")
    conn = lab.connect().login("somebody")
    conn.served()
    assert lab.admin.do("ACL", "DELUSER", "somebody") == 1
    assert conn.closed()
    # The next one of that name has rights of his own.
    lab.user("somebody", "~*", "+set")
    lab.connect().login("somebody").served(get=False)


def test_a_user_that_is_switched_off(lab: Lab) -> None:
    """Connections that have logged in go on, new ones are not let in."""
    lab.user("somebody", "~*", "+get", "+set")
    conn = lab.connect().login("somebody")
    conn.served()
    lab.admin.ok("ACL", "SETUSER", "somebody", "off")
    conn.served()
    stranger = lab.connect()
    stranger.refused("WRONGPASS", "AUTH", "somebody", PASSWORD)
    stranger.passes()
    lab.admin.ok("ACL", "SETUSER", "somebody", "on")
    stranger.login("somebody").served()


def test_the_default_user_is_switched_off(lab: Lab) -> None:
    conn = lab.connect().login()
    lab.admin.ok("ACL", "SETUSER", "default", "off", "nopass")
    conn.served()
    stranger = lab.connect()
    stranger.refused("NOAUTH", "GET", "k")
    stranger.refused("WRONGPASS", "AUTH", "default", PASSWORD)
    stranger.passes()
    lab.admin.ok("ACL", "SETUSER", "default", "on")
    stranger.served()


def test_nobody_may_do_anything(lab: Lab) -> None:
    conn = lab.connect().login()
    lab.admin.ok("ACL", "SETUSER", "default", "resetkeys")
    lab.admin.ok("ACL", "SETUSER", "admin", "resetkeys")
    try:
        conn.refused("NOPERM", "GET", "k")
        conn.passes()
        if lab.sut.offloaded:
            eventually(lambda: lab.rules() == ("auth",), what=f"the rule auth; {lab.rules()}")
    finally:
        lab.admin.ok("ACL", "SETUSER", "admin", "~*")
        lab.admin.ok("ACL", "SETUSER", "default", "~*")
    conn.served()
    assert lab.rules() == ()


def test_acl_load(tmp_path: Path) -> None:
    """A file that gives, takes and forgets users; in Redis 7.0 their connections end with any ACL LOAD."""
    names = [tmp_path / "ours.acl", tmp_path / "theirs.acl"]

    def write(*users: str) -> None:
        for path in names:
            path.touch(mode=0o600)
            path.write_text("".join(f"user {user}\n" for user in users))

    default = f"default on >{PASSWORD} ~* &* +@all"
    write(default, "somebody on nopass ~* +get +set", "reader on nopass ~* +get")
    with laboratory(["--aclfile", str(names[0])], ["--aclfile", str(names[1])], password=PASSWORD) as lab:
        root = lab.connect().login()
        root.served()
        lab.connect().login("somebody").served()
        conn = lab.connect().login("reader")
        conn.served(set_=False)
        write(default, "somebody on nopass ~k +get +set", "admin on nopass ~* &* +@all")
        root.ok("ACL", "LOAD")
        assert conn.closed()
        root.served()
        lab.connect().login("somebody").passes()
        lab.connect().refused("WRONGPASS", "AUTH", "reader", "any")
        write(default, "somebody on nopass ~* +get +set", "broken on ~* +nosuchcommand")
        assert isinstance(root_load(root), ErrorReply)
        lab.connect().login("somebody").passes()
        write(default.replace("+@all", "+@all -set"), "somebody on nopass ~* +get +set")
        root.ok("ACL", "LOAD")
        root.refused("NOPERM", "SET", "k", "w")
        root.served(set_=False)
        lab.connect().login("somebody").served()


def root_load(root: Both) -> Reply:
    """ACL LOAD whose error names the file, which differs between the two."""
    replies = [conn.do("ACL", "LOAD") for conn in (root.ours, root.theirs)]
    assert type(replies[0]) is type(replies[1])
    return replies[0]


# -- a password that comes and goes --


@pytest.fixture(scope="module")
def open_servers() -> Iterator[tuple[Sut, Sut]]:
    with laboratory() as lab:
        yield lab.sut, lab.twin


@pytest.fixture
def open_lab(open_servers: tuple[Sut, Sut]) -> Iterator[Lab]:
    """Two servers without a password, as Redis comes."""
    made = Lab(*open_servers)
    yield made
    made.admin.ok("CONFIG", "SET", "requirepass", "")
    for sut in open_servers:
        sut.hang_up()
    assert open_servers[0].broken_promises() == {}


def test_a_server_gets_a_password(open_lab: Lab) -> None:
    """Connections that exist go on, new ones must AUTH; without it again everybody is welcome."""
    lab = open_lab
    old, silent = lab.connect(), lab.connect()
    old.served()
    lab.admin.ok("CONFIG", "SET", "requirepass", PASSWORD)
    new = lab.connect()
    old.served()
    # Accepted before, heard of only now.
    silent.served()
    new.refused("NOAUTH", "GET", "k")
    new.passes()
    old.refused("WRONGPASS", "AUTH", "guess")
    old.served()
    new.ok("AUTH", PASSWORD)
    new.served()
    lab.admin.ok("CONFIG", "SET", "requirepass", "")
    for conn in (old, new, silent, lab.connect()):
        conn.served()


def test_who_came_while_there_was_a_password(open_lab: Lab) -> None:
    """Redis remembers of each connection whether it had to log in when it came, and has not."""
    lab = open_lab
    lab.admin.ok("CONFIG", "SET", "requirepass", PASSWORD)
    conn, silent = lab.connect(), lab.connect()
    conn.refused("NOAUTH", "GET", "k")
    silent.refused("NOAUTH", "PING")
    for _ in range(3):
        lab.admin.ok("CONFIG", "SET", "requirepass", "")
        conn.served()
        silent.served()
        lab.admin.ok("CONFIG", "SET", "requirepass", PASSWORD)
        conn.refused("NOAUTH", "GET", "k")
        conn.passes()
    conn.ok("AUTH", PASSWORD)
    conn.served()


def test_an_answer_from_between_two_passwords_proves_nothing(open_lab: Lab) -> None:
    """A request that is sent while there is a password, executed while there is none, and answered when there
    is one again (replies leave last in an iteration) does not make its connection one that has logged in."""
    lab = open_lab
    lab.admin.ok("CONFIG", "SET", "requirepass", PASSWORD)
    conn = lab.connect()
    conn.refused("NOAUTH", "GET", "k")
    sleeper, opener, closer = (lab.connect().login("admin", "any") for _ in range(3))
    between = []
    # Redis's epoll may still hold the last that it answered as the first to look at, until it has slept.
    lab.admin.do("PING")
    for side in ("ours", "theirs"):
        # All but the first come while Redis sleeps: it finds them at once, in this order.
        getattr(sleeper, side).send("DEBUG", "SLEEP", "0.2")
        getattr(opener, side).send("CONFIG", "SET", "requirepass", "")
        getattr(conn, side).send("GET", "k")
        getattr(closer, side).send("CONFIG", "SET", "requirepass", PASSWORD)
        between.append(getattr(conn, side).read())
    for admin in (sleeper, opener, closer):
        assert admin.same() == b"OK"
    assert between == [b"v", b"v"]
    conn.refused("NOAUTH", "GET", "k")
    conn.passes()


def test_auth_on_a_server_without_a_password(open_lab: Lab) -> None:
    """Clients that are told a password say AUTH: an error, and nothing else happens."""
    conn = open_lab.connect()
    conn.refused("ERR", "AUTH", "x")
    conn.served()
    conn.ok("AUTH", "default", "whatever")
    conn.served()


def test_another_user_on_a_server_without_a_password(open_lab: Lab) -> None:
    open_lab.user("reader", "~*", "+get")
    conn = open_lab.connect()
    conn.served()
    conn.login("reader")
    conn.refused("NOPERM", "SET", "k", "w")
    conn.served(set_=False)
    assert open_lab.admin.do("ACL", "DELUSER", "reader") == 1


# -- all of it, at random --


class Script:
    """Random commands on random connections of random users, whose rights and passwords change meanwhile."""

    USERS = ("default", "a", "bb", "c" * 64, "d" * 65)
    RIGHTS = (
        "+get",
        "-get",
        "+set",
        "-set",
        "allkeys",
        "resetkeys",
        "~k*",
        "%R~*",
        "on",
        "off",
        "+@all",
        "-@all",
    )

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.rng = lab, rng("users", seed)
        self.conns = [lab.connect() for _ in range(6)]
        for name in self.USERS[1:]:
            lab.user(name, "~*", "+@all")

    def user(self) -> str:
        return self.rng.choice(self.USERS)

    def password(self) -> str:
        return PASSWORD if self.rng.random() < 0.8 else "guess"

    def administer(self) -> None:
        name = self.user()
        change: Command = self.rng.choice(
            [
                ("ACL", "SETUSER", name, *self.rng.sample(self.RIGHTS, 3)),
                *[("ACL", "SETUSER", name, "on", f">{PASSWORD}", "~*", "+@all")] * 3,
                ("ACL", "DELUSER", name),
                ("CONFIG", "SET", "requirepass", self.rng.choice(["", PASSWORD])),
                ("CONFIG", "SET", "requirepass", PASSWORD),
            ]
        )
        if self.rng.random() < 0.2:
            self.lab.admin.pipeline(("MULTI",), change, ("EXEC",))
        else:
            self.lab.admin.do(*change)

    def command(self) -> Command:
        key = self.rng.choice(["k", "k", "k2", "other"])
        get, set_ = ("GET", key), ("SET", key, self.rng.randrange(1000))
        if self.rng.random() < 0.7:
            return self.rng.choice([get, set_])
        auth = ("AUTH", self.user(), self.password())
        name, version = ("SETNAME", self.rng.choice(["me", "not a name"])), self.rng.choice("23")
        return self.rng.choice(
            [
                *(auth, auth, auth, ("AUTH", self.password()), ("AUTH",)),
                *(("HELLO", version), ("HELLO", version, *auth), ("HELLO", version, *name, *auth)),
                *(("HELLO", version, *auth, *name), ("HELLO", version, *auth, "AUTH", self.user(), PASSWORD)),
                *(("PING",), ("ACL", "WHOAMI"), ("SELECT", "0"), ("MULTI",), ("EXEC",), ("DISCARD",)),
            ]
        )

    def step(self) -> None:
        if self.rng.random() < 0.03:
            self.administer()
            return
        at = self.rng.randrange(len(self.conns))
        conn = self.conns[at]
        commands = [self.command() for _ in range(self.rng.choice([1, 1, 1, 1, 2, 3]))]
        data = encode_pipeline(commands)
        cut = [self.rng.randrange(1, len(data))] if self.rng.random() < 0.1 else []
        # Its user may have been deleted; and many come to be demoted.
        if conn.gone() or self.rng.random() < 0.05:
            conn.hang_up()
            self.conns[at] = self.lab.connect()
            return
        conn.send_bytes(data, *cut, replies=len(commands))


@pytest.mark.parametrize("seed", range(4))
def test_random_scripts_are_answered_as_by_plain_redis(open_lab: Lab, seed: int) -> None:
    script = Script(open_lab, seed)
    before = open_lab.sut.served()
    for _ in range(3000):
        script.step()
    if open_lab.sut.offloaded:
        assert open_lab.sut.served() - before > 100
    for name in Script.USERS[1:]:
        open_lab.admin.do("ACL", "DELUSER", name)
    open_lab.admin.ok("ACL", "SETUSER", "default", "reset", "on", "nopass", "~*", "&*", "+@all")


# -- names --


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 63, 64])
def test_long_names(lab: Lab, length: int) -> None:
    """Of names that begin the same, each is its own."""
    long = "n" * 64
    lab.user(long[:length], "~*", "+get", "+set")
    if length > 1:
        lab.user(long[: length - 1], "~*", "+get")
        lab.connect().login(long[: length - 1]).served(set_=False)
    lab.connect().login(long[:length]).served()


@pytest.mark.parametrize("length", [65, 127, 128, 200, 5000])
def test_names_that_are_too_long_pass(lab: Lab, length: int) -> None:
    """Also where the first 64 bytes are the name of somebody who may do everything."""
    lab.user("n" * 64, "~*", "+get", "+set")
    lab.user("n" * length, "~*", "+get")
    conn = lab.connect().login()
    conn.served()
    conn.login("n" * length)
    conn.refused("NOPERM", "SET", "k", "w")
    conn.passes()
    conn.login()
    conn.served()


@pytest.mark.parametrize(
    "name", [b"\xff\x80", b"$4|*3", b"\x01" * 8, b"\xc3\xa4[bold]", bytes(range(128, 192))]
)
def test_binary_names(lab: Lab, name: bytes) -> None:
    lab.user(name, "~*", "+get", "+set")
    conn = lab.connect()
    for wrong in (name + b"\0", name[:-1], name + name):
        conn.refused("WRONGPASS", "AUTH", wrong, PASSWORD)
    conn.passes()
    conn.login(name).served()
    if lab.sut.offloaded:
        from kflex_repro.offload import status

        assert name.decode(errors="backslashreplace") in status.as_dict(lab.sut.session)["users"]


def test_the_empty_name(lab: Lab) -> None:
    lab.user("", "~*", "+get")
    conn = lab.connect().login()
    conn.login("")
    conn.refused("NOPERM", "SET", "k", "w")
    conn.passes()


def test_more_users_than_there_is_room_for() -> None:
    """Those without room pass, and get none when others go: their names may still be in use."""
    with laboratory() as lab:
        names = [f"user{number}" for number in range(80)]
        for name in names:
            lab.user(name, "~*", "+get", "+set")
        conns = [lab.connect().login(name) for name in names]
        for conn in conns:
            conn.do("GET", "k")
        served = []
        for name, conn in zip(names, conns, strict=True):
            before = lab.sut.served()
            for _ in range(3):
                conn.ok("SET", "k", name)
            if lab.sut.served() > before:
                served.append(name)
        if lab.sut.offloaded:
            # default and admin have a place each.
            eventually(lambda: len(lab.sut.session.users()) == 62, what="62 users")
            assert set(served) == set(lab.sut.session.users()) - {"default", "admin"}
            out = cli("offload", "status", "--port", str(lab.sut.port)).stdout
            assert "and 54 more" in out
            assert "no room for other names" in out
        assert lab.admin.do("ACL", "DELUSER", names[0]) == 1
        lab.user("late", "~*", "+get", "+set")
        lab.connect().login("late").passes()
        lab.user(names[0], "~*", "+get")
        lab.connect().login(names[0]).passes(("SET", "k", "w"))


# -- clients --


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("user", [None, "somebody"])
def test_redis_py(lab: Lab, protocol: int, user: str | None) -> None:
    """A pool's connections log in each by itself, whenever they are made."""
    lab.user("somebody", "~*", "&*", "+@all")
    port = lab.sut.port
    pool = redis.ConnectionPool(port=port, username=user, password=PASSWORD, protocol=protocol)
    clients = [redis.Redis(connection_pool=pool) for _ in range(3)]
    held = [pool.get_connection() for _ in range(3)]
    for connection in held:
        pool.release(connection)
    try:
        before = lab.sut.served()
        for number in range(200):
            for client in clients:
                assert client.set("k", number)
                assert client.get("k") == b"%d" % number
        if lab.sut.offloaded:
            assert lab.sut.served() - before > 600
        with clients[0].pipeline() as pipe:
            assert pipe.set("k", "p").get("k").execute() == [True, b"p"]
    finally:
        pool.disconnect()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port, password="guess", protocol=protocol).get("k")


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_asyncio(lab: Lab, protocol: int) -> None:
    async def talk() -> None:
        client = redis.asyncio.Redis(
            port=lab.sut.port, password=PASSWORD, protocol=protocol, max_connections=8
        )

        async def one(key: str) -> None:
            for number in range(100):
                assert await client.set(key, number)
                assert await client.get(key) == b"%d" % number

        try:
            await asyncio.gather(*(one(f"key{number}") for number in range(8)))
        finally:
            await client.aclose()

    before = lab.sut.served()
    asyncio.run(talk())
    if lab.sut.offloaded:
        assert lab.sut.served() - before > 400


def test_a_pool_whose_user_is_changed_under_it(lab: Lab) -> None:
    lab.user("somebody", "~*", "+@all")
    client = redis.Redis(port=lab.sut.port, username="somebody", password=PASSWORD, protocol=3)
    try:
        for _ in range(3):
            assert client.set("k", "v")
            lab.admin.ok("ACL", "SETUSER", "somebody", "-set")
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.set("k", "w")
            assert client.get("k") == b"v"
            lab.admin.ok("ACL", "SETUSER", "somebody", "+set")
    finally:
        client.close()


# -- secrets --


def shingles(secret: bytes) -> list[bytes]:
    return [secret[at : at + 6] for at in range(len(secret) - 5)]


def traces(sut: Sut, secret: bytes) -> list[tuple[str, int]]:
    """Where in the pinned maps six bytes in a row of the secret are."""
    from kflex_repro.bpf.maps import Map

    found = []
    for name in ("conns", "ctl", "commands"):
        path = sut.session.pin_dir / name
        if not path.exists():
            continue
        with Map.from_pin(path) as opened:
            for number in range(opened.max_entries):
                value = opened.get(struct.pack("I", number))
                if value and any(part in value for part in shingles(secret)):
                    found.append((name, number))
    return found


@pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no maps")
def test_no_password_stays_in_a_map(lab: Lab) -> None:
    """Each connection stays open, what is left of its last message in its entry, until all are searched."""
    secret, marker = secrets.token_hex(16), secrets.token_hex(16)
    lab.user("somebody", f">{secret}", "~*", "+@all")
    auth, hello = ("AUTH", "somebody", secret), ("HELLO", "2", "AUTH", "somebody", secret)
    for command in (
        *(auth, hello, ("AUTH", secret), ("AUTH", secret, secret, secret)),
        ("HELLO", "3", "SETNAME", "me", "AUTH", "somebody", secret),
        ("HELLO", "3", "AUTH", "somebody", secret, "NO", "x"),
        ("HELLO", "3", "NO", secret),
        ("CONFIG", "SET", "masterauth", secret),
        ("CONFIG", "GET", "masterauth"),
        ("ACL", "SETUSER", "else", f">{secret}"),
        ("MIGRATE", "127.0.0.1", "1", "nokey", "0", "10", "AUTH2", "somebody", secret),
    ):
        alone, amidst = lab.connect().login(), lab.connect().login()
        alone.served()
        alone.do(*command)
        amidst.pipeline(("PING",), command, ("PING",))
    lab.admin.ok("CONFIG", "SET", "masterauth", "")
    # In pieces, as what demotes, and not as RESP at all.
    for data in (encode_command(*auth), encode_command(*hello)):
        for cut in range(1, len(data)):
            lab.connect().send_bytes(data, cut)
    for replies, data in (
        (1, f"AUTH somebody {secret}\r\n".encode()),
        (2, encode_pipeline([("CLIENT", "NO-EVICT", "on"), auth])),
        (2, encode_pipeline([auth, ("READONLY",)])),
        (2, encode_pipeline([("READONLY",), auth])),
    ):
        lab.connect().login().send_bytes(data, replies=replies)
    # What is no secret does stay: the search would find one.
    lab.connect().login().do("ECHO", marker)
    assert traces(lab.sut, marker.encode())
    assert not traces(lab.sut, secret.encode())


# -- the toolkit --


def test_the_toolkit_logs_in(lab: Lab) -> None:
    """With the password from the environment or the terminal; what is wrong is said in one line."""
    if not lab.sut.offloaded:
        pytest.skip("there is nothing to start on a plain server")
    lab.user("limited", "~*", "+get")
    port = str(lab.sut.port)
    env = {name: value for name, value in os.environ.items() if name != "REDISCLI_AUTH"}

    def start(*args: str, password: str | None = None) -> tuple[int, str]:
        run = cli(
            *("offload", "start", "--port", port, "--dry-run", "--table-size", "64m"),
            *args,
            env=env if password is None else {**env, "REDISCLI_AUTH": password},
        )
        assert "Traceback" not in run.stderr
        assert PASSWORD not in run.stdout + run.stderr
        return run.returncode, run.stdout + run.stderr

    assert start(password=PASSWORD)[0] == 0
    assert start("--user", "admin", password="any")[0] == 0
    for args, password, said in (
        ((), None, "wants a password"),
        ((), "guess", "does not let user 'default' in"),
        (("--user", "nobody"), PASSWORD, "does not let user 'nobody' in"),
        (("--user", "nobody"), None, "no password for user 'nobody'"),
        (("--user", "limited"), PASSWORD, "may not ask who the server is"),
    ):
        code, text = start(*args, password=password)
        assert code != 0
        assert said in text
        assert len(text.strip().splitlines()) <= 2, text


def test_a_server_without_a_password_takes_any(open_lab: Lab) -> None:
    """REDISCLI_AUTH may be set for other servers."""
    assert probe(open_lab.sut.port, login=Login(password="whatever")).pid == open_lab.sut.server.pid


def test_the_password_is_asked_at_the_terminal(lab: Lab) -> None:
    if not lab.sut.offloaded:
        pytest.skip("there is nothing to start on a plain server")
    command = [sys.executable, "-m", "kflex_repro", "offload", "start", "--port", str(lab.sut.port)]
    pid, terminal = os.forkpty()
    if not pid:
        os.chdir(Path(__file__).resolve().parents[2])
        os.execv(sys.executable, [*command, "--dry-run", "--askpass"])
    out = b""
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and select.select([terminal], [], [], 60)[0]:
            try:
                part = os.read(terminal, 4096)
            except OSError:  # EIO: the other end is closed
                break
            if b"password" in out + part and b"password" not in out:
                os.write(terminal, PASSWORD.encode() + b"\n")
            out += part
    finally:
        os.close(terminal)
        status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0, out
    assert b"already attached to" in out
    assert PASSWORD.encode() not in out


def test_status_names_the_users(lab: Lab) -> None:
    if not lab.sut.offloaded:
        pytest.skip("a plain server has no status")
    lab.user("reader", "~*", "+get")
    lab.user("partly", "~k", "+get")
    out = cli("offload", "status", "--port", str(lab.sut.port)).stdout
    assert "reader (GET only)" in out
    assert "partly" not in out


# -- and that these tests see a mistake --


@pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no broken build")
@pytest.mark.parametrize(
    "story",
    [
        test_a_connection_is_served_from_its_auth_on,
        test_a_connection_changes_its_user_and_back,
        test_rights_are_taken_and_given_while_connected,
    ],
)
def test_a_build_that_ignores_users_is_found(story: object) -> None:
    with laboratory(password=PASSWORD, defines={"KFLEX_BREAK_NO_USER": "1"}) as lab:
        assert callable(story)
        with pytest.raises(AssertionError):
            story(lab)
