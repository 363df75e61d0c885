"""Servers in namespaces of their own, clients in others, and several servers on one host."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kflex_repro import build
from kflex_repro.bench.netns import VethPair, inside
from kflex_repro.errors import KflexError
from kflex_repro.offload import attach, netns
from kflex_repro.offload import session as offload
from kflex_repro.redis.server import ManagedServer, free_port
from tests.conftest import unavailable
from tests.redis.containers import Contained, ip, nft, public_directory
from tests.redis.harness import (
    PLAIN_ONLY,
    Conn,
    Snapshot,
    Timeout,
    cli,
    eventually,
    need_offload,
)

pytestmark = [
    pytest.mark.bpf,
    pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no offload to look for"),
]

ROOT = Path(__file__).resolve().parents[2]
TABLE = 32 << 20
V6_SERVER, V6_CLIENT = "fd6b:666c:78::1", "fd6b:666c:78::2"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each of these tests leaves nothing."""
    need_offload()
    before = Snapshot.take()
    yield
    before.must_return()


@pytest.fixture
def veth() -> Iterator[VethPair]:
    """Two network namespaces joined by a veth pair, with IPv4 and IPv6."""
    with VethPair() as pair:
        ip(pair.server_ns, "address", "add", f"{V6_SERVER}/64", "dev", "kfb-s", "nodad")
        ip(pair.client_ns, "address", "add", f"{V6_CLIENT}/64", "dev", "kfb-c", "nodad")
        yield pair


@contextlib.contextmanager
def contained(namespace: str | None, *, bind: str = "* -::*", port: int | None = None, **kw: Any) -> Any:
    """A server with the module in a container-like place."""
    module = kw.pop("module", None) or build.ensure().module
    args = ["--protected-mode", "no"]
    with Contained(args, netns=namespace, bind=bind, port=port, module=module, **kw) as server:
        yield server
        # So that a failed test leaves no programs behind.
        with contextlib.suppress(KflexError):
            left = offload.find(server.port, netns.of(server.pid))
            if left is not None:
                left.stop(timeout=2, force=True)


def connect(namespace: str | None, host: str, port: int, **kw: Any) -> Conn:
    """A connection made inside a network namespace: its socket stays there."""
    with inside(namespace):
        return Conn(port, host, **kw)


def served(session: Any) -> int:
    stats = session.stats()
    return int(stats["served_get"] + stats["served_set"])


def must_serve(session: Any, conn: Conn, key: str) -> None:
    """GET and SET on this connection are answered in the kernel, and rightly."""
    assert conn.do("PING") == b"PONG"
    conn.do("SET", key, "0")

    def both() -> bool:
        before = served(session)
        assert conn.do("SET", key, "1") == b"OK"
        assert conn.do("GET", key) == b"1"
        return served(session) == before + 2

    eventually(both, what="SET and GET served in the kernel")


def must_pass(session: Any, conn: Conn, key: str, rounds: int = 40) -> None:
    """Redis itself answers everything, and rightly."""
    before = served(session)
    for number in range(rounds):
        assert conn.do("SET", key, number) == b"OK"
        assert conn.do("GET", key) == b"%d" % number
    assert served(session) == before


# --- a server in namespaces of its own ---------------------------------------------------------------------


@pytest.mark.parametrize("by", ["pid", "name"])
def test_clients_in_the_servers_namespace_and_in_another(veth: VethPair, by: str) -> None:
    with contained(veth.server_ns) as server:
        where = netns.of(server.pid) if by == "pid" else netns.named(veth.server_ns)
        with attach.start(server.port, table_bytes=TABLE, where=where) as session:
            assert session.pid == server.pid
            places = [
                (veth.server_ns, "127.0.0.1"),
                (veth.server_ns, "::1"),
                (veth.server_ns, veth.server_host),
                (veth.server_ns, V6_SERVER),
                (veth.client_ns, veth.server_host),
                (veth.client_ns, V6_SERVER),
            ]
            for namespace, host in places:
                with connect(namespace, host, server.port) as conn:
                    must_serve(session, conn, f"key of {host}")
            # What one of them wrote the others read, and Redis itself has it.
            with connect(veth.client_ns, veth.server_host, server.port) as conn:
                assert conn.do("GETRANGE", "key of ::1", 0, -1) == b"1"
            assert session.stats()["open_commands"] == 0


