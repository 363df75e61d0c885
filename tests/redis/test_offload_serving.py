"""GET and SET of clients on this host are answered in the kernel: which, over what, by which system calls."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from kflex_repro.redis.resp import encode_command, encode_pipeline
from tests.redis.harness import Conn, Sut, eventually, have, offloaded_server, plain_server, rng

pytestmark = [pytest.mark.bpf, pytest.mark.emulated]


def must_serve_both(sut: Sut, conn: Conn, key: bytes | str, value: bytes | str) -> None:
    sut.must_serve(conn, ("SET", key, value))
    sut.must_serve(conn, ("GET", key))


@pytest.mark.smoke("serving")
def test_the_first_request_goes_to_redis_and_the_rest_is_served(sut: Sut) -> None:
    conn = sut.connect()
    before = sut.stats()
    assert conn.do("SET", "k", "v0") == b"OK"
    if sut.offloaded:
        assert sut.stats()["why_new"] == before["why_new"] + 1
    must_serve_both(sut, conn, "k", "v1")
    assert conn.do("GET", "k") == b"v1"


@pytest.mark.smoke("serving")
def test_a_get_that_misses_makes_its_key_resident(sut: Sut, conn: Conn) -> None:
    other = sut.connect()
    assert other.do("MSET", "a", "1", "b", "x" * 4096, "c", "") == b"OK"
    sut.warm(conn, "a", "b", "c")
    assert [conn.do("GET", key) for key in "abc"] == [b"1", b"x" * 4096, b""]


def test_a_missing_key_is_nil_and_never_served(sut: Sut, conn: Conn) -> None:
    assert conn.do("GET", "nothing") is None
    assert not sut.serves_get(conn, "nothing")
    assert conn.do("GET", "nothing") is None


@pytest.mark.smoke("serving")
@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 63, 64, 65, 1000, 2047, 2048, 2049, 4000, 4095, 4096])
def test_values_up_to_4096_bytes_are_served(sut: Sut, conn: Conn, size: int) -> None:
    value = rng("value", size).randbytes(size)
    assert conn.do("SET", "k", value) == b"OK"
    assert conn.do("GET", "k") == value
    must_serve_both(sut, conn, "k", value)
    assert conn.do("GET", "k") == value
    assert conn.do("GETRANGE", "k", 0, -1) == value


@pytest.mark.smoke("serving")
@pytest.mark.parametrize("size", [4097, 5000, 16_384, 1_000_000])
def test_larger_values_pass(sut: Sut, conn: Conn, size: int) -> None:
    value = rng("large", size).randbytes(size)
    assert conn.do("SET", "k", "small") == b"OK"
    assert not sut.serves_set(conn, "k", value)
    assert conn.do("GET", "k") == value
    assert not sut.serves_get(conn, "k")
    assert conn.do("SET", "k", "small again") == b"OK"
    assert conn.do("GET", "k") == b"small again"


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 63, 64, 65, 249, 250])
def test_keys_up_to_250_bytes_are_served(sut: Sut, conn: Conn, size: int) -> None:
    key = rng("key", size).randbytes(size)
    assert conn.do("SET", key, "v") == b"OK"
    must_serve_both(sut, conn, key, "w" * size)
    assert conn.do("GET", key) == b"w" * size


@pytest.mark.parametrize("size", [251, 255, 256, 257, 1000])
def test_longer_keys_pass(sut: Sut, conn: Conn, size: int) -> None:
    key = rng("key", size).randbytes(size)
    assert not sut.serves_set(conn, key, "v")
    assert not sut.serves_get(conn, key)
    assert conn.do("GET", key) == b"v"
    # One that differs after the 250th byte only is another key.
    assert conn.do("GET", key[:250]) is None


def test_the_empty_key_is_a_key(sut: Sut, conn: Conn) -> None:
    assert conn.do("SET", "", "empty") == b"OK"
    assert conn.do("GET", "") == b"empty"
    assert conn.do("DEL", "") == 1
    assert conn.do("GET", "") is None


@pytest.mark.parametrize("name", ["get", "Get", "gET", "GET"])
def test_any_case(sut: Sut, conn: Conn, name: str) -> None:
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    sut.must_serve(conn, (name, "k"))
    sut.must_serve(conn, (name.lower().replace("get", "sEt"), "k", "v"))
    assert conn.do(name, "k") == b"v"


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "k", "x"),
        ("GET",),
        ("SET", "k"),
        ("SET", "k", "v", "NX"),
        ("SET", "k", "v", "GET"),
        ("SET", "k", "v", "KEEPTTL"),
        ("GETX", "k"),
        ("SETNX", "k", "v"),
        ("STRLEN", "k"),
    ],
)
def test_what_is_no_plain_get_or_set_passes(sut: Sut, conn: Conn, command: tuple[str, ...]) -> None:
    conn.do("SET", "k", "v")
    assert not sut.serves(conn, command)


@pytest.mark.smoke("serving")
@pytest.mark.parametrize("count", [1, 2, 16, 32])
def test_a_pipeline_is_served_whole(sut: Sut, conn: Conn, count: int) -> None:
    keys = [f"resident{i}" for i in range(count)]
    assert conn.do("MSET", *(word for key in keys for word in (key, "v of " + key))) == b"OK"
    sut.warm(conn, *keys)
    commands = [("SET", f"k{i}", f"v{i}") if i % 2 else ("GET", keys[i]) for i in range(count)]
    expected = [b"OK" if i % 2 else b"v of resident%d" % i for i in range(count)]
    assert conn.pipeline(*commands) == expected
    sut.must_serve(conn, *commands)
    assert conn.pipeline(*commands) == expected


@pytest.mark.smoke("serving")
def test_a_pipeline_passes_whole(sut: Sut, conn: Conn) -> None:
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    before = sut.served()
    commands = [("GET", "k"), ("SET", "k", "w"), ("STRLEN", "k"), ("GET", "k")]
    assert conn.pipeline(*commands) == [b"v", b"OK", 1, b"w"]
    assert sut.served() == before


def test_a_long_pipeline_is_right_however_it_goes(sut: Sut, conn: Conn) -> None:
    commands = [("SET", f"k{i % 50}", f"v{i}") for i in range(500)] + [("GET", f"k{i}") for i in range(50)]
    assert conn.pipeline(*commands) == [b"OK"] * 500 + [b"v%d" % (450 + i) for i in range(50)]


def test_a_key_twice_in_one_message(sut: Sut, conn: Conn) -> None:
    values = [b"1", b"22" * 60, b"3"]
    commands = [command for value in values for command in (("SET", "k", value), ("GET", "k"))]
    expected = [reply for value in values for reply in (b"OK", value)]
    for _ in range(3):
        assert conn.pipeline(*commands) == expected
    assert conn.do("GETRANGE", "k", 0, -1) == b"3"


@pytest.mark.smoke("serving")
def test_ipv6(sut: Sut) -> None:
    conn = sut.connect("::1")
    assert conn.do("SET", "six", "v") == b"OK"
    must_serve_both(sut, conn, "six", "w")
    four = sut.connect()
    assert four.do("GET", "six") == b"w"


def test_a_dual_stack_listener_serves_mapped_addresses() -> None:
    """Redis itself listens on v4 and v6 apart; ::ffff:127.0.0.1 is how a v6 socket reaches the v4 one."""
    with offloaded_server() as sut:
        sock = socket.socket(socket.AF_INET6)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.connect(("::ffff:127.0.0.1", sut.port))
        sock.settimeout(5)
        for _ in range(10):
            sock.sendall(encode_command("SET", "mapped", "v"))
            assert sock.recv(100) == b"+OK\r\n"
            sock.sendall(encode_command("GET", "mapped"))
            assert sock.recv(100) == b"$1\r\nv\r\n"
        sock.close()
        if sut.offloaded:
            assert sut.served() > 10


@pytest.mark.smoke("serving")
def test_resp3_reads_the_same(sut: Sut) -> None:
    conn = sut.connect(proto=3)
    assert conn.do("SET", "k", "v") == b"OK"
    must_serve_both(sut, conn, "k", "w")
    assert conn.do("GET", "k") == b"w"
    conn.send_bytes(encode_command("GET", "no such key"))
    assert conn.read_bytes(3) == b"_\r\n"


def test_a_client_over_the_unix_socket_sees_and_is_seen() -> None:
    with offloaded_server(unix=True) as sut:
        conn = sut.connect()
        sut.warm(conn)
        local = redis.Redis(unix_socket_path=str(sut.server.unix_path))
        for number in range(200):
            assert conn.do("SET", "k", f"tcp {number}") == b"OK"
            assert local.get("k") == b"tcp %d" % number
            assert local.set("k", f"unix {number}")
            assert conn.do("GET", "k") == b"unix %d" % number
            assert local.incr("n") == 2 * number + 1
            assert conn.do("GET", "n") == b"%d" % (2 * number + 1)
            assert conn.do("SET", "n", 2 * number + 2) == b"OK"
        local.close()


# -- client libraries and system calls --


@pytest.mark.smoke("serving")
def test_redis_py(sut: Sut) -> None:
    before = sut.served()
    client = redis.Redis(port=sut.port)
    for number in range(50):
        assert client.set("k", f"v{number}")
        assert client.get("k") == b"v%d" % number
    if sut.offloaded:
        assert sut.served() > before + 50
    assert client.get("none") is None
    assert client.incr("n") == 1
    assert client.get("n") == b"1"
    assert client.mget("k", "n", "none") == [b"v49", b"1", None]
    client.set("soon", "x", ex=100)
    assert client.ttl("soon") > 90
    client.close()


def test_redis_py_pipelines_and_transactions(sut: Sut) -> None:
    client = redis.Redis(port=sut.port)
    client.set("k", "0")
    for transaction in (True, False):
        for number in range(20):
            with client.pipeline(transaction=transaction) as pipe:
                pipe.set("k", number).get("k").incr("k").get("k")
                assert pipe.execute() == [True, b"%d" % number, number + 1, b"%d" % (number + 1)]
            assert client.get("k") == b"%d" % (number + 1)
    with client.pipeline() as pipe:
        pipe.watch("k")
        pipe.get("k")
        client.set("k", "changed")
        pipe.multi()
        pipe.set("k", "lost")
        with pytest.raises(redis.WatchError):
            pipe.execute()
    assert client.get("k") == b"changed"
    client.close()


def test_redis_py_from_many_threads(sut: Sut) -> None:
    pool = redis.ConnectionPool(port=sut.port, max_connections=8)
    wrong: list[object] = []

    def work(name: int) -> None:
        client = redis.Redis(connection_pool=pool)
        try:
            for number in range(200):
                client.set(f"thread{name}", number)
                got = client.get(f"thread{name}")
                if got != b"%d" % number:
                    wrong.append((name, number, got))
                if number % 20 == 0 and client.incr(f"counter{name}") != number // 20 + 1:
                    wrong.append((name, "counter"))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    pool.disconnect()


def test_redis_py_resp3(sut: Sut) -> None:
    client = redis.Redis(port=sut.port, protocol=3)
    for number in range(20):
        client.set("k", number)
        assert client.get("k") == b"%d" % number
        assert client.get("none") is None
    client.close()


def test_redis_py_asyncio(sut: Sut) -> None:
    import asyncio

    before = sut.served()

    async def work() -> None:
        client = redis.asyncio.Redis(port=sut.port, max_connections=8)

        async def one(name: int) -> None:
            for number in range(60):
                assert await client.set(f"task{name}", number)
                assert await client.get(f"task{name}") == b"%d" % number
                if number % 10 == 0:
                    assert await client.incr(f"task{name}") == number + 1
                    assert await client.get(f"task{name}") == b"%d" % (number + 1)

        try:
            # No more at once than there are connections: the pool refuses, it does not wait.
            for _ in range(3):
                await asyncio.gather(*(one(name) for name in range(8)))
        finally:
            await client.aclose()

    asyncio.run(work())
    if sut.offloaded:
        assert sut.served() > before + 100


@pytest.mark.skipif(not have("redis-cli"), reason="no redis-cli")
def test_redis_cli(sut: Sut) -> None:
    def run(*args: str, **kw: Any) -> subprocess.CompletedProcess[bytes]:
        command = ["redis-cli", "-p", str(sut.port), *args]
        return subprocess.run(command, capture_output=True, timeout=60, check=True, **kw)

    lines = b"".join(b"SET k%d v%d\nGET k%d\nSTRLEN k%d\n" % ((number,) * 4) for number in range(500))
    said = run(input=lines).stdout.splitlines()
    assert said == [word for n in range(500) for word in (b"OK", b"v%d" % n, b"%d" % len(f"v{n}"))]
    # Mass insertion: large pieces, replies read when they come.
    data = encode_pipeline([("SET", f"k{number % 700}", f"{number}:" + "x" * 50) for number in range(20_000)])
    said = run("--pipe", input=data).stdout.splitlines()
    assert b"errors: 0, replies: 20000" in said
    with Conn(sut.port) as conn:
        for number in range(19_300, 20_000):
            assert conn.do("GET", f"k{number % 700}").startswith(b"%d:" % number)


@pytest.mark.skipif(not have("redis-benchmark"), reason="no redis-benchmark")
@pytest.mark.parametrize("pipeline", ["1", "16", "100"])
def test_redis_benchmark(sut: Sut, pipeline: str) -> None:
    args = [
        "-p",
        str(sut.port),
        "-n",
        "20000",
        "-c",
        "20",
        "-r",
        "1000",
        "-t",
        "set,get,incr,lpush",
        "-P",
        pipeline,
    ]
    run = subprocess.run(
        ["redis-benchmark", *args, "-q"], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("requests per second") == 4, run.stdout
    assert "rror" not in run.stdout + run.stderr


def own_address() -> str | None:
    """An address of this host that is not of the loopback interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return None


