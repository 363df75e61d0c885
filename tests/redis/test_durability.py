"""kill -9 of the server, of the toolkit, of both: with AOF nothing acknowledged is lost, and no deleted key
rises.

KFLEX_TEST_SERVER=plain kills a plain redis-server instead: it keeps the same promises.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.bpf import fs
from kflex_repro.errors import KflexError
from tests.conftest import unavailable
from tests.redis.durability import (
    Book,
    Load,
    aof_dir,
    aof_units,
    copy_dataset,
    digest,
    everything,
    incr_file,
    loaded,
    moment_without_fsync,
    never_a_state,
    quiesce,
    read_back,
    ring_key,
    rings_broken,
)
from tests.redis.harness import (
    BASE_ARGS,
    PLAIN_ONLY,
    Conn,
    Sut,
    children,
    cli,
    eventually,
    have,
    kill,
    need_offload,
    rng,
)

pytestmark = pytest.mark.bpf
only_offloaded = pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has nothing to recover")

ROOT = Path(__file__).resolve().parents[2]
TABLE = 32 << 20
SOAK_KILLS = int(os.environ.get("KFLEX_SOAK_KILLS", "100"))
SHOWN = 20


@dataclass
class Rig:
    """A server with AOF whose port and directory outlive its crashes."""

    server: Any
    built: Any = None
    session: Any = None
    killed_with: list[int] = field(default_factory=list)
    """At each crash of an offloaded server: SETs in its journal."""

    @property
    def port(self) -> int:
        return int(self.server.port)

    @property
    def dir(self) -> Path:
        return Path(self.server.dir)

    def sut(self) -> Sut:
        return Sut(self.server, self.session)

    def attach(self) -> None:
        """`offload start`, and SETs are served."""
        if PLAIN_ONLY:
            return
        from kflex_repro.offload import attach

        self.let_go()
        self.session = attach.start(self.port, table_bytes=TABLE, built=self.built)
        eventually(lambda: "set" in self.session.allow, what=f"SETs served: {self.session.rules}")

    def find(self) -> Any:
        from kflex_repro.offload import session as offload

        return offload.find(self.port)

    def let_go(self) -> None:
        """As a toolkit does that ends: what is pinned stays."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def crash(self) -> None:
        """kill -9 of the server."""
        self.server.kill()
        if self.session is not None and self.session.readable:
            self.killed_with.append(len(self.session.leftovers()))

    def restart(self) -> None:
        self.server.start()

    def recovered(self) -> int:
        return int(self.sut().info().get("recovered_keys", 0))

    def kept(self) -> int:
        return int(self.sut().info().get("recovery_kept", 0))

    def clear(self) -> None:
        """Whatever is pinned for this port goes."""
        from kflex_repro.offload import session as offload

        self.let_go()
        for found in offload.attached():
            if found.port == self.port:
                with contextlib.suppress(KflexError):
                    found.stop(timeout=2.0, force=True)
            else:
                found.close()


@contextlib.contextmanager
def rig(
    *args: str,
    policy: str = "no",
    defines: dict[str, str] | None = None,
    module: Path | None = None,
    **kw: Any,
) -> Iterator[Rig]:
    """A server with the module and AOF; not attached yet."""
    from kflex_repro import build
    from kflex_repro.redis.server import ManagedServer

    built = None
    if not PLAIN_ONLY:
        need_offload()
        built = build.ensure(defines=defines or {})
    aof = ("--appendonly", "yes", "--appendfsync", policy, "--auto-aof-rewrite-percentage", "0")
    server = ManagedServer(
        [*BASE_ARGS, *aof, *args], module=module or (built.module if built else None), **kw
    )
    with server:
        made = Rig(server, built)
        try:
            yield made
        except BaseException:
            print("".join(line for line in server.log.open(errors="replace") if "kflex" in line))
            raise
        finally:
            server.kill()
            if not PLAIN_ONLY:
                made.clear()


def must_be_right(book: Book, port: int, when: str = "") -> None:
    """The server holds what the books say, no more and no less; the books go on from there."""
    found = everything(port)
    wrong = book.wrong({**dict.fromkeys(book.known), **found})
    unknown = [key for key in found if key not in book.known]
    assert not wrong, f"{when}: {len(wrong)} keys are wrong:\n" + "\n".join(wrong[:SHOWN])
    assert not unknown, f"{when}: keys that nobody wrote: {unknown[:SHOWN]}"
    book.settle({**dict.fromkeys(book.known), **found})


# -- kill -9, again and again, on the same data --

TOOLKITS = {
    "watch": ("status", "--watch"),
    "start": ("start", "--table-size", "32m"),
    "stop": ("stop",),
}


