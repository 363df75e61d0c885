"""The module's own settings, what INFO kflex says, and how the module is unloaded."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.redis.resp import Decoder, ErrorReply, encode_command
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
)
from tests.redis.test_offload_rules import Rules

pytestmark = [
    pytest.mark.bpf,
    pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no module"),
]

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {"drain-us": "500", "set-offload": "yes", "set-with-replicas": "no", "table-size": "0"}
MIB = 1 << 20


def module() -> Path:
    from kflex_repro import build

    return build.ensure().module


class Configured(ManagedServer):
    """A server with a redis.conf, which CONFIG REWRITE rewrites and a second start reads again."""

    def __init__(self, conf: Path) -> None:
        super().__init__(dir=conf.parent)
        self.conf = conf

    @property
    def args(self) -> list[str]:
        program, *rest = super().args
        return [program, str(self.conf), *rest]


def settings(conn: Conn) -> dict[str, str]:
    """CONFIG GET kflex.*, without the prefix."""
    reply = conn.do("CONFIG", "GET", "kflex.*")
    words = [bytes(word).decode().removeprefix("kflex.") for word in reply]
    return dict(zip(words[::2], words[1::2], strict=True))


def refusal(reply: Any) -> str:
    assert isinstance(reply, ErrorReply), reply
    return str(reply)


# -- settings --


@pytest.mark.parametrize(
    ("lines", "arguments", "expected"),
    [
        ([], "", {}),
        ([], "drain-us 700 SET-OFFLOAD no set-with-replicas yes table-size 64mb", None),
        (["kflex.drain-us 300", "kflex.set-offload no", "kflex.table-size 64mb"], "", None),
        (["kflex.drain-us 300", "kflex.set-offload yes"], "drain-us 700 set-offload no", None),
    ],
    ids=["defaults", "arguments", "redis.conf", "both"],
)
def test_where_a_setting_comes_from(
    tmp_path: Path, lines: list[str], arguments: str, expected: dict[str, str] | None
) -> None:
    """A line kflex.NAME counts more than an argument, an argument more than the default."""
    if expected is None:
        words = arguments.lower().split()
        expected = dict(zip(words[::2], words[1::2], strict=True))
        expected |= dict(line.removeprefix("kflex.").split() for line in lines)
        expected = {name: value.replace("64mb", str(64 * MIB)) for name, value in expected.items()}
    conf = tmp_path / "redis.conf"
    conf.write_text("\n".join([*lines, f"loadmodule {module()} {arguments}"]) + "\n")
    with Configured(conf) as server, Conn(server.port) as conn:
        assert settings(conn) == DEFAULTS | expected


def test_a_rewrite_keeps_what_was_set(tmp_path: Path) -> None:
    """Arguments stay on their line, what CONFIG SET has changed gets a line: the next start has the same."""
    conf = tmp_path / "redis.conf"
    conf.write_text(f"loadmodule {module()} drain-us 700 set-offload no\nkflex.table-size 64mb\n")
    server = Configured(conf)
    try:
        with server, Conn(server.port) as conn:
            # Back to the module's own default, and away from it: both differ from the argument.
            changed = {"drain-us": "500", "set-offload": "yes", "set-with-replicas": "yes", "table-size": "0"}
            for name, value in changed.items():
                assert conn.do("CONFIG", "SET", f"kflex.{name}", value) == b"OK"
            assert settings(conn) == changed
            assert conn.do("CONFIG", "REWRITE") == b"OK"
        text = conf.read_text()
        assert text.count("loadmodule") == 1
        assert "drain-us 700 set-offload no\n" in text
        with server.start(), Conn(server.port) as conn:
            assert settings(conn) == changed
            for name, value in {"drain-us": "700", "set-offload": "no", "table-size": "32mb"}.items():
                assert conn.do("CONFIG", "SET", f"kflex.{name}", value) == b"OK"
            assert conn.do("CONFIG", "REWRITE") == b"OK"
        with server.start(), Conn(server.port) as conn:
            assert settings(conn) == {
                "drain-us": "700",
                "set-offload": "no",
                "set-with-replicas": "yes",
                "table-size": str(32 * MIB),
            }
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("drain-us", ["50", "15000"], ["49", "15001", "many", "", "1e3", "500us"]),
        ("set-offload", ["no", "YES"], ["1", "perhaps", ""]),
        ("set-with-replicas", ["yes", "no"], ["on", "-1"]),
        (
            "table-size",
            ["4194304", "4mb", "0", "5M", "1gb", "1073741824"],
            ["4194303", "4m", "1", "-1", "1073741825", "2gb", "auto", "64 mb", "99999999999999999999"],
        ),
    ],
)
def test_values(sut: Sut, name: str, good: list[str], bad: list[str]) -> None:
    conn = sut.connect()
    for value in good:
        assert conn.do("CONFIG", "SET", f"kflex.{name}", value) == b"OK", value
    before = settings(conn)
    for value in bad:
        assert "CONFIG SET failed" in refusal(conn.do("CONFIG", "SET", f"kflex.{name}", value)), value
        # One command with a good and a bad value changes neither.
        other = "drain-us" if name != "drain-us" else "set-offload"
        changed = {"drain-us": "1234", "set-offload": "no"}[other]
        pair = (f"kflex.{other}", changed, f"kflex.{name}", value)
        assert "CONFIG SET failed" in refusal(conn.do("CONFIG", "SET", *pair))
    assert settings(conn) == before
    for each, value in DEFAULTS.items():
        assert conn.do("CONFIG", "SET", f"kflex.{each}", value) == b"OK"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["drain-us", "20"], "drain-us takes 50 to 15000, not '20'"),
        (["drain-us"], "drain-us takes 50 to 15000, not ''"),
        (["set-offload", "perhaps"], "set-offload takes yes or no"),
        (["table-size", "2gb"], "table-size takes 0 (auto), or 4mb to 1024mb"),
        (["table-size", "4mib"], "table-size takes"),
        (["speed", "11"], "unknown argument 'speed'"),
    ],
    ids=" ".join,
)
def test_bad_arguments(tmp_path: Path, words: list[str], says: str) -> None:
    """At run time: refused, the log says why, and nothing of the module stays; right ones work afterwards."""
    with ManagedServer(["--enable-module-command", "yes"]) as server, Conn(server.port) as conn:
        refusal(conn.do("MODULE", "LOAD", str(module()), *words))
        (line,) = (line for line in server.log.read_text().splitlines() if "<kflex>" in line)
        assert says in line
        for command in (("SET", "k", "v"), ("FLUSHALL",), ("CONFIG", "SET", "hz", "50"), ("PING",)):
            assert not isinstance(conn.do(*command), ErrorReply)
        assert settings(conn) == {}
        assert conn.do("MODULE", "LOAD", str(module()), "drain-us", "600") == b"OK"
        assert settings(conn) == DEFAULTS | {"drain-us": "600"}


def test_a_bad_line_in_redis_conf(tmp_path: Path) -> None:
    from kflex_repro.errors import KflexError

    conf = tmp_path / "redis.conf"
    conf.write_text(f"loadmodule {module()}\nkflex.table-size 1mb\n")
    with pytest.raises(KflexError, match="redis-server exited"), Configured(conf):
        pass


def test_loadex(tmp_path: Path) -> None:
    """MODULE LOADEX brings both settings and arguments."""
    with ManagedServer(["--enable-module-command", "yes"]) as server, Conn(server.port) as conn:
        words = ("CONFIG", "kflex.drain-us", "300", "ARGS", "drain-us", "700", "set-offload", "no")
        assert conn.do("MODULE", "LOADEX", str(module()), *words) == b"OK"
        assert settings(conn) == DEFAULTS | {"drain-us": "300", "set-offload": "no"}
        assert conn.do("MODULE", "UNLOAD", "kflex") == b"OK"
        refusal(conn.do("MODULE", "LOADEX", str(module()), "CONFIG", "kflex.drain-us", "1"))
        refusal(conn.do("MODULE", "LOADEX", str(module()), "CONFIG", "kflex.no-such", "1"))
        assert settings(conn) == {}
        assert conn.do("MODULE", "LOADEX", str(module())) == b"OK"
        assert settings(conn) == DEFAULTS


@pytest.mark.parametrize("how", ["plain", "transaction"])
def test_set_offload_follows_at_once(sut: Sut, how: str) -> None:
    rules = Rules(sut)

    def change(value: str) -> None:
        command = ("CONFIG", "SET", "kflex.set-offload", value)
        if how == "plain":
            assert rules.control.do(*command) == b"OK"
        else:
            assert rules.control.pipeline(("MULTI",), command, ("EXEC",))[-1] == [b"OK"]

    change("no")
    rules.only_gets("set_setting")
    assert sut.info()["setting_set_offload"] == "no"
    change("yes")
    rules.served_again()
    assert sut.info()["setting_set_offload"] == "yes"


def test_sets_with_replicas(sut: Sut) -> None:
    """Who never says WAIT may have them: the replica gets every state in the order in which it was."""
    rules = Rules(sut)
    with plain_server() as replica:
        upstream = replica.connect()
        assert upstream.do("REPLICAOF", "127.0.0.1", str(sut.port)) == b"OK"
        eventually(lambda: b"master_link_status:up" in upstream.do("INFO", "replication"), timeout=15)
        rules.only_gets("replicas")
        assert rules.control.do("CONFIG", "SET", "kflex.set-with-replicas", "yes") == b"OK"
        rules.served_again()
        before = sut.stats()["served_set"]
        for number in range(300):
            assert rules.conn.do("SET", "first", number) == b"OK"
            assert rules.conn.do("SET", "second", number) == b"OK"
            if number % 10 == 0:
                # The one that is written later is never ahead of the other.
                words = (("MULTI",), ("GET", "second"), ("GET", "first"), ("EXEC",))
                second, first = upstream.pipeline(*words)[-1]
                assert int(second or -1) <= int(first or -1)
        assert sut.stats()["served_set"] > before + 300
        eventually(lambda: upstream.do("GET", "second") == b"299", timeout=15, what="the last SET")
        assert upstream.do("GET", "first") == b"299"
        assert rules.control.do("CONFIG", "SET", "kflex.set-with-replicas", "no") == b"OK"
        rules.only_gets("replicas")
        upstream.do("REPLICAOF", "NO", "ONE")
    rules.served_again()


@pytest.mark.parametrize("pause", ["50", "15000"])
def test_the_pause_between_cuts(sut: Sut, pause: str) -> None:
    """Whatever it is, what the kernel accepts comes into Redis with no command to wake it."""
    conn, control = sut.connect(), sut.connect()
    assert control.do("CONFIG", "SET", "kflex.drain-us", pause) == b"OK"
    sut.warm(conn)
    sut.must_serve(conn, ("SET", "k", "v"))
    before = sut.stats()["drained"]
    sut.must_serve(conn, ("SET", "k", "w"))
    eventually(lambda: sut.stats()["dirty"] == 0 and sut.stats()["drained"] > before, what="a cut")
    assert control.do("GETRANGE", "k", 0, -1) == b"w"
    assert control.do("CONFIG", "SET", "kflex.drain-us", "500") == b"OK"


def test_the_table_size_that_start_takes() -> None:
    """--table-size auto asks the server; a change counts from the next start on; --table-size counts more."""
    need_offload()
    with ManagedServer(module=module(), module_args=["table-size", "32mb"]) as server:
        port = ("--port", str(server.port))

        def started(*words: str) -> float:
            run = cli("offload", "start", *port, *words, "--json")
            assert run.returncode == 0, run.stderr
            return float(json.loads(run.stdout)["table_bytes"]) / MIB

        try:
            assert 16 < started() <= 32
            with Conn(server.port) as conn:
                assert conn.do("CONFIG", "SET", "kflex.table-size", "100mb") == b"OK"
            assert 16 < started() <= 32, "attached already"
            assert cli("offload", "stop", *port).returncode == 0
            dry = cli("offload", "start", *port, "--dry-run")
            assert 60 < int(re.search(r"table (\d+) MiB", dry.stdout)[1]) <= 100
            assert 60 < started() <= 100
            assert cli("offload", "stop", *port).returncode == 0
            assert 8 < started("--table-size", "16m") <= 16
        finally:
            cli("offload", "stop", *port)


def test_the_limits_of_a_table_are_those_of_the_toolkit() -> None:
    constants = abi().constants()
    from kflex_repro.offload import table

    assert (
        constants["KFLEX_TABLE_MIN_BYTES"],
        constants["KFLEX_TABLE_MAX_BYTES"],
    ) == (table.MINIMUM, table.MAXIMUM)


# -- INFO --


def abi() -> Any:
    from kflex_repro import build
    from kflex_repro.bpf import btf

    return btf.load(build.ensure().object("offload_local"))


@pytest.fixture(scope="module")
def over_unix() -> Iterator[Sut]:
    """A server that can be asked over its unix socket: that moves none of the counters."""
    with offloaded_server(unix=True) as sut:
        yield sut


def info_over_unix(sut: Sut) -> dict[str, str]:
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(sut.server.unix_path))
        asker.sendall(encode_command("INFO", "kflex"))
        decoder = Decoder()
        while (reply := decoder.pop()) is Decoder.INCOMPLETE:
            decoder.feed(asker.recv(1 << 16))
    assert isinstance(reply, bytes)
    pairs = (line.split(":", 1) for line in reply.decode().splitlines() if ":" in line)
    return {name.removeprefix("kflex_"): value for name, value in pairs}


# Counters whose name in INFO is not that of the enumeration.
STAT_NAMES = {
    "demoted": "connections_demoted",
    "paired": "connections_paired",
    "parked": "connections_parked",
    "released": "connections_released",
    "lost": "lost_replies",
    "gate_reply": "gate_opened_by_reply",
    "gate_sleep": "gate_opened_by_sleep",
    "evicted": "evicted_by_set",
}
# Members of struct kflex_ctl, and the field that shows each.
CTL_NAMES = {
    "disabled": "state",
    "allow": "allow",
    "rules": "rules",
    "head": "dirty",
    "tail": "pending",
    "bump": "table_bytes_used",
    "drained": "drained",
    "cuts": "cuts",
    "populated": "populated",
    "invalidated": "invalidated",
    "epoch_bumps": "epoch_bumps",
    "open_commands": "open_commands",
    "dirty_age_max": "dirty_age_us_max",
    "dirty_age_sum": "dirty_age_us_avg",
    "wait_max": "writer_wait_us_max",
    "open_ns": "gate_open_ratio",
    "total_ns": "gate_open_ratio",
    "refused": "refused",
    "evicted": "evicted",
    "sleeps": "sleeps",
    "journal_cut": "last_cut_written",
    "last_cut": "last_cut",
    "durable": "durable",
    "recovered": "recovered_keys",
    "users": "users_served",
}
# What is there to make it work, and says nothing to a user.
CTL_INTERNAL = frozenset(
    [
        "magic",
        "abi",
        "mode",
        "pid",
        "tid",
        "port",
        "start_time",
        "seed",
        "chunks",
        "buckets",
        "ring",
        "cpus",
        "epoch",
        "gate",
        "armed",
        "hold",
        "rsvd0",
        "gen",
        "oldest_ns",
        "journal_head",
        "free",
        "table_id",
        "aof_ino",
        "aof_fd",
        "death_ino",
        "death_size",
        "user_allow",
        "default_open",
        "user",
        "cpu",
    ]
)


def test_every_counter_of_the_kernel_is_in_info(over_unix: Sut) -> None:
    """Each gets a number of its own in the shared memory, and must come out under its name."""
    names = {name: at for name, at in abi().enum("kflex_stat").items() if name != "KFLEX_STAT_COUNT"}
    stat = over_unix.session._ctl.cpu[0].stat
    step = 10**12
    for at in names.values():
        stat[at] += step * (at + 1)
    shown = info_over_unix(over_unix)
    for at in names.values():
        stat[at] -= step * (at + 1)
    for name, at in names.items():
        short = name.removeprefix("KFLEX_STAT_").lower()
        field = f"passed_{short[4:]}" if short.startswith("why_") else STAT_NAMES.get(short, short)
        assert field in shown, f"INFO kflex does not show {name}"
        assert round(int(shown[field]) / step) == at + 1, f"{field} is not {name}"


def test_every_rule_and_state_has_its_name_in_info(over_unix: Sut) -> None:
    ctl = over_unix.session._ctl
    rules = {
        at: name.removeprefix("KFLEX_RULE_").lower()
        for name, at in abi().enum("kflex_rule").items()
        if name != "KFLEX_RULE_COUNT"
    }
    everything = sum(1 << at for at in rules)

    def named() -> list[str] | None:
        # The module reads the rules anew ten times a second.
        ctl.rules = everything
        shown = info_over_unix(over_unix)
        return shown["forbidden_by"].split(",") if int(shown["rules"]) == everything else None

    assert eventually(named) == [rules[at] for at in sorted(rules)]
    before = ctl.disabled
    for name, value in abi().enum("kflex_disable").items():
        ctl.disabled = value
        assert info_over_unix(over_unix)["state"] == name.removeprefix("KFLEX_").lower()
    ctl.disabled = 77
    assert info_over_unix(over_unix)["state"] == "unknown"
    ctl.disabled = before
    for bits, names in enumerate(("", "get", "set", "get,set")):

        def serves(bits: int = bits) -> str | None:
            ctl.allow = bits
            shown = info_over_unix(over_unix)
            return f"={shown['serves']}" if int(shown["allow"]) == bits else None

        assert eventually(serves) == f"={names}"


def test_every_word_of_the_control_block_is_in_info_or_internal(over_unix: Sut) -> None:
    members = {name for name, _ in abi().struct("kflex_ctl")._fields_ if name and not name.startswith("_")}
    assert members - CTL_INTERNAL - CTL_NAMES.keys() == set(), "say in INFO kflex what these are, or why not"
    shown = info_over_unix(over_unix)
    assert set(CTL_NAMES.values()) <= shown.keys()


def test_the_documentation_has_every_field(over_unix: Sut) -> None:
    text = (ROOT / "docs" / "info.md").read_text()
    described = [
        re.findall(r"`([\w.-]+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")
    ]
    names = [name for row in described for name in row]
    assert len(names) == len(set(names))
    with over_unix.connect() as conn:
        assert {f"kflex.{name}" for name in settings(conn)} == {n for n in names if n.startswith("kflex.")}
    assert set(info_over_unix(over_unix)) == {n for n in names if not n.startswith("kflex.")}


def test_what_info_says_of_some_work(sut: Sut) -> None:
    conn, control = sut.connect(), sut.connect()
    sut.warm(conn)
    first = {name: int(value) for name, value in sut.info().items() if value.isdigit()}
    for number in range(100):
        assert conn.do("SET", "k", number) == b"OK"
        assert conn.do("GET", "k") == b"%d" % number
        assert conn.do("GET", f"missing{number}") is None
    assert control.do("APPEND", "k", "!") == 3
    assert control.do("FLUSHALL") == b"OK"
    text = sut.info()
    then = {name: int(value) for name, value in text.items() if value.isdigit()}
    more = {name: then[name] - first[name] for name in then if name in first}
    assert more["served_get"] > 50
    assert more["served_set"] > 50
    assert more["served_get"] + more["served_set"] + more["passed"] >= 300
    assert more["passed_miss"] >= 100
    assert more["drained"] > 0
    assert more["cuts"] > 0
    assert more["epoch_bumps"] >= 1
    assert more["sleeps"] > 0
    assert then["dirty"] == then["open_commands"] == then["refused"] == 0
    assert 0 <= float(text["gate_open_ratio"]) <= 1
    assert then["table_bytes_used"] < then["table_bytes"] == pytest.approx(sut.session.table_bytes, rel=0.01)
    assert (text["state"], text["serves"], text["forbidden_by"]) == ("on", "get,set", "")
    with sut.server.client() as client:
        everything = client.info("everything")
        assert everything["kflex_served_get"] >= then["served_get"]
        assert isinstance(everything["kflex_gate_open_ratio"], float)


# -- unloading --


class Writers:
    """Connections that SET keys of their own and read them back, each on reconnecting sockets, and keep what
    was acknowledged."""

    def __init__(self, port: int, threads: int = 4, keys: int = 20) -> None:
        self.port, self.keys = port, keys
        self.acknowledged: list[dict[str, bytes]] = [{} for _ in range(threads)]
        self.wrong: list[str] = []
        self.done = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(at,)) for at in range(threads)]

    def _run(self, at: int) -> None:
        mine = self.acknowledged[at]
        number = 0
        try:
            while not self._stop.is_set():
                # Only a connection made since the last start is served.
                with Conn(self.port) as conn:
                    for _ in range(200):
                        number += 1
                        key, value = f"w{at}:{number % self.keys}", b"%d:%d" % (at, number)
                        assert conn.do("SET", key, value) == b"OK"
                        mine[key] = value
                        other = f"w{at}:{number * 7 % self.keys}"
                        got = conn.do("GET", other)
                        assert got == mine.get(other), f"{other}: {got!r}, not {mine.get(other)!r}"
                        self.done += 1
        except BaseException as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def go_on(self, more: int) -> None:
        """Waits for so many rounds more."""
        goal = self.done + more
        eventually(lambda: self.done >= goal or self.wrong, timeout=30, what="the load")
        assert not self.wrong, self.wrong

    def all_there(self) -> None:
        """Redis holds every value that was acknowledged last."""
        assert not self.wrong, self.wrong
        with Conn(self.port) as conn:
            for mine in self.acknowledged:
                for key, value in mine.items():
                    assert conn.do("GETRANGE", key, 0, -1) == value


def belongings(pid: int) -> dict[str, Any]:
    """What a process holds that a module could leave: threads, descriptors by kind, mappings by name."""
    fds: dict[str, int] = {}
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            kind = re.sub(r"\d+", "", str(each.readlink()))
            fds[kind] = fds.get(kind, 0) + 1
    names = (line.split(None, 5)[5:] for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {
        "threads": sorted(
            name
            for task in Path(f"/proc/{pid}/task").iterdir()
            # The allocator starts its own by itself.
            if not (name := (task / "comm").read_text().strip()).startswith("jemalloc")
        ),
        "fds": fds,
        "mappings": sorted({name[0] for name in names if name and ("kflex" in name[0] or "bpf" in name[0])}),
    }


@pytest.mark.parametrize(("aof", "rounds"), [("no", 20), ("yes", 8)])
def test_unloading_under_load(aof: str, rounds: int) -> None:
    """Loaded, started, unloaded while clients write, again and again: nothing acknowledged is lost."""
    from kflex_repro.offload import attach
    from kflex_repro.offload import session as offload

    need_offload()
    with (
        ManagedServer(
            ["--enable-module-command", "yes", "--enable-debug-command", "yes", "--appendonly", aof]
        ) as server,
        Conn(server.port) as control,
        Writers(server.port) as writers,
    ):
        served = 0
        try:
            writers.go_on(100)
            for _ in range(rounds):
                assert control.do("MODULE", "LOAD", str(module())) == b"OK"
                session = attach.start(server.port, table_bytes=16 * MIB)
                stats = session.stats()
                eventually(
                    lambda session=session: (
                        writers.wrong or min(session.stats()[s] for s in ("served_get", "served_set")) > 200
                    ),
                    timeout=30,
                    what="something served",
                )
                assert control.do("MODULE", "UNLOAD", "kflex") == b"OK"
                stats = session.stats()
                served += stats["served_set"]
                assert session.disabled == "unloaded"
                assert (stats["dirty"], stats["open_commands"], stats["refused"], stats["lost"]) == (
                    0,
                    0,
                    0,
                    0,
                )
                session.close()
                writers.go_on(20)
            assert served > 200 * rounds
        finally:
            writers.__exit__()
            left = offload.find(server.port)
            if left is not None:
                left.stop()
        writers.all_there()
        if aof == "yes":
            assert control.do("DEBUG", "LOADAOF") == b"OK"
            writers.all_there()


def test_nothing_of_the_module_stays() -> None:
    """Threads, descriptors and mappings are those of before; commands that it listened to work."""
    from kflex_repro.offload import attach

    need_offload()
    args = ["--enable-module-command", "yes", "--enable-debug-command", "yes"]
    with ManagedServer(args) as server, Conn(server.port) as control:
        assert control.do("SET", "k", "v") == b"OK"
        before = None
        for round_ in range(6):
            assert control.do("MODULE", "LOAD", str(module())) == b"OK"
            if round_ % 2:
                session = attach.start(server.port, table_bytes=16 * MIB)
                with Conn(server.port) as conn:
                    conn.do("PING")
                    for number in range(50):
                        assert conn.do("SET", "k", number) == b"OK"
                if round_ % 4 == 1:
                    # The kernel's half first, then the module; else the module first.
                    session.stop()
                assert control.do("MODULE", "UNLOAD", "kflex") == b"OK"
                if session.pin_dir.exists():
                    session.stop()
                assert control.do("GET", "k") == b"49"
            else:
                assert control.do("MODULE", "UNLOAD", "kflex") == b"OK"
            now = eventually(lambda: settled(server.pid))
            assert now["mappings"] == []
            # Redis's own background threads may have been started by the first round.
            before = before or now
            assert now == before, f"round {round_}"
            assert control.do("MODULE", "LIST") == []
            assert settings(control) == {}
            assert b"kflex" not in control.do("INFO", "everything")
            for command in (
                ("INCR", "n"),
                ("DEL", "n"),
                ("FLUSHALL",),
                ("SWAPDB", "0", "1"),
                ("SWAPDB", "0", "1"),
            ):
                assert not isinstance(control.do(*command), ErrorReply)
            for command in (("DEBUG", "RELOAD"), ("REPLICAOF", "NO", "ONE"), ("CONFIG", "SET", "hz", "50")):
                assert control.do(*command) == b"OK"
            assert control.do("SET", "k", "v") == b"OK"


def settled(pid: int) -> dict[str, Any] | None:
    """belongings() when clients that hung up are forgotten: two looks that agree, one connection open."""
    first = belongings(pid)
    return first if first == belongings(pid) and first["fds"].get("socket:[]", 0) <= 3 else None


def test_a_silent_peer_does_not_hold_up_an_unload() -> None:
    """Somebody connects to the module's socket and says nothing: Redis does not wait for that."""
    with (
        ManagedServer(["--enable-module-command", "yes"], module=module()) as server,
        Conn(server.port) as conn,
        socket.socket(socket.AF_UNIX) as peer,
    ):
        run_id = re.search(rb"run_id:(\w+)", conn.do("INFO", "server"))[1]
        peer.connect(b"\0kflex-" + run_id)
        assert conn.do("MODULE", "UNLOAD", "kflex") == b"OK"
        peer.settimeout(10)
        assert peer.recv(1) == b""


def test_loaded_twice(sut: Sut) -> None:
    """The second is refused, and the first goes on as if nothing had been."""
    with offloaded_server(["--enable-module-command", "yes"]) as sut:
        conn, control = sut.connect(), sut.connect()
        conn.do("SET", "k", "v")
        sut.warm(conn, "k")
        for _ in range(3):
            refusal(control.do("MODULE", "LOAD", str(module())))
            sut.must_serve(conn, ("SET", "k", "w"))
            sut.must_serve(conn, ("GET", "k"))
            assert control.do("GETRANGE", "k", 0, -1) == b"w"
        assert sut.broken_promises() == {}