def test_an_address_of_the_host_is_local_too() -> None:
    address = own_address()
    if address is None or address.startswith("127."):
        pytest.skip("this host has only loopback addresses")
    with offloaded_server(["--protected-mode", "no"], bind=f"127.0.0.1 {address}") as sut:
        conn = sut.connect(address)
        conn.do("PING")
        must_serve_both(sut, conn, "k", "v")
        other = sut.connect()
        other.do("PING")
        for number in range(20):
            assert conn.do("SET", "k", number) == b"OK"
            assert other.do("GET", "k") == b"%d" % number


def test_scattered_writes(sut: Sut, conn: Conn) -> None:
    """writev() and sendmsg() of several pieces are one message."""
    conn.do("SET", "k", "v")
    request = encode_command("SET", "k", b"x" * 3000) + encode_command("GET", "k")
    for size in (1, 2, 7, 100, 1500):
        pieces = [request[at : at + size] for at in range(0, len(request), size)][:1000]
        whole = b"".join(pieces)
        sent = conn.sock.sendmsg(pieces)
        conn.sock.sendall(request[sent:] if len(whole) == len(request) else request[len(whole) :])
        assert [conn.read(), conn.read()] == [b"OK", b"x" * 3000]
    before = sut.served()
    for _ in range(5):
        os.writev(conn.sock.fileno(), [b"*2\r\n", b"$3\r\nGET\r\n", b"$1\r\nk\r\n"])
        assert conn.read() == b"x" * 3000
    if sut.offloaded:
        assert sut.served() > before