def test_a_server_bound_to_some_addresses_only(veth: VethPair) -> None:
    bind = f"{veth.server_host} {V6_SERVER}"
    with contained(veth.server_ns, bind=bind) as server:
        where = netns.named(veth.server_ns)
        with pytest.raises(KflexError, match="nothing listens"):
            attach.start(server.port, table_bytes=TABLE, where=where)
        with attach.start(server.port, V6_SERVER, table_bytes=TABLE, where=where) as session:
            for host in (veth.server_host, V6_SERVER):
                with connect(veth.client_ns, host, server.port) as conn:
                    must_serve(session, conn, host)


def test_an_address_that_comes_later(veth: VethPair) -> None:
    """It is served after a second start; the first has not heard of it."""
    with contained(veth.server_ns) as server:
        where = netns.of(server.pid)
        with attach.start(server.port, table_bytes=TABLE, where=where) as session:
            ip(veth.server_ns, "address", "add", "10.121.7.1/24", "dev", "kfb-s")
            ip(veth.client_ns, "address", "add", "10.121.7.2/24", "dev", "kfb-c")
            with connect(veth.client_ns, "10.121.7.1", server.port) as conn:
                must_pass(session, conn, "k")
            attach.start(server.port, where=where).close()
            with connect(veth.client_ns, "10.121.7.1", server.port) as conn:
                must_serve(session, conn, "k")
            ip(veth.server_ns, "address", "delete", "10.121.7.1/24", "dev", "kfb-s")
            attach.start(server.port, where=where).close()
            assert "::ffff:10.121.7.1" not in {str(each) for each in netns.addresses(server.pid)}