@contextlib.contextmanager
def toolkit(command: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A `kflex-repro offload` process; gone afterwards, whatever it was doing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kflex_repro", "offload", *TOOLKITS[command], "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process.pid)
        process.wait()


def killed(victim: str, policy: str, rounds: int, seed: int) -> None:
    """One series of crashes on one dataset. Every third round goes on without the offload."""
    generator = rng("durability", victim, policy, seed)
    with rig(policy=policy) as r:
        book = Book()
        for n in range(rounds):
            command = generator.choice(list(TOOLKITS)) if victim != "server" and not PLAIN_ONLY else ""
            attached = n % 3 != 2
            if attached and command != "start":
                r.attach()
            load = Load(
                r.port, book, seed=seed + n, hammers=(0, 1, 2)[n % 3], passing=(0.0, 0.1, 0.02)[n // 2 % 3]
            )
            with load:
                load.run_for(generator.randrange(200, 2000))
                room = moment_without_fsync(r.port) if policy == "everysec" else 0.6
                with toolkit(command, r.port) if command else contextlib.nullcontext() as process:
                    time.sleep(generator.uniform(0.2, room) if command else generator.uniform(0, room / 2))
                    if victim != "server" and process is not None:
                        kill(process.pid)
                    if victim != "toolkit":
                        r.crash()
                if victim == "toolkit":
                    load.run_for(500)
                book = load.stop()
            when = f"round {n}, {victim} {command} killed, journal {r.killed_with[-1:]}"
            if victim != "toolkit":
                r.restart()
            elif not PLAIN_ONLY:
                quiesce(r.port)
            must_be_right(book, r.port, when)
        if not PLAIN_ONLY and victim == "server":
            assert sum(r.killed_with) > 0, "no crash left anything to recover: the test shows nothing"


KILLS = [(victim, policy) for victim in ("server", "toolkit", "both") for policy in ("no", "everysec")]


@pytest.mark.parametrize(("victim", "policy"), KILLS)
def test_killed(victim: str, policy: str) -> None:
    killed(victim, policy, rounds=3, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize(("victim", "policy"), KILLS)
def test_soak_killed(victim: str, policy: str) -> None:
    for series in range(SOAK_KILLS // 20):
        killed(victim, policy, rounds=10, seed=100 * (series + 1))


# -- right after the acknowledgement --

Command = Sequence[str | int]
OF_KEYS: dict[str, tuple[list[Command], dict[str, bytes | None]]] = {
    "DEL": ([("DEL", "k")], {"k": None}),
    "GETDEL": ([("GETDEL", "k")], {"k": None}),
    "UNLINK": ([("UNLINK", "k", "j")], {"k": None, "j": None}),
    "RENAME": ([("RENAME", "k", "j")], {"k": None, "j": b"old"}),
    "APPEND": ([("APPEND", "k", "er")], {"k": b"older"}),
    "DEL, SET": ([("DEL", "k"), ("SET", "k", "new")], {"k": b"new"}),
    "SET, DEL": ([("SET", "k", "new"), ("DEL", "k")], {"k": None}),
    "INCR": ([("SET", "k", 41), ("INCR", "k")], {"k": b"42"}),
    "SET EX": ([("SET", "k", "new", "EX", 1000)], {"k": b"new"}),
    "MULTI": ([("MULTI",), ("SET", "k", "1"), ("DEL", "j"), ("EXEC",)], {"k": b"1", "j": None}),
    "EVAL": ([("EVAL", "return redis.call('del', KEYS[1], KEYS[2])", 2, "k", "j")], {"k": None, "j": None}),
    "list": ([("DEL", "k"), ("RPUSH", "l", "x"), ("RENAME", "l", "k"), ("DEL", "k")], {"k": None}),
    "expiry": ([("PEXPIRE", "k", 1), ("DEBUG", "SLEEP", "0.002"), ("EXISTS", "k")], {"k": None}),
}
OF_ALL: dict[str, tuple[list[Command], dict[str, bytes | None]]] = {
    "FLUSHALL": ([("FLUSHALL",)], {"k": None, "j": None}),
    "FLUSHDB, SET": ([("FLUSHDB",), ("SET", "k", "new")], {"k": b"new", "j": None}),
    "SWAPDB": ([("SWAPDB", 0, 1)], {"k": None, "j": None}),
    "BGREWRITEAOF": ([("BGREWRITEAOF",), ("DEL", "k")], {"k": None, "j": b"old"}),
}


def killed_right_after(names: Sequence[str]) -> None:
    """The journal still holds the SETs when the server dies; what came after them has the last word."""
    cases = {**OF_KEYS, **OF_ALL}
    with rig() as r:
        r.attach()
        must: dict[bytes, bytes | None] = {}

        def own(name: str, word: str | int) -> str | int:
            return f"{name}:{word}" if word in ("k", "j", "l") else word

        with Conn(r.port) as conn:
            conn.do("PING")
            for name in names:
                commands, after = cases[name]
                r.sut().must_serve(conn, *(("SET", own(name, key), "old") for key in ("k", "j")))
                for command in commands:
                    conn.do(*(own(name, word) for word in command))
                must.update({f"{name}:{key}".encode(): value for key, value in after.items()})
            orphans = children(r.server.pid)
            r.crash()
            for pid in orphans:
                kill(pid)
        r.restart()
        found = read_back(r.port, must)
        assert found == must, f"journal {r.killed_with}"
        # A fork takes so long that the journal may be empty after it.
        assert PLAIN_ONLY or "BGREWRITEAOF" in names or r.killed_with[-1] > 0


@pytest.mark.parametrize("turn", range(2))
def test_killed_right_after_the_reply(turn: int) -> None:
    """All of them within milliseconds: the journal has them all."""
    names = list(OF_KEYS)
    random.Random(turn).shuffle(names)
    killed_right_after(names)


@pytest.mark.parametrize("name", OF_ALL)
def test_killed_right_after(name: str) -> None:
    killed_right_after([name])


@pytest.mark.soak
@pytest.mark.parametrize("name", OF_KEYS)
def test_soak_killed_right_after(name: str) -> None:
    for _ in range(5):
        killed_right_after([name])


def stopped_asleep(pid: int, conn: Conn) -> bool:
    """Stop the server where it sleeps: a SET of k to "stopped" is served then. Where it runs the gate is
    closed, and stays closed: it goes on.
    """
    os.kill(pid, signal.SIGSTOP)
    with contextlib.suppress(AssertionError):
        return conn.do("SET", "k", "stopped") == b"OK"
    os.kill(pid, signal.SIGCONT)

    def answered() -> bool:
        with contextlib.suppress(AssertionError):
            return conn.read() == b"OK"
        return False

    eventually(answered, 20, "the SET answered after all")
    return False


@pytest.mark.smoke("recovery")
def test_killed_when_redis_could_not_even_drain() -> None:
    """The main thread stands still, SETs are served until the oldest is due: all of them come back."""
    with rig() as r:
        r.attach()
        with Conn(r.port, timeout=0.3) as conn:
            r.sut().must_serve(conn, ("SET", "k", "before"))
            acknowledged = asked = b"before"
            if PLAIN_ONLY:
                os.kill(r.server.pid, signal.SIGSTOP)
            else:
                eventually(lambda: stopped_asleep(r.server.pid, conn), 60, "stopped with the gate open")
                acknowledged = b"stopped"
            with contextlib.suppress(AssertionError):
                for number in range(100000):
                    asked = b"%d" % number
                    conn.do("SET", "k", asked)
                    acknowledged = asked
            r.crash()
        r.restart()
        with Conn(r.port) as conn:
            assert conn.do("GET", "k") in (acknowledged, asked)
        assert PLAIN_ONLY or r.recovered() > 0


@only_offloaded
def test_killed_again_while_it_recovers() -> None:
    """At any moment of the restart, before the AOF holds what is recovered and after: the next one is
    right.
    """
    generator = random.Random(5)
    with rig() as r:
        book = Book()
        for n in range(2):
            r.attach()
            with Load(r.port, book, seed=n, hammers=0, passing=0.0) as load:
                load.run_for(1000)
                r.crash()
                book = load.stop()
            r.let_go()
            for _ in range(5):
                with r.server.log.open("ab") as log:
                    process = subprocess.Popen(
                        r.server.args, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                    try:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(generator.uniform(0.0, 0.06))
                    finally:
                        process.kill()
                        process.wait()
            r.restart()
            must_be_right(book, r.port, f"round {n}, journal {r.killed_with}")
            # And right after it answers, twice.
            for _ in range(2):
                r.crash()
                r.restart()
                must_be_right(book, r.port, f"round {n} again")


@only_offloaded
def test_a_recovered_server_goes_on_without_the_offload() -> None:
    """What it wrote since is not overwritten from the old table, which is still pinned."""
    with rig() as r:
        r.attach()
        book = Book()
        with Load(r.port, book, hammers=0, passing=0.0) as load:
            load.run_for(1000)
            r.crash()
            book = load.stop()
        r.let_go()
        for n in range(3):
            r.restart()
            must_be_right(book, r.port, f"restart {n}")
            with Load(r.port, book, seed=n) as load:
                load.run_for(300)
                r.crash()
                book = load.stop()
        r.restart()
        must_be_right(book, r.port)


# -- BPF taken off by others --


@only_offloaded
@pytest.mark.parametrize("what", ["verdicts", "hooks"])
def test_detached_under_load(what: str) -> None:
    """As with bpftool: nobody is served any more, and what was acknowledged is there after a crash."""
    from kflex_repro.bpf import fs
    from kflex_repro.bpf.libbpf import AttachType
    from kflex_repro.bpf.links import Program
    from kflex_repro.bpf.maps import Map

    with rig() as r:
        book = Book()
        for n in range(2):
            r.attach()
            with Load(r.port, book, seed=n) as load:
                load.run_for(1000)
                pins = r.session.pin_dir
                if what == "verdicts":
                    for name, socks in (("kflex_client", "client_socks"), ("kflex_server", "server_socks")):
                        with Program.from_pin(pins / name) as program, Map.from_pin(pins / socks) as opened:
                            program.detach_map(opened, AttachType.SK_MSG_VERDICT)
                        fs.unpin(pins / name)
                else:
                    for name in ("kflex_switch", "kflex_exit", "kflex_exec", "kflex_read", "kflex_enrol"):
                        fs.unpin(pins / name)
                load.run_for(500)
                r.crash()
                book = load.stop()
            r.restart()
            must_be_right(book, r.port, f"round {n}, journal {r.killed_with}")


# -- another dataset, another server --


def crashed_with_leftovers(r: Rig, keys: int = 50) -> dict[bytes, bytes]:
    """The server is dead, and these SETs, all that its dataset has, were acknowledged; some only by the
    kernel.
    """
    must = {b"k%d" % n: b"acknowledged %d" % n for n in range(keys)}
    r.attach()
    with Conn(r.port) as conn:
        conn.do("PING")
        for _ in range(20):
            for key, value in must.items():
                assert conn.do("SET", key, value) == b"OK"
            r.crash()
            if r.killed_with[-1]:
                r.let_go()
                return must
            r.restart()
            r.attach()
            conn.close()
            conn.__init__(r.port)  # type: ignore[misc]
    raise AssertionError("the journal was empty twenty times")


@contextlib.contextmanager
def another(r: Rig, args: Sequence[str], **kw: Any) -> Iterator[Any]:
    """Another server on the port of a dead one."""
    from kflex_repro.redis.server import ManagedServer

    with ManagedServer([*BASE_ARGS, *args], port=r.port, **kw) as server:
        yield server


def recover(*args: str) -> subprocess.CompletedProcess[str]:
    run = cli("offload", "recover", *args)
    assert "Traceback" not in run.stderr
    return run


def waiting(port: int) -> int:
    """SETs that `offload recover` shows for this port."""
    run = recover("--port", str(port), "--json")
    assert run.returncode == 0, run.stderr
    return sum(int(each["sets"]) for each in json.loads(run.stdout))


@only_offloaded
def test_another_dataset_on_the_port(tmp_path: Path) -> None:
    """It gets nothing of the old one; that stays exportable, and its own server still recovers it."""
    with rig() as r:
        must = crashed_with_leftovers(r)
        for aof in ("yes", "no"):
            other = tmp_path / f"other-{aof}"
            other.mkdir()
            with another(r, ["--appendonly", aof], module=r.built.module, dir=other) as server:
                assert everything(r.port) == {}
                assert int(Sut(server).info()["recovery_kept"]) > 0
                before = waiting(r.port)
                assert before > 0
                refused = cli("offload", "start", "--port", str(r.port), "--table-size", "32m")
                assert refused.returncode == 1
                assert "recover" in refused.stderr
                assert len(refused.stderr.strip().splitlines()) == 1
                with Conn(r.port) as conn:
                    assert conn.do("SET", "k0", "of another dataset") == b"OK"
                assert waiting(r.port) == before
        r.restart()
        assert everything(r.port) == must
        assert r.recovered() > 0
        assert waiting(r.port) == 0


@only_offloaded
def test_the_export_is_what_was_lost(tmp_path: Path) -> None:
    """Exported, discarded, applied by redis-cli --pipe on top of the AOF: everything is there."""
    with rig() as r:
        must = crashed_with_leftovers(r)
        saved = tmp_path / "leftovers.resp"
        run = recover("--port", str(r.port), "--export", str(saved), "--discard")
        assert run.returncode == 0, run.stderr
        assert saved.stat().st_mode & 0o077 == 0
        assert r.find() is None
        r.restart()
        assert r.recovered() == 0
        for command in aof_units(saved.read_bytes()):
            assert command[1][0][0] == b"SET"
        if have("redis-cli"):
            pipe = ["redis-cli", "-p", str(r.port), "--pipe"]
            said = subprocess.run(pipe, input=saved.read_bytes(), capture_output=True, check=True, timeout=30)
            assert b"errors: 0" in said.stdout
        else:
            with Conn(r.port) as conn:
                conn.send_bytes(saved.read_bytes())
                assert {conn.read() for _ in aof_units(saved.read_bytes())} == {b"OK"}
        assert everything(r.port) == must


@only_offloaded
def test_the_command_line_of_recover(tmp_path: Path) -> None:
    with rig() as r:
        port = ("--port", str(r.port))
        assert recover(*port).returncode == 0
        assert waiting(r.port) == 0
        r.attach()
        assert waiting(r.port) == 0, "a living server has no leftovers"
        crashed_with_leftovers(r)
        before = waiting(r.port)
        saved = tmp_path / "leftovers.resp"
        assert recover(*port, "--export", str(saved), "--discard", "--dry-run").returncode == 0
        assert not saved.exists()
        assert waiting(r.port) == before
        # A place that cannot be written: one line, and nothing is dropped.
        saved.touch()
        for bad in (saved, tmp_path / "nowhere" / "file", tmp_path):
            run = recover(*port, "--export", str(bad), "--discard")
            assert run.returncode in (1, 2), run.stdout
            assert waiting(r.port) == before
        stopped = cli("offload", "stop", *port)
        assert stopped.returncode == 1
        assert "recover" in stopped.stderr
        assert len(stopped.stderr.strip().splitlines()) == 1
        assert waiting(r.port) == before
        forced = cli("offload", "stop", *port, "--force")
        assert forced.returncode == 0, forced.stderr
        assert waiting(r.port) == 0


@only_offloaded
@pytest.mark.parametrize("writes", [False, True], ids=["it only reads", "it writes"])
def test_a_session_without_the_module(writes: bool) -> None:
    """A plain server takes the AOF as it is; what it writes is not overwritten when the module is back."""
    with rig() as r:
        must = crashed_with_leftovers(r)
        with another(r, ["--appendonly", "yes"], dir=r.dir) as plain:
            before = everything(r.port)
            assert set(before) <= set(must), "a marker stays"
            assert "rror" not in plain.log.read_text()
            if writes:
                with Conn(r.port) as conn:
                    for key in must:
                        assert conn.do("SET", key, "of the plain session") == b"OK"
                    conn.do("DEL", "k0")
                must = everything(r.port)
        r.restart()
        assert everything(r.port) == must
        if writes:
            assert r.kept() > 0
            assert waiting(r.port) > 0


@only_offloaded
def test_without_aof() -> None:
    """What plain Redis would lose is lost, and nothing is in the way."""
    with rig("--appendonly", "no") as r:
        r.attach()
        with Conn(r.port) as conn:
            r.sut().must_serve(conn, ("SET", "k", "v"))
            conn.do("SET", "k", "w")
        r.crash()
        r.restart()
        assert everything(r.port) == {}
        assert waiting(r.port) == 0
        r.attach()
        with Conn(r.port) as conn:
            r.sut().must_serve(conn, ("SET", "k", "v"))
        r.crash()
        r.let_go()
        stopped = cli("offload", "stop", "--port", str(r.port))
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that every user can reach; pytest's own are for its user only."""
    with tempfile.TemporaryDirectory(prefix="kflex-home-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@contextlib.contextmanager
def bpffs_of(mode: int) -> Iterator[None]:
    """bpffs with this mode, afterwards as it was; it must be found again with this mode."""
    mounted = fs.bpffs_root()
    root = mounted or fs.ensure_bpffs()
    before = stat.S_IMODE(root.stat().st_mode)
    root.chmod(mode)
    try:
        yield
        assert stat.S_IMODE(root.stat().st_mode) == mode
    finally:
        root.chmod(before)
        if mounted is None:
            subprocess.run(["umount", root], check=True)


@only_offloaded
@pytest.mark.parametrize("mode", [0o1777, 0o700], ids=["bpffs for all", "bpffs as systemd mounts it"])
def test_the_server_as_another_user(home: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    """redis-server seldom runs as root: it recovers all the same."""
    from kflex_repro import build
    from kflex_repro.redis.server import redis_binary

    if not have("setpriv"):
        unavailable("no setpriv")
    data = home / "data"
    data.mkdir()
    os.chown(data, 65534, 65534)
    module = home / "kflex.so"
    shutil.copy(build.ensure().module, module)
    module.chmod(0o755)
    starter = home / "redis-server"
    starter.write_text(
        f'#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups "{redis_binary()}" "$@"\n'
    )
    starter.chmod(0o755)
    monkeypatch.setenv("KFLEX_REDIS_SERVER", str(starter))
    with bpffs_of(mode), rig(module=module, dir=data) as r:
        assert Path(f"/proc/{r.server.pid}").stat().st_uid == 65534
        must = crashed_with_leftovers(r)
        r.restart()
        assert everything(r.port) == must, r.sut().info()
        assert r.recovered() > 0


# -- the AOF changed since --


def torn(r: Rig) -> dict[bytes, bytes]:
    """The server is dead, and its AOF ends within its last cut, which the journal still has."""
    must = {b"k%d" % n: b"%d" % n + b"~" * (n % 2) for n in range(20)}
    for _ in range(20):
        r.attach()
        with Conn(r.port) as conn:
            conn.do("PING")
            r.sut().must_serve(conn, ("SET", "first", "1"))
            conn.do("DEL", "first")
            r.sut().must_serve(conn, *(("SET", key, value) for key, value in must.items()))
            # It passes: the cut is written before it is answered, and nobody has confirmed it yet.
            conn.do("EXISTS", "k0")
            r.crash()
        aof = incr_file(r.dir)
        data = aof.read_bytes()
        cuts = [end for end, unit in aof_units(data) if len(unit) > 2 and unit[0] == [b"MULTI"]]
        ends = [0, *(end for end, _ in aof_units(data))]
        if r.killed_with[-1] >= len(must) and cuts:
            begin = ends[ends.index(cuts[-1]) - 1]
            with aof.open("r+b") as file:
                file.truncate(begin + (cuts[-1] - begin) * 2 // 3)
            r.let_go()
            return must
        r.restart()
    raise AssertionError("the last cut was confirmed twenty times")


@only_offloaded
@pytest.mark.parametrize("by", ["the server", "redis-check-aof"])
def test_an_aof_that_ends_within_a_cut(by: str) -> None:
    """Truncated, the AOF lacks the whole cut, and recovery brings it back whole."""
    with rig() as r:
        must = torn(r)
        if by == "redis-check-aof":
            if not have("redis-check-aof"):
                unavailable("no redis-check-aof")
            manifest = aof_dir(r.dir) / "appendonly.aof.manifest"
            checker = ["redis-check-aof", "--fix", str(manifest)]
            fixed = subprocess.run(checker, input=b"y\n", capture_output=True, check=True, timeout=30)
            assert b"Successfully truncated" in fixed.stdout, fixed.stdout
        r.restart()
        found = everything(r.port)
        assert {key: found.get(key) for key in must} == must, r.sut().info()


@only_offloaded
@pytest.mark.parametrize("how", ["copied back", "in place"])
def test_an_older_aof_restored(tmp_path: Path, how: str) -> None:
    """A backup is what its owner wants to see: nothing of the time after it comes in."""
    with rig() as r:
        r.attach()
        with Conn(r.port) as conn:
            conn.do("PING")
            r.sut().must_serve(conn, ("SET", "k0", "old"))
            conn.do("EXISTS", "k0")
            old = quiesce(r.port)
            copy_dataset(r.dir, tmp_path)
            # More that is written, and known to be: nobody could make the backup whole.
            cut = int(r.sut().info()["last_cut"])
            r.sut().must_serve(conn, ("SET", "k1", "after the backup"))
            eventually(lambda: int(r.sut().info()["last_cut_written"]) > cut, what="the cut confirmed")
        crashed_with_leftovers(r)
        if how == "copied back":
            shutil.rmtree(aof_dir(r.dir))
            copy_dataset(tmp_path, r.dir)
        else:
            for path in aof_dir(tmp_path).iterdir():
                (aof_dir(r.dir) / path.name).write_bytes(path.read_bytes())
        r.restart()
        assert digest(r.port) == old, everything(r.port)
        assert r.kept() > 0
        assert waiting(r.port) > 0


# -- rewrites --


def slow_rewrites(port: int, us: int) -> None:
    """Each key takes so many microseconds of a rewrite's child."""
    with Conn(port) as conn:
        assert conn.do("CONFIG", "SET", "rdb-key-save-delay", us) == b"OK"


def rewriting(port: int) -> bool:
    with Conn(port) as conn:
        info = conn.do("INFO", "persistence")
    assert isinstance(info, bytes)
    return b"aof_rewrite_in_progress:1" in info or b"aof_rewrite_scheduled:1" in info


@pytest.mark.parametrize("when", ["while", "after", "by itself"])
def test_killed_with_a_rewrite(when: str) -> None:
    """BGREWRITEAOF starts a new file: before it is the base, after it, and when Redis does it by itself."""
    with rig() as r:
        book = Book()
        for n in range(3):
            r.attach()
            if when == "while":
                slow_rewrites(r.port, 20000)
            with Load(r.port, book, seed=n, hammers=n % 2, passing=0.02) as load:
                load.run_for(500)
                with Conn(r.port) as conn:
                    if when == "by itself":
                        conn.do("CONFIG", "SET", "auto-aof-rewrite-min-size", "100kb")
                        conn.do("CONFIG", "SET", "auto-aof-rewrite-percentage", "1")
                    else:
                        conn.do("BGREWRITEAOF")
                manifest = aof_dir(r.dir) / "appendonly.aof.manifest"
                before = manifest.read_text()
                if when == "while":
                    eventually(lambda: rewriting(r.port), what="the rewrite")
                elif when == "after":
                    eventually(lambda: not rewriting(r.port), timeout=20, what="the rewrite's end")
                else:
                    eventually(
                        lambda m=manifest, b=before: m.read_text() != b,
                        timeout=20,
                        what="a rewrite by itself",
                    )
                load.run_for(300)
                orphans = children(r.server.pid)
                r.crash()
                for pid in orphans:
                    kill(pid)
                book = load.stop()
            r.restart()
            must_be_right(book, r.port, f"round {n}, journal {r.killed_with}")


@only_offloaded
def test_killed_between_a_rewrites_new_file_and_its_fork() -> None:
    """The next file is there, empty, and in the manifest: what a server leaves that is killed at that
    moment.
    """
    with rig() as r:
        must = crashed_with_leftovers(r)
        manifest = aof_dir(r.dir) / "appendonly.aof.manifest"
        (aof_dir(r.dir) / "appendonly.aof.2.incr.aof").touch()
        with manifest.open("a") as file:
            file.write("file appendonly.aof.2.incr.aof seq 2 type i\n")
        r.restart()
        assert everything(r.port) == must
        assert r.recovered() > 0


def test_aof_switched_on_and_off() -> None:
    """CONFIG SET appendonly while SETs are served: from the end of its first rewrite on, nothing is lost."""
    with rig("--appendonly", "no") as r:
        r.attach()
        book = Book()
        for n in range(2):
            with Load(r.port, book, seed=n, hammers=0, passing=0.02) as load:
                load.run_for(300)
                with Conn(r.port) as conn:
                    assert conn.do("CONFIG", "SET", "appendonly", "yes") == b"OK"
                    eventually(lambda: not rewriting(r.port), timeout=20, what="the first rewrite")
                    load.run_for(300)
                    if n == 0:
                        assert conn.do("CONFIG", "SET", "appendonly", "no") == b"OK"
                        load.run_for(300)
                        book = load.stop()
                        quiesce(r.port)
                        must_be_right(book, r.port)
                        continue
                load.run_for(300)
                r.crash()
                book = load.stop()
        with another(r, ["--appendonly", "yes"], module=r.built and r.built.module, dir=r.dir):
            must_be_right(book, r.port, f"journal {r.killed_with}")


# -- what a copy of the AOF, and a replica, hold --


def test_the_aof_is_what_the_server_has(tmp_path: Path) -> None:
    """After each quiesce a plain server that loads a copy has the same digest."""
    with rig() as r:
        r.attach()
        book = Book()
        for n in range(3):
            with Load(r.port, book, seed=n) as load:
                load.run_for(1000)
                book = load.stop()
            mine = quiesce(r.port)
            must_be_right(book, r.port)
            backup = tmp_path / str(n)
            backup.mkdir()
            with loaded(copy_dataset(r.dir, backup)) as plain:
                assert digest(plain.port) == mine, n


def torn_anywhere(tmp_path: Path, loads: int, seed: int) -> None:
    with rig() as r:
        r.attach()
        with Load(r.port, seed=seed, owners=4, hammers=0, passing=0.01) as load:
            load.run_for(3000)
            load.stop()
        quiesce(r.port)
        if not PLAIN_ONLY:
            assert r.session.stats()["served_set"] > 500
        data = incr_file(r.dir).read_bytes()
        # Every place between two commands, by our own replay of the file ...
        assert not never_a_state(data)
        # ... and any byte, by Redis's.
        backup = tmp_path / "backup"
        backup.mkdir()
        copy_dataset(r.dir, backup)
        generator = random.Random(seed)
        for n in range(loads):
            at = generator.randrange(len(data))
            torn_dir = tmp_path / f"torn{n}"
            torn_dir.mkdir()
            with incr_file(copy_dataset(backup, torn_dir)).open("r+b") as file:
                file.truncate(at)
            with loaded(torn_dir, "--aof-load-truncated", "yes") as plain:
                found = everything(plain.port)
            shutil.rmtree(torn_dir)
            assert not rings_broken(found), f"cut at byte {at} of {len(data)}"


def test_an_aof_cut_anywhere_is_a_state_that_existed(tmp_path: Path) -> None:
    torn_anywhere(tmp_path, loads=8, seed=1)


@pytest.mark.soak
def test_soak_an_aof_cut_anywhere(tmp_path: Path) -> None:
    torn_anywhere(tmp_path, loads=200, seed=2)


@contextlib.contextmanager
def replica_of(port: int) -> Iterator[Any]:
    from kflex_repro.redis.server import ManagedServer

    with ManagedServer([*BASE_ARGS, "--replicaof", f"127.0.0.1 {port}"]) as replica:
        yield replica


def replicated(replica: Any, port: int) -> bool:
    """The replica's link is up, and it has all that its master has sent."""
    with Conn(replica.port) as mine, Conn(port) as masters:
        if b"master_link_status:up" not in mine.do("INFO", "replication"):
            return False
        return _offset(masters, b"master_repl_offset") == _offset(mine, b"slave_repl_offset")


def _offset(conn: Conn, field_: bytes) -> int:
    info = conn.do("INFO", "replication")
    assert isinstance(info, bytes)
    return int(info.partition(field_ + b":")[2].split()[0])


def ring_keys(owners: int) -> list[bytes]:
    return [ring_key(owner, width, at) for owner in range(owners) for width in (2, 5) for at in range(width)]


def torn_off(rounds: int, seed: int) -> None:
    """A replica whose link breaks at random moments: SETs are served while it is away, and come with the
    backlog.
    """
    generator = random.Random(seed)
    with rig("--repl-backlog-size", "64mb") as r, replica_of(r.port) as replica:
        attach_beside(r)
        book = Book()
        keys = ring_keys(4)
        for n in range(rounds):
            with Load(r.port, book, seed=seed + n, owners=4, hammers=0, passing=0.02) as load:
                load.run_for(300)
                for _ in range(3):
                    how = generator.random()
                    if how < 0.5:
                        with Conn(r.port) as conn:
                            conn.do("CLIENT", "KILL", "TYPE", "replica")
                    load.run_for(generator.randrange(50, 500))
                    os.kill(replica.pid, signal.SIGSTOP)
                    load.run_for(generator.randrange(50, 500))
                    os.kill(replica.pid, signal.SIGCONT)
                    # One command, so one moment of the replica.
                    assert not rings_broken(read_back(replica.port, keys))
                book = load.stop()
            mine = quiesce(r.port)
            eventually(lambda: replicated(replica, r.port), timeout=20, what="the replica")
            must_be_right(book, r.port)
            assert digest(replica.port) == mine == digest(r.port)


def attach_beside(r: Rig) -> None:
    """`offload start` with a replica there: SETs pass until it is away."""
    if PLAIN_ONLY:
        return
    from kflex_repro.offload import attach

    r.session = attach.start(r.port, table_bytes=TABLE, built=r.built)


def test_a_replica_is_always_in_a_state_that_existed() -> None:
    torn_off(rounds=2, seed=1)


@pytest.mark.soak
def test_soak_a_replica() -> None:
    torn_off(rounds=30, seed=2)


# -- each of these would be found --


def finds(tries: int, crash: Callable[[Rig], None], **defines: str) -> list[str]:
    """What a server of a broken build has wrong after a crash, of at most so many."""
    with rig(defines=defines) as r:
        for n in range(tries):
            r.attach()
            crash(r)
            r.restart()
            with Conn(r.port) as conn:
                risen = conn.do("EXISTS", "mortal")
                kept = conn.do("GET", "k")
                if risen or kept != b"last":
                    return [f"try {n}: mortal {risen}, k {kept!r}"]
                conn.do("FLUSHALL")
            r.clear()
    return []


def crash_in_the_journal(r: Rig) -> None:
    with Conn(r.port) as conn:
        conn.do("PING")
        r.sut().must_serve(conn, ("SET", "mortal", "1"))
        conn.do("DEL", "mortal")
        for n in range(200):
            conn.do("SET", "k", n)
        conn.do("SET", "k", "last")
        r.crash()


def crash_after_del(r: Rig) -> None:
    with Conn(r.port) as conn:
        conn.do("PING")
        conn.do("SET", "k", "last")
        r.sut().must_serve(conn, ("SET", "mortal", "1"))
        conn.do("DEL", "mortal")
        r.crash()


@only_offloaded
def test_a_sound_build_has_nothing_wrong() -> None:
    """What the next two look for is not there by itself."""
    assert not finds(3, crash_in_the_journal)
    assert not finds(3, crash_after_del)


@only_offloaded
def test_clean_before_the_aof_write_is_found() -> None:
    assert finds(20, crash_in_the_journal, KFLEX_BREAK_NO_JOURNAL="1")


@only_offloaded
def test_no_cut_number_is_found() -> None:
    assert finds(20, crash_after_del, KFLEX_BREAK_NO_CUT_NUMBER="1")