def test_sendfile(sut: Sut, conn: Conn, tmp_path: Path) -> None:
    file = tmp_path / "commands"
    file.write_bytes(encode_pipeline([("SET", "k", "from a file"), ("GET", "k"), ("STRLEN", "k")]))
    conn.do("SET", "k", "v")
    for _ in range(3):
        with file.open("rb") as stream:
            conn.sock.settimeout(None)
            os.sendfile(conn.sock.fileno(), stream.fileno(), 0, file.stat().st_size)
            conn.sock.settimeout(10)
        assert [conn.read() for _ in range(3)] == [b"OK", b"from a file", 11]
        assert conn.do("GET", "k") == b"from a file"


def test_held_back_writes(sut: Sut, conn: Conn) -> None:
    """MSG_MORE and TCP_CORK: parts of a request, and whole requests, that TCP may keep for a while."""
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    request = encode_command("GET", "k")
    for cut in range(1, len(request)):
        conn.sock.send(request[:cut], socket.MSG_MORE)
        conn.sock.send(request[cut:])
        assert conn.read() == b"v"
    conn.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    conn.send_bytes(request + encode_command("STRLEN", "k"))
    conn.send_bytes(request)
    conn.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    assert [conn.read() for _ in range(3)] == [b"v", 1, b"v"]