def test_the_command_line(veth: VethPair) -> None:
    """--pid and --netns name the same server; a start without them says what it needs."""
    with contained(veth.server_ns) as server:
        port = str(server.port)
        lost = cli("offload", "start", "--port", port)
        assert lost.returncode == 1
        assert "--pid" in lost.stderr and len(lost.stderr.splitlines()) == 1
        pid = ("--pid", str(server.pid))
        plan = cli("offload", "start", "--port", port, *pid, "--dry-run")
        assert plan.returncode == 0 and plan.stdout.startswith("would attach"), plan
        assert offload.find(server.port) is None
        first = cli("offload", "start", "--port", port, *pid, "--table-size", "32m", "--json")
        assert first.returncode == 0, first.stderr
        again = cli("offload", "start", "--port", port, "--netns", veth.server_ns, "--json")
        assert json.loads(again.stdout)["server_id"] == json.loads(first.stdout)["server_id"]
        path = f"/run/netns/{veth.server_ns}"
        shown = cli("offload", "status", "--port", port, "--netns", path, "--json")
        assert [one["pid"] for one in json.loads(shown.stdout)] == [server.pid]
        inode = Path(path).stat().st_ino
        assert [one["netns"] for one in json.loads(shown.stdout)] == [inode]
        assert f"network namespace {inode}" in cli("offload", "status", "--port", port, *pid).stdout
        other = cli("offload", "status", "--port", port, "--netns", veth.client_ns)
        assert other.returncode == 1 and "no offload is attached" in other.stderr
        stopped = cli("offload", "stop", "--port", port, *pid)
        assert stopped.returncode == 0 and "stopped" in stopped.stdout, stopped
        assert offload.find(server.port) is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--pid", "4000000"), "no process"),
        (("--netns", "kflex-no-such"), "no such network namespace"),
        (("--netns", "/etc/hostname"), "not a network namespace"),
        (("--netns", "/proc/self/ns/pid"), "not a network namespace"),
        (("--netns", "x", "--pid", "1"), "give one"),
    ],
)
def test_no_such_place(args: Sequence[str], says: str) -> None:
    run = cli("offload", "start", *args)
    assert run.returncode != 0 and says in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_a_toolkit_inside_a_container_says_so() -> None:
    """Its process ids are not those that BPF programs see."""
    run = subprocess.run(
        [
            *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *(sys.executable, "-m", "kflex_repro", "offload", "start"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    assert run.returncode == 3 and "run it on the host" in run.stderr, run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_container_that_is_killed_and_started_again(veth: VethPair) -> None:
    """Another process, the same port and namespace: the old session goes, nothing of it is served."""
    with contained(veth.server_ns) as server:
        where = netns.named(veth.server_ns)
        first = attach.start(server.port, table_bytes=TABLE, where=where)
        with connect(veth.client_ns, veth.server_host, server.port) as conn:
            must_serve(first, conn, "k")
            server.kill()
            eventually(lambda: first.disabled == "server_gone")
        server.start()
        with attach.start(server.port, table_bytes=TABLE, where=where) as second:
            assert not first.pin_dir.exists()
            first.close()
            with connect(veth.client_ns, veth.server_host, server.port) as conn:
                assert conn.do("GET", "k") is None
                must_serve(second, conn, "k")


def test_a_server_in_a_chroot(tmp_path: Path) -> None:
    """Another root and mount namespace, the host's network."""
    root = tmp_path / "root"
    root.mkdir()
    script = f'mount --rbind / {root} && exec chroot {root} "$@"'
    with contained(None, wrap=["unshare", "--mount", "sh", "-c", script, "sh"]) as server:
        assert Path(f"/proc/{server.pid}/root").readlink() == root
        with attach.start(server.port, table_bytes=TABLE) as session, Conn(server.port) as conn:
            must_serve(session, conn, "k")


def test_a_server_in_a_user_namespace() -> None:
    """A rootless container does not know the host's root: the toolkit comes to it as its own user."""
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    rootless = (*nobody, "unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    if subprocess.run([*rootless, "true"], capture_output=True, check=False).returncode:
        unavailable("this machine has no user namespaces for users")
    give = ("sh", "-c", 'chown 65534 {home} && exec "$@"', "sh")
    up = ("sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    with (
        public_directory(65534) as home,
        contained(
            None,
            wrap=[*give, *rootless, *up],
            module=shutil.copy(build.ensure().module, home),
            dir=home,
        ) as server,
    ):
        where = netns.of(server.pid)
        assert netns.user_of(server.pid) == 65534
        with attach.start(server.port, table_bytes=TABLE, where=where) as session:
            made: list[Conn] = []
            netns.call(where, lambda: made.append(Conn(server.port)))
            with made[0] as conn:
                must_serve(session, conn, "k")


# --- what must be left alone -------------------------------------------------------------------------------


def test_connections_to_other_servers_are_not_touched(veth: VethPair) -> None:
    """Same port, but loopback of another namespace, or an address that is not the server's."""
    with (
        contained(veth.server_ns) as server,
        contained(veth.client_ns, port=server.port) as foreign,
        attach.start(server.port, table_bytes=TABLE, where=netns.of(server.pid)) as session,
    ):
        assert foreign.port == server.port
        others = [
            connect(veth.client_ns, "127.0.0.1", server.port),
            connect(veth.client_ns, "::1", server.port),
            connect(veth.client_ns, veth.client_host, server.port),
            connect(veth.server_ns, veth.client_host, server.port),
            connect(veth.server_ns, V6_CLIENT, server.port),
        ]
        for conn in others:
            must_pass(session, conn, "k")
        assert session.enrolled() == {}
        with connect(veth.client_ns, veth.server_host, server.port) as conn:
            assert conn.do("GET", "k") is None
            must_serve(session, conn, "k")
            assert len(session.enrolled()) == 1
        for conn in others:
            assert conn.do("GET", "k") == b"39"
            conn.close()


@pytest.mark.parametrize(
    ("rule", "host"),
    [
        # An address of nobody's, sent to the server: as a published port or a service address.
        (
            "hook output priority -100; ip daddr 10.121.99.9 dnat to {server}",
            "10.121.99.9",
        ),
        # The client's port is another one on the way: as behind a masquerading router.
        (
            "hook postrouting priority 100; tcp dport {port} snat to {client}:20000-20999",
            None,
        ),
    ],
    ids=["dnat", "snat"],
)
def test_clients_behind_address_translation(veth: VethPair, rule: str, host: str | None) -> None:
    """Nothing pairs, all of it passes, and the connection is given back to plain TCP."""
    ip(veth.client_ns, "route", "add", "default", "via", veth.server_host)
    with (
        contained(veth.server_ns) as server,
        attach.start(server.port, table_bytes=TABLE, where=netns.of(server.pid)) as session,
    ):
        text = rule.format(server=veth.server_host, client=veth.client_host, port=server.port)
        nft(veth.client_ns, f"type nat {text}")
        with connect(veth.client_ns, host or veth.server_host, server.port) as conn:
            must_pass(session, conn, "k")

            def released() -> bool:
                assert conn.do("GET", "k") == b"39"
                return session.enrolled() == {}

            eventually(released, what="the client's socket given back")
        assert session.stats()["paired"] == 0


def test_a_server_address_that_is_another_server(veth: VethPair) -> None:
    """The client's namespace sends the server's address elsewhere: right answers, from there."""
    with (
        contained(veth.server_ns) as server,
        contained(veth.client_ns, port=server.port) as foreign,
        attach.start(server.port, table_bytes=TABLE, where=netns.of(server.pid)) as session,
    ):
        with connect(veth.server_ns, "127.0.0.1", server.port) as conn:
            must_serve(session, conn, "k")
        nft(
            veth.client_ns,
            "type nat hook output priority -100; "
            f"ip daddr {veth.server_host} tcp dport {foreign.port} dnat to {veth.client_host}",
        )
        with connect(veth.client_ns, veth.server_host, server.port) as conn:
            assert conn.do("GET", "k") is None
            must_pass(session, conn, "k")
        with connect(veth.server_ns, "127.0.0.1", server.port) as conn:
            assert conn.do("GET", "k") == b"1"


@contextlib.contextmanager
def relay(namespace: str, listen: tuple[str, int], to: tuple[str, int]) -> Iterator[None]:
    """Copies bytes both ways, one thread for all, inside a network namespace."""
    with inside(namespace):
        listener = socket.create_server(listen)
    wake, wakes = socket.socketpair()
    peers: dict[socket.socket, socket.socket] = {}

    def run() -> None:
        while True:
            for ready in select.select([listener, wakes, *peers], [], [])[0]:
                if ready is wakes:
                    return
                if ready is listener:
                    near, _ = listener.accept()
                    with inside(namespace):
                        far = socket.create_connection(to)
                    peers[near], peers[far] = far, near
                elif ready in peers:
                    data = b""
                    with contextlib.suppress(OSError):
                        data = ready.recv(1 << 16)
                    if data:
                        peers[ready].sendall(data)
                    else:
                        for each in (peers.pop(ready), ready):
                            peers.pop(each, None)
                            each.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        wake.close()
        thread.join()
        for each in (listener, wakes, *peers):
            each.close()


def test_clients_of_a_relay(veth: VethPair) -> None:
    """As a container engine's proxy: its own connection is served, its clients' are not touched."""
    with (
        contained(veth.server_ns) as server,
        attach.start(server.port, table_bytes=TABLE, where=netns.of(server.pid)) as session,
        relay(veth.client_ns, ("127.0.0.1", server.port), (veth.server_host, server.port)),
        connect(veth.client_ns, "127.0.0.1", server.port) as conn,
    ):
        must_serve(session, conn, "k")
        assert len(session.enrolled()) == 1


def test_a_connection_that_the_server_has_left(veth: VethPair) -> None:
    """Its FIN is lost between the namespaces: the client is not answered in the server's name."""
    with (
        contained(veth.server_ns) as server,
        attach.start(server.port, table_bytes=TABLE, where=netns.of(server.pid)) as session,
    ):
        conn = connect(veth.client_ns, veth.server_host, server.port, timeout=0.5)
        must_serve(session, conn, "k")
        address = "{}:{}".format(*conn.sock.getsockname())
        ip(veth.server_ns, "link", "set", "kfb-s", "down")
        with connect(veth.server_ns, "127.0.0.1", server.port) as control:
            assert control.do("CLIENT", "KILL", "ADDR", address) == 1
            assert control.do("SET", "k", "after") == b"OK"
        before = served(session)
        with pytest.raises(Timeout):
            conn.do("GET", "k")
        assert served(session) == before
        conn.reset()


# --- several servers, several toolkits ---------------------------------------------------------------------


def test_two_servers_on_one_port_in_two_namespaces(veth: VethPair) -> None:
    with (
        contained(veth.server_ns) as one,
        contained(veth.client_ns, port=one.port) as two,
        attach.start(one.port, table_bytes=TABLE, where=netns.of(one.pid)) as first,
    ):
        with attach.start(two.port, table_bytes=TABLE, where=netns.of(two.pid)) as second:
            assert first.server_id != second.server_id
            assert (first.pid, second.pid) == (one.pid, two.pid)
            with connect(veth.server_ns, "127.0.0.1", one.port) as a:
                with connect(veth.client_ns, "127.0.0.1", two.port) as b:
                    must_serve(first, a, "k")
                    must_serve(second, b, "k")
                    assert a.do("SET", "k", "one") == b.do("SET", "k", "two") == b"OK"
                    assert (a.do("GET", "k"), b.do("GET", "k")) == (b"one", b"two")
                # And across: each address is its own server's.
                with connect(veth.server_ns, veth.client_host, two.port) as across:
                    must_serve(second, across, "across")
                assert a.do("GET", "across") is None
            found = offload.find(one.port, netns.of(two.pid))
            assert found is not None
            found.close()
        # One of them stopped: the other goes on.
        assert offload.find(two.port, netns.of(two.pid)) is None
        with connect(veth.server_ns, "127.0.0.1", one.port) as conn:
            must_serve(first, conn, "k")
        with connect(veth.client_ns, "127.0.0.1", two.port) as conn:
            must_pass(first, conn, "k")


def test_two_servers_on_two_ports_one_with_the_module() -> None:
    with ManagedServer(module=build.ensure().module) as loaded, ManagedServer() as bare:
        with pytest.raises(KflexError, match=r"has not loaded kflex\.so"):
            attach.start(bare.port, table_bytes=TABLE)
        with (
            attach.start(loaded.port, table_bytes=TABLE) as session,
            Conn(loaded.port) as conn,
            Conn(bare.port) as other,
        ):
            must_pass(session, other, "k")
            must_serve(session, conn, "k")
            assert len(session.enrolled()) == 1
            assert other.do("GET", "k") == b"39"


def test_two_loaded_servers_on_two_ports() -> None:
    """Each has its own table; stopping one leaves the other."""
    module = build.ensure().module
    with ManagedServer(module=module) as one, ManagedServer(module=module) as two:
        with attach.start(one.port, table_bytes=TABLE) as first:
            with attach.start(two.port, table_bytes=TABLE) as second, Conn(two.port) as conn:
                must_serve(second, conn, "k")
                assert conn.do("SET", "k", "two") == b"OK"
            with Conn(one.port) as conn:
                assert conn.do("GET", "k") is None
                must_serve(first, conn, "k")
        with Conn(two.port) as conn:
            assert conn.do("GET", "k") == b"two"


def test_two_toolkits_on_one_server() -> None:
    """Both starts succeed and one session results; both stops succeed and nothing remains."""
    with ManagedServer(module=build.ensure().module) as server:
        port = str(server.port)

        def twice(*args: str) -> list[tuple[int, str]]:
            running = [
                subprocess.Popen(
                    [sys.executable, "-m", "kflex_repro", "offload", *args, "--port", port],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=ROOT,
                )
                for _ in range(2)
            ]
            said = [process.communicate(timeout=60)[0] for process in running]
            return [(process.returncode, text) for process, text in zip(running, said, strict=True)]

        started = twice("start", "--table-size", "32m", "--json")
        assert [code for code, _ in started] == [0, 0], started
        assert len({json.loads(text)["server_id"] for _, text in started}) == 1
        session = offload.find(server.port)
        assert session is not None
        with Conn(server.port) as conn:
            must_serve(session, conn, "k")
        session.close()
        stopped = twice("stop")
        assert [code for code, _ in stopped] == [0, 0], stopped
        assert offload.find(server.port) is None
        with Conn(server.port) as conn:
            assert conn.do("GET", "k") == b"1"


def test_a_port_of_this_host_is_no_port_of_a_container(veth: VethPair) -> None:
    """A host's server and a container's on one port: `start` without a namespace means the host's."""
    port = free_port()
    with (
        ManagedServer(module=build.ensure().module, port=port) as ours,
        contained(veth.server_ns, port=port) as theirs,
        attach.start(port, table_bytes=TABLE) as session,
    ):
        assert session.pid == ours.pid
        with attach.start(port, table_bytes=TABLE, where=netns.of(theirs.pid)) as other:
            assert other.pid == theirs.pid
            with Conn(port) as here, connect(veth.client_ns, veth.server_host, port) as there:
                must_serve(session, here, "k")
                must_serve(other, there, "k")