def test_reading_in_pieces_and_peeking(sut: Sut, conn: Conn) -> None:
    conn.do("SET", "k", "0123456789")
    sut.warm(conn, "k")
    reply = b"$10\r\n0123456789\r\n"
    for _ in range(3):
        conn.send("GET", "k")
        assert conn.sock.recv(5, socket.MSG_PEEK) == reply[:5]
        assert conn.read_bytes(1) == reply[:1]
        assert conn.sock.recv(100, socket.MSG_PEEK) == reply[1:]
        assert b"".join(conn.read_bytes(1) for _ in range(len(reply) - 1)) == reply[1:]
        conn.pipeline(("STRLEN", "k"))
    conn.send_bytes(encode_pipeline([("GET", "k")] * 4))
    conn.sock.settimeout(None)
    assert conn.sock.recv(4 * len(reply), socket.MSG_WAITALL) == 4 * reply
    conn.sock.settimeout(10)
    conn.send("GET", "k")
    parts = [bytearray(3), bytearray(100)]
    assert conn.sock.recvmsg_into(parts)[0] == len(reply)
    assert bytes(parts[0] + parts[1]).rstrip(b"\0") == reply


def test_waiting_with_poll_epoll_and_edges(sut: Sut, conn: Conn) -> None:
    """A reply from the kernel makes the socket readable for every way of waiting, also edge-triggered."""
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    conn.sock.setblocking(False)
    epoll = select.epoll()
    epoll.register(conn.sock, select.EPOLLIN | select.EPOLLET)
    poll = select.poll()
    poll.register(conn.sock, select.POLLIN)
    for number in range(200):
        slow = number % 5 == 0
        conn.sock.send(encode_command("STRLEN", "k") if slow else encode_command("GET", "k"))
        # A stale edge of the last round may come first: what counts is that the next one comes too.
        got = b""
        while not got.endswith(b"\r\n") or (not slow and len(got) < 7):
            assert epoll.poll(5), f"no edge in round {number}"
            try:
                got += conn.sock.recv(100)
            except BlockingIOError:
                continue
        assert got == (b":1\r\n" if slow else b"$1\r\nv\r\n")
        assert not poll.poll(0)
        conn.sock.send(encode_command("GET", "k"))
        assert poll.poll(5000)
        assert conn.sock.recv(100) == b"$1\r\nv\r\n"
    epoll.close()


def test_a_signal_while_a_slow_reply_is_awaited(sut: Sut, conn: Conn) -> None:
    """A socket with a timeout does not notice. A blocking recv() ends with EAGAIN on a socket in a sockmap,
    where on another it goes on (docs/offload.md): nothing is lost, the next recv() has the reply."""
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    other = sut.connect()
    rang = []
    old = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.siginterrupt(signal.SIGALRM, False)
    try:
        for blocking in (False, True):
            slow = sut.connect()
            sut.warm(slow)
            rang.clear()
            slow.sock.settimeout(None if blocking else 10)
            slow.send("BLPOP", "queue", 0)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            pusher = threading.Timer(0.2, lambda: other.send("RPUSH", "queue", "x"))
            pusher.start()
            got = b""
            while len(got) < len(b"*2\r\n$5\r\nqueue\r\n$1\r\nx\r\n"):
                try:
                    got += slow.sock.recv(100)
                except BlockingIOError:
                    assert blocking
            pusher.join()
            assert got == b"*2\r\n$5\r\nqueue\r\n$1\r\nx\r\n"
            assert rang
            assert other.read() == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_splice(sut: Sut, conn: Conn) -> None:
    """How Go's io.Copy moves bytes from one connection to another, in a proxy say.

    It would not see replies of the kernel's: who reads so shows it with the first reply, which is Redis's,
    and is never served.
    """
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    reader = sut.connect()
    out, into = os.pipe()
    try:
        reader.sock.setblocking(False)
        for _ in range(20):
            reader.sock.send(encode_command("GET", "k"))
            got = b""
            deadline = time.monotonic() + 2.0
            while len(got) < len(b"$1\r\nv\r\n") and time.monotonic() < deadline:
                select.select([reader.sock], [], [], 0.1)
                with contextlib.suppress(BlockingIOError):
                    got += os.read(out, os.splice(reader.sock.fileno(), into, 100))
            assert got == b"$1\r\nv\r\n"
    finally:
        os.close(out)
        os.close(into)
    sut.must_serve(conn, ("GET", "k"))


def test_one_thread_sends_another_reads(sut: Sut, conn: Conn) -> None:
    """As clients that pipeline do: the reader is in a blocking recv() when the kernel answers the sender."""
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    conn.sock.settimeout(None)
    generator = rng("threads")
    current = b"v"
    messages: list[bytes] = []
    expected: list[object] = []
    for number in range(8000):
        roll = generator.random()
        if roll < 0.5:
            messages.append(encode_command("GET", "k"))
            expected.append(current)
        elif roll < 0.8:
            current = b"%d" % number
            messages.append(encode_command("SET", "k", current))
            expected.append(b"OK")
        else:
            messages.append(encode_command("STRLEN", "k"))
            expected.append(len(current))
    got: list[object] = []
    room = threading.Semaphore(64)

    def read() -> None:
        while len(got) < len(expected):
            got.append(conn.read())
            room.release()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for number, message in enumerate(messages):
        assert room.acquire(timeout=10), f"no reply to message {len(got)}"
        conn.sock.sendall(message)
        if number % 100 == 0:
            # Let everything be answered now and then: only then may the kernel answer again.
            eventually(lambda number=number: len(got) > number, what="the replies so far")
    reader.join(20)
    assert got == expected


def test_the_same_four_addresses_again(sut: Sut) -> None:
    """A client port used anew: nothing of the connection that had it before counts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number in range(200):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.bind(("127.0.0.1", port))
            sock.settimeout(5)
            sock.connect(("127.0.0.1", sut.port))
            for _ in range(3):
                sock.sendall(encode_command("SET", "k", number))
                assert sock.recv(100) == b"+OK\r\n"
                sock.sendall(encode_command("GET", "k"))
                assert sock.recv(100) == b"$%d\r\n%d\r\n" % (len(str(number)), number)
            if number % 2:
                sock.sendall(encode_command("GET", "k"))


def test_another_server_on_the_same_port(sut: Sut, conn: Conn) -> None:
    """Bound to another address: it is not the one that was attached."""
    with plain_server(port=sut.port, bind="127.0.0.2") as other:
        stranger = other.connect("127.0.0.2")
        assert stranger.do("SET", "k", "theirs") == b"OK"
        assert conn.do("SET", "k", "ours") == b"OK"
        sut.warm(conn, "k")
        for _ in range(50):
            assert stranger.do("GET", "k") == b"theirs"
            assert stranger.do("SET", "k", "theirs") == b"OK"
            assert conn.do("GET", "k") == b"ours"


def test_large_replies_that_the_server_must_send_in_parts(sut: Sut, conn: Conn) -> None:
    """The client does not read for a while: the server's send() takes parts, that look like replies."""
    trap = b"+OK\r\n$1\r\nx\r\n*2\r\n:1\r\n" * 60_000
    other = sut.connect()
    other.do("MSET", "large", trap, "k", "v")
    sut.warm(conn, "k")
    for _ in range(6):
        conn.send("GET", "large")
    conn.send("GET", "k")
    conn.send("STRLEN", "k")
    eventually(lambda: other.do("PING") == b"PONG" and not conn.quiet(), what="the first reply")
    reply = b"$%d\r\n%b\r\n" % (len(trap), trap)
    for _ in range(6):
        assert conn.read_bytes(len(reply)) == reply
    assert [conn.read(), conn.read()] == [b"v", 1]
    for number in range(20):
        assert conn.do("SET", "k", number) == b"OK"
        assert conn.do("GET", "k") == b"%d" % number
        assert conn.do("STRLEN", "k") == len(str(number))


def test_many_replies_unread(sut: Sut, conn: Conn) -> None:
    """A client that sends and does not read gets everything, in order, when it reads."""
    conn.do("SET", "k", "x" * 1000)
    sut.warm(conn, "k")
    reply = b"$1000\r\n" + b"x" * 1000 + b"\r\n"
    for _ in range(3):
        for _ in range(300):
            conn.send("GET", "k")
        assert conn.read_bytes(300 * len(reply)) == 300 * reply
    assert conn.do("GET", "k") == b"x" * 1000


def test_a_connection_that_goes_away_with_replies_unread(sut: Sut) -> None:
    for end in ("close", "reset", "half"):
        conn = sut.connect()
        conn.do("SET", "k", "v")
        sut.warm(conn, "k")
        for _ in range(20):
            conn.send("GET", "k")
        if end == "half":
            conn.sock.shutdown(socket.SHUT_WR)
            assert conn.read_bytes(20 * 7) == 20 * b"$1\r\nv\r\n"
            assert conn.sock.recv(10) == b""
        elif end == "reset":
            conn.reset()
        else:
            conn.close()
    assert sut.connect().do("GET", "k") == b"v"


def test_connections_come_and_go(sut: Sut) -> None:
    """More connections over time than there are places for at once would show a leak."""
    for number in range(2000):
        with Conn(sut.port) as conn:
            conn.do("SET", "k", number)
            assert conn.pipeline(("SET", "k", "x"), ("GET", "k")) == [b"OK", b"x"]
    conn = sut.connect()
    conn.do("PING")
    must_serve_both(sut, conn, "k", "v")


def test_many_connections_at_once(sut: Sut) -> None:
    conns = [sut.connect() for _ in range(300)]
    for number, conn in enumerate(conns):
        conn.do("SET", f"k{number}", number)
    for _ in range(3):
        for number, conn in enumerate(conns):
            conn.send("GET", f"k{number}")
        assert [conn.read() for conn in conns] == [b"%d" % number for number in range(300)]
    for conn in conns[::50]:
        must_serve_both(sut, conn, "k", "v")


def test_one_connection_of_two_processes(sut: Sut, conn: Conn) -> None:
    """A forked child uses its parent's socket: what one sends and the other reads is one stream."""
    conn.do("SET", "k", "v")
    sut.warm(conn, "k")
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            conn.sock.sendall(encode_command("SET", "k", "child") + encode_command("GET", "k"))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert [conn.read(), conn.read()] == [b"OK", b"child"]
        assert conn.do("GET", "k") == b"child"


def test_connections_made_before_the_start_pass_unless_they_are_adopted(sut: Sut) -> None:
    if not sut.offloaded:
        pytest.skip("there is no start on a plain server")
    from kflex_repro import build
    from kflex_repro.offload import attach
    from kflex_repro.redis.server import ManagedServer

    with ManagedServer(module=build.ensure().module) as server, Conn(server.port) as early:
        early.do("SET", "k", "early")
        with attach.start(server.port, table_bytes=64 << 20, take_over=False) as session:
            assert session.adoption is None
            for _ in range(20):
                assert early.do("GET", "k") == b"early"
            assert session.stats()["served_get"] == 0
            with Conn(server.port) as late:
                late.do("PING")
                eventually(lambda: late.do("GET", "k") == b"early" and session.stats()["served_get"] > 0)
                assert late.do("SET", "k", "late") == b"OK"
                assert early.do("GET", "k") == b"late"
                assert early.do("SET", "k", "early again") == b"OK"
                assert late.do("GET", "k") == b"early again"


def test_another_port_is_left_alone(sut: Sut, plain: Sut) -> None:
    before = sut.stats()
    conn = plain.connect()
    for number in range(50):
        conn.do("SET", "k", number)
        assert conn.do("GET", "k") == b"%d" % number
    plain.hang_up()
    after = sut.stats()
    assert after["paired"] == before["paired"]
    assert sut.served() == before["served_get"] + before["served_set"]
