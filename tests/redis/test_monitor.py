"""`monitor` against a real redis-server: what it counts and times is what happened."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.probe import events as events_
from kflex_repro.probe import latency, monitor, targets
from kflex_repro.probe.events import Event
from kflex_repro.probe.record import Recording
from kflex_repro.redis.resp import Decoder, encode_command, encode_pipeline
from kflex_repro.redis.server import ManagedServer, free_port
from tests.conftest import require, unavailable
from tests.redis import harness

pytestmark = pytest.mark.bpf
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def _host() -> None:
    require("root")
    require("tp_btf")


@pytest.fixture(params=["sock", "syscalls"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both ways to see reads and writes."""
    if request.param == "sock" and not latency.possible("sock_recv_length"):
        unavailable("no sock_recv_length in this kernel")
    return str(request.param)


@pytest.fixture
def server() -> Iterator[ManagedServer]:
    with ManagedServer(["--enable-debug-command", "yes"]) as started:
        yield started


@contextmanager
def watching(*servers: ManagedServer, **options: Any) -> Iterator[monitor.Watch]:
    chosen = [targets.by_port(one.port) for one in servers]
    with monitor.Watch(latency.Probe(chosen, latency.Options(**options))) as watch:
        yield watch


def eventually(what: Callable[[], Any]) -> Any:
    """A client may have its reply before the write that sent it has ended in the server: ask again."""
    return harness.eventually(what, PATIENCE_S, every=0.01)


def counted(watch: monitor.Watch, calls: int) -> dict[str, latency.Counts]:
    """The counters, once everything that was asked has been answered."""

    def settled() -> Any:
        commands = watch.all().commands
        seen = sum(one.calls for one in commands.values())
        done = sum(one.answered + one.untimed for one in commands.values())
        return commands if seen >= calls and done == seen else None

    try:
        return dict(eventually(settled))
    except AssertionError:
        commands = watch.all().commands
        seen = {name: (one.calls, one.answered, one.untimed) for name, one in commands.items()}
        raise AssertionError(f"expected {calls}: {seen}, {watch.all().totals}") from None


def seen(watch: monitor.Watch, count: int) -> list[Event]:
    """The first ``count`` events."""
    found: list[Event] = []

    def enough() -> bool:
        found.extend(map(watch.reader.decode, watch.records()))
        return len(found) >= count

    eventually(enough)
    return found


def stats_of(server: ManagedServer) -> dict[str, int]:
    """Calls by command, from Redis itself; subcommands added up. The asking is not in it yet."""
    found: dict[str, int] = {}
    with server.client(decode_responses=True) as client:
        for name, values in client.info("commandstats").items():
            command = name.removeprefix("cmdstat_").partition("|")[0].upper()
            found[command] = found.get(command, 0) + values["calls"]
    return found


class Raw:
    """A client that sends exactly the bytes it is told to."""

    def __init__(self, server: ManagedServer) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.decoder = Decoder()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def replies(self, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            while (one := self.decoder.pop()) is not Decoder.INCOMPLETE:
                found.append(one)
            if len(found) < count:
                data = self.socket.recv(1 << 16)
                assert data, "the server closed the connection"
                self.decoder.feed(data)
        return found

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def load(server: ManagedServer, requests: int, *args: str) -> None:
    subprocess.run(
        ["redis-benchmark", "-p", str(server.port), "-n", str(requests), "-q", *args],
        check=True,
        capture_output=True,
    )


# --- ground truth ------------------------------------------------------------------------------------------


def ground_truth(server: ManagedServer, kind: str, requests: int) -> None:
    with watching(server, probe=kind) as watch:
        load(server, requests // 2, "-t", "set,get,incr,lpush", "-c", "20")
        load(server, requests, "-t", "set,get,mset", "-P", "16", "-r", "1000", "-d", "300")
        load(server, requests // 2, "-P", "200", "-c", "5", "EVAL", "return redis.call('TIME')", "0")
        real = stats_of(server)
        commands = counted(watch, requests * 5)
        # The script's own calls are not requests; the INFO that told us came after what it tells.
        expected = {name: calls for name, calls in real.items() if name not in ("TIME", "INFO", "PING")}
        found = {name: commands[name].calls for name in expected}
        made = watch.all()
        assert found == expected
        assert sum(expected.values()) >= requests * 5
        assert all(one.answered == one.calls and not one.untimed for one in commands.values())
        assert all(one.phases["total"].count == one.answered for one in commands.values())
        assert made.lost == 0
        assert not made.totals["garbled"]
        assert not made.totals["foreign"]


def test_counts_are_those_of_redis(server: ManagedServer, kind: str) -> None:
    ground_truth(server, kind, 20_000)


@pytest.mark.soak
def test_a_million_requests_are_counted_exactly(server: ManagedServer, kind: str) -> None:
    ground_truth(server, kind, 400_000)


def test_each_latency_lies_within_what_its_client_saw(server: ManagedServer, kind: str) -> None:
    """The client's clock starts before the bytes arrive; the write may end after the client has the reply."""
    stamps = []
    with watching(server, probe=kind, events=True) as watch, server.client() as client:
        client.ping()
        for number in range(300):
            before = time.monotonic_ns()
            client.set(f"k{number}", "v")
            stamps.append((before, time.monotonic_ns()))
        events = [event for event in seen(watch, 301) if event.command == "SET"]
    assert len(events) == len(stamps)
    for (before, after), event in zip(stamps, events, strict=True):
        phases = event.phases
        arrival = event.at - phases["total"]
        # Read and executed between the client's stamps; arrived after the first.
        assert before <= arrival
        assert arrival + phases["queue"] <= after
        assert phases["queue"] + phases["exec"] + phases["reply"] == phases["total"]


@pytest.mark.parametrize("way", ["sleep", "script"])
def test_a_slow_command_is_queueing_for_those_behind_it(server: ManagedServer, kind: str, way: str) -> None:
    slow = {
        "sleep": encode_command("DEBUG", "SLEEP", "0.4"),
        "script": encode_command("EVAL", "local n = 0 for i = 1, 3e7 do n = n + i end return n", 0),
    }[way]
    with watching(server, probe=kind, events=True) as watch, Raw(server) as first, Raw(server) as second:
        for one in (first, second):
            one.send(b"PING\r\n")
            one.replies(1)
        first.send(slow)
        # It is in Redis once its bytes are read; what comes then waits.
        eventually(lambda: watch.probe.snapshot().commands.get("DEBUG" if way == "sleep" else "EVAL"))
        second.send(encode_command("GET", "k"))
        second.replies(1)
        first.replies(1)
        events = {event.command: event.phases for event in seen(watch, 4)}
    culprit, victim = events["DEBUG" if way == "sleep" else "EVAL"], events["GET"]
    assert culprit["exec"] > culprit["total"] * 0.9
    assert victim["queue"] > culprit["exec"] * 0.3
    assert victim["queue"] > victim["total"] * 0.8


def test_execution_is_what_debug_sleep_says(server: ManagedServer, kind: str) -> None:
    with watching(server, probe=kind) as watch, server.client() as client:
        for _ in range(5):
            client.execute_command("DEBUG", "SLEEP", "0.05")
        counts = counted(watch, 5)["DEBUG"]
    assert counts.calls == 5
    assert counts.phases["exec"].percentile(50) >= 0.05e9 * 0.94
    assert counts.phases["exec"].sum >= 5 * 0.05e9
    assert counts.phases["exec"].sum <= counts.phases["total"].sum


def test_medians_agree_with_those_of_redis_and_of_the_client(server: ManagedServer, kind: str) -> None:
    """Scripts of about a millisecond: execution is what SLOWLOG says, the total what the client saw, within
    the 6.3 % of a histogram's bucket and the 0.2 ms that may lie between the places where they look."""
    script, rounds, between = "local n = 0 for i = 1, 1e5 do n = n + i end return n", 101, 200_000
    waits: list[int] = []
    with server.client() as client:
        client.config_set("slowlog-log-slower-than", 0)
        client.config_set("slowlog-max-len", 2 * rounds)
        with watching(server, probe=kind) as watch:
            for _ in range(rounds):
                asked = time.monotonic_ns()
                client.eval(script, 0)
                waits.append(time.monotonic_ns() - asked)
            phases = counted(watch, rounds)["EVAL"].phases
        entries = [one for one in client.slowlog_get(2 * rounds) if one["command"].startswith(b"EVAL")]
    assert len(entries) == rounds
    by_redis = 1000 * statistics.median(one["duration"] for one in entries)
    by_client = statistics.median(waits)
    executed, total = phases["exec"].percentile(50), phases["total"].percentile(50)
    assert by_redis * 0.937 <= executed <= by_redis * 1.063 + between
    assert by_client * 0.937 - between <= total <= by_client * 1.063


# --- the protocol ------------------------------------------------------------------------------------------


def test_the_session_of_the_old_monitor(server: ManagedServer, kind: str) -> None:
    session = ["set name os-work", "get name", "del name", "set a 1", "set b 2", "get b", "del a"]
    with watching(server, probe=kind, events=True, redact=False) as watch, Raw(server) as client:
        for words in session:
            client.send(encode_command(*words.split()))
            client.replies(1)
        lines = [events_.line(event).split("  ") for event in seen(watch, 7)]
    assert [line[0] for line in lines] == session
    assert [line[1] for line in lines] == ["+OK", "os-work", ":1", "+OK", "+OK", "2", ":1"]
    assert all("queue" in line[2] and "exec" in line[2] and "reply" in line[2] for line in lines)


def test_requests_and_replies_split_anywhere(server: ManagedServer, kind: str) -> None:
    """Any cut of the stream gives the same counts; inline and ignored forms among them."""
    choice = random.Random(7)
    expected = dict.fromkeys(("SET", "GET", "PING", "INCR", "NOSUCH", "ECHO"), 0)
    ignored = b"\r\n*0\r\n"
    sent = 0
    with watching(server, probe=kind) as watch, Raw(server) as client:
        for group in range(12):
            requests: list[tuple[str, bytes]] = []
            for number in range(10):
                key = f"key{group * number}"
                requests.append(("SET", encode_command("SET", key, b"*3\r\n$3\r\n" * choice.randrange(40))))
                requests.append(("GET", encode_command("get", key)))
            requests.append(("PING", b"PING\r\n" + ignored))
            requests.append(("INCR", b"  incr   n \r\n"))
            requests.append(("NOSUCH", encode_command("NOSUCH", "x")))
            requests += [("ECHO", encode_command("ECHO", "e" * 70))] * 3
            for name, _ in requests:
                expected[name] += 1
            stream = b"".join(data for _, data in requests)
            sent += len(stream) - len(ignored)
            at = 0
            while at < len(stream):
                size = choice.choice([1, 1, 2, 3, 7, 31, 64, 129, 1000])
                client.send(stream[at : at + size])
                at += size
            client.replies(len(requests))
        commands = counted(watch, sum(expected.values()))
        made = watch.all()
    assert {name: one.calls for name, one in commands.items()} == expected
    assert {name: one.answered for name, one in commands.items()} == expected
    assert commands["NOSUCH"].errors == expected["NOSUCH"]
    # What Redis ignores belongs to no request.
    assert sum(one.bytes_in for one in commands.values()) == sent
    assert made.totals["garbled"] == 0


def test_large_values_in_both_directions(server: ManagedServer, kind: str) -> None:
    value = os.urandom(3 << 20)
    with watching(server, probe=kind) as watch, server.client() as client:
        client.set("big", value)
        assert client.get("big") == value
        client.rpush("list", *[b"x" * 1000] * 2000)
        assert len(client.lrange("list", 0, -1)) == 2000
        client.ping()
        commands = counted(watch, 5)
    assert commands["SET"].bytes_in > len(value)
    assert commands["GET"].bytes_out == len(value) + len(b"$3145728\r\n\r\n")
    assert commands["LRANGE"].bytes_out > 2_000_000
    assert {commands[name].answered for name in ("SET", "GET", "LRANGE", "PING")} == {1}


TYPES = {
    "string": '"Hello World"',
    "integer": ":12345",
    "double": ",3.141",
    "null": "(nil)",
    "array": "[0, 1, 2]",
    "set": "[0, 1, 2]",
    "bignum": "(1234567999999999999999999999999999999",
    "true": "#t",
    "false": "#f",
}


def test_every_type_of_reply(server: ManagedServer, kind: str) -> None:
    with watching(server, probe=kind, events=True, redact=False) as watch, Raw(server) as client:
        client.send(encode_command("HELLO", 3))
        client.replies(1)
        for name in TYPES:
            client.send(encode_command("DEBUG", "PROTOCOL", name))
            client.replies(1)
        for name, frames in (("map", 1), ("attrib", 2), ("verbatim", 1), ("push", 1)):
            client.send(encode_command("DEBUG", "PROTOCOL", name))
            client.replies(frames)
        client.send(encode_command("GET", "none"))
        client.replies(1)
        found = seen(watch, 1 + len(TYPES) + 5)
    by_argument = {}
    for event in found:
        words = events_.arguments(event)
        if event.command == "DEBUG":
            by_argument[(words[2].data or b"").decode()] = events_.reply_words(event)
    for name, words in TYPES.items():
        assert by_argument[name] == words
    assert by_argument["verbatim"].startswith('"txt:')
    assert by_argument["map"]
    assert found[0].command == "HELLO"
    assert any(event.pushed for event in found)


def test_published_messages_answer_nobody(server: ManagedServer, kind: str) -> None:
    with watching(server, probe=kind) as watch, Raw(server) as two, Raw(server) as three:
        three.send(encode_command("HELLO", 3))
        three.replies(1)
        for one in (two, three):
            one.send(encode_command("SUBSCRIBE", "a", "b"))
            one.replies(2)
        with server.client() as client:
            for _ in range(10):
                client.publish("a", "m")
        for one in (two, three):
            one.replies(10)
            one.send(encode_command("PING"))
            one.replies(1)
            one.send(encode_command("UNSUBSCRIBE", "a", "b"))
            one.replies(2)
            one.send(encode_command("PING"))
            one.replies(1)
        commands = counted(watch, 17)
        made = watch.all()
    calls = {name: one.calls for name, one in commands.items()}
    assert {name: calls[name] for name in ("SUBSCRIBE", "UNSUBSCRIBE", "PING", "PUBLISH")} == {
        "SUBSCRIBE": 2,
        "UNSUBSCRIBE": 2,
        "PING": 4,
        "PUBLISH": 10,
    }
    assert all(one.answered == one.calls for one in commands.values())
    assert made.totals["pushed"] == 20


def test_clients_that_want_no_replies(server: ManagedServer, kind: str) -> None:
    with watching(server, probe=kind) as watch, Raw(server) as client:
        client.send(encode_pipeline([("CLIENT", "REPLY", "OFF"), *[("SET", "k", "v")] * 10]))
        client.send(encode_pipeline([("CLIENT", "REPLY", "ON"), ("GET", "k")]))
        assert client.replies(2)[1] == b"v"
        commands = counted(watch, 13)
    assert (commands["SET"].calls, commands["SET"].untimed) == (10, 10)
    assert (commands["GET"].calls, commands["GET"].answered) == (1, 1)
    assert commands["CLIENT"].answered == 1


def test_pipelines_deeper_than_are_told_apart(server: ManagedServer, kind: str) -> None:
    mixed = [command for n in range(200) for command in (("SET", f"k{n}", "v"), ("GET", f"k{n}"))]
    with watching(server, probe=kind) as watch, Raw(server) as client:
        client.send(encode_pipeline(mixed))
        client.replies(400)
        client.send(encode_command("GET", "k1"))
        client.replies(1)
        commands = counted(watch, 401)
    assert (commands["SET"].calls, commands["GET"].calls) == (200, 201)
    assert commands["SET"].untimed + commands["GET"].untimed > 0
    assert commands["GET"].answered > 0


def test_a_blocked_client_waits_but_does_not_execute(server: ManagedServer, kind: str) -> None:
    with watching(server, probe=kind, events=True) as watch, Raw(server) as blocked, server.client() as other:
        blocked.send(encode_command("BLPOP", "list", 0))
        eventually(lambda: other.info("clients")["blocked_clients"] == 1)
        other.rpush("list", "x")
        blocked.replies(1)
        found: list[Event] = []

        def come() -> bool:
            found.extend(map(watch.reader.decode, watch.records()))
            return any(event.command == "BLPOP" for event in found)

        eventually(come)
    phases = next(event.phases for event in found if event.command == "BLPOP")
    assert phases["exec"] == 0
    assert phases["reply"] > phases["queue"]


def test_garbage_and_then_others(server: ManagedServer, kind: str) -> None:
    with watching(server, probe=kind) as watch, Raw(server) as bad, Raw(server) as good:
        good.send(b"PING\r\n")
        good.replies(1)
        for _ in range(3):
            good.send(encode_command("SET", "a", "b"))
            good.replies(1)
        bad.send(b"*1\r\n$x\r\n" + bytes(range(256)) * 20)
        assert bad.socket.recv(100).startswith(b"-ERR Protocol error")
        good.send(encode_command("GET", "a"))
        good.replies(1)
        commands = counted(watch, 5)
        made = watch.all()
    assert (commands["SET"].calls, commands["GET"].calls, commands["PING"].calls) == (3, 1, 1)
    assert made.totals["garbled"] >= 1


# --- servers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["no", "yes"])
def test_io_threads(kind: str, reads: str) -> None:
    with (
        ManagedServer(["--io-threads", "3", "--io-threads-do-reads", reads]) as threaded,
        watching(threaded, probe=kind) as watch,
    ):
        load(threaded, 15_000, "-t", "set,get", "-c", "50", "-P", "8")
        real = stats_of(threaded)
        commands = counted(watch, 30_000)
        assert watch.all().lost == 0
        assert {name: commands[name].calls for name in ("SET", "GET")} == {
            name: real[name] for name in ("SET", "GET")
        }
        assert all(one.answered == one.calls for one in commands.values())


def test_two_servers_at_once(server: ManagedServer, kind: str) -> None:
    with (
        ManagedServer() as other,
        watching(server, other, probe=kind, events=True) as watch,
        server.client() as first,
        other.client() as second,
    ):
        for _ in range(3):
            first.set("a", "1")
            second.get("a")
        events = [event for event in seen(watch, 6) if event.command in ("GET", "SET")]
    assert {(event.command, event.server, event.pid) for event in events} == {
        ("SET", 0, server.pid),
        ("GET", 1, other.pid),
    }


def test_a_restart_loses_nothing(server: ManagedServer, kind: str) -> None:
    said: list[str] = []
    with watching(server, probe=kind) as watch:
        watch.say = said.append
        with server.client() as client:
            client.set("a", "1")
        old = server.pid
        server.kill()
        watch.follow()
        server.start()
        with server.client() as client:
            for _ in range(5):
                client.get("a")
        eventually(lambda: watch.follow() or any(f"pid {server.pid}" in line for line in said))
        commands = counted(watch, 6)
        assert watch.probe.servers[0].pid == server.pid
    assert commands["GET"].calls == 5
    assert commands["SET"].calls == 1
    assert f"pid {old}" in said[0]


def test_unix_sockets_are_seen(kind: str) -> None:
    with (
        ManagedServer(unix=True) as local,
        watching(local, probe=kind) as watch,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(str(local.unix_path))
        for _ in range(4):
            client.sendall(encode_command("PING"))
            assert client.recv(100) == b"+PONG\r\n"
        assert counted(watch, 4)["PING"].calls == 4


def test_connections_that_were_there_before(server: ManagedServer, kind: str) -> None:
    with Raw(server) as client:
        client.send(encode_command("SET", "a", "1"))
        client.replies(1)
        with watching(server, probe=kind) as watch:
            client.send(encode_command("GET", "a"))
            client.replies(1)
            assert counted(watch, 1)["GET"].answered == 1


def test_beside_the_offload_each_request_is_counted_once(sut: harness.Sut, kind: str) -> None:
    """Served in the kernel, or passed and seen in the server."""
    with monitor.Watch(latency.Probe([targets.by_port(sut.port)], latency.Options(probe=kind))) as watch:
        subprocess.run(
            ["redis-benchmark", "-p", str(sut.port), "-n", "5000", "-c", "10", "-q", "-t", "set,get"],
            check=True,
            capture_output=True,
        )
        counted(watch, 1)
        made = watch.all()
    found = monitor.as_dict(made, "summary")["commands"]
    for name in ("GET", "SET"):
        assert found[name]["calls"] + found[name]["in_kernel"] == 5000
    assert harness.PLAIN_ONLY or found["GET"]["in_kernel"] > 0


# --- filters, secrets, recordings --------------------------------------------------------------------------


def test_filters_in_the_kernel(server: ManagedServer, kind: str) -> None:
    def use(client: Any) -> None:
        for number in range(10):
            client.set(f"user:{number}", "v")
            client.get(f"user:{number}")
            client.get(f"other:{number}")

    with server.client() as client:
        client.ping()
        with watching(server, probe=kind, commands=("GET",), key_prefix=b"user:") as watch:
            use(client)
            commands = counted(watch, 10)
            assert {name: one.calls for name, one in commands.items()} == {"GET": 10}
        with watching(server, probe=kind, key_prefix=b"user:1", key_whole=True) as watch:
            use(client)
            assert {name: one.calls for name, one in counted(watch, 2).items()} == {"GET": 1, "SET": 1}
        with watching(server, probe=kind, events=True, slower_than=50_000_000) as watch:
            use(client)
            client.execute_command("DEBUG", "SLEEP", "0.06")
            assert [event.command for event in seen(watch, 1)] == ["DEBUG"]


def test_a_sample(server: ManagedServer, kind: str) -> None:
    """About one request of ten, each timed as all of them would be; also of large and split ones."""
    with watching(server, probe=kind, sample=10, events=True) as watch, Raw(server) as client:
        for number in range(3000):
            data = encode_command("SET", "k", b"*1\r\n$4\r\nPING\r\n" * (3000 if number % 100 == 0 else 1))
            client.send(data[:5])
            client.send(data[5:])
            client.replies(1)
        load(server, 3000, "-t", "get", "-c", "5")
        commands = counted(watch, 1)
        made = watch.all()
        events = list(map(watch.reader.decode, watch.records()))
    assert set(commands) <= {"SET", "GET", "CONFIG"}
    # Uniform gaps of 1 to 19: 300 with a standard deviation below 10; a split request is two reads.
    assert 100 < commands["SET"].calls < 600
    assert 200 < commands["GET"].calls < 400
    assert commands["GET"].answered == commands["GET"].calls
    assert made.totals["garbled"] == 0
    assert made.rate("GET") == commands["GET"].calls * 10 / made.seconds
    assert len(events) == sum(one.calls for one in commands.values())


def test_values_stay_in_the_server(server: ManagedServer, kind: str, tmp_path: Path) -> None:
    secret = "tops3cret"
    file = tmp_path / "x.kmon"
    with watching(server, probe=kind, events=True) as watch, Raw(server) as client:
        writer = monitor.recorder(watch, file)
        client.send(encode_command("SET", "name", secret))
        client.send(encode_command("GET", "name"))
        client.send(f"set inline {secret}\r\n".encode())
        client.send(encode_command("AUTH", secret))
        client.send(encode_command("HELLO", "2", "AUTH", "default", secret))
        client.send(encode_command("ECHO", secret))
        client.send(encode_command("MGET", "name", "inline"))
        client.send(encode_command("LPUSH", "l", secret))
        client.send(encode_command("CONFIG", "SET", "masterauth", secret))
        client.send(encode_command("unheardof", secret, secret))
        client.send(encode_command("SET", "half", secret)[:-4])
        client.send(encode_command("SET", "half", secret)[-4:])
        client.replies(11)
        counted(watch, 11)
        records = watch.records()
        writer.add(records, watch.reader.names)
        writer.close(monitor.as_dict(watch.all(), "summary"))
        lines = [events_.line(event) for event in map(watch.reader.decode, records)]
    assert len(lines) == 11
    assert secret.encode() not in file.read_bytes()
    assert not any(secret in line for line in lines)
    assert lines[0].startswith("SET name <9 bytes>  +OK")
    assert lines[1].startswith("GET name  <9 bytes>")
    assert lines[3].startswith("AUTH <9 bytes>  -")
    assert file.stat().st_mode & 0o077 == 0
    with Recording(file) as recording:
        assert [events_.line(event) for event in recording.events()] == lines
        assert recording.totals["dropped"] == 0
        assert not recording.cut_off
    # Cut off anywhere, it is replayed as far as it goes.
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with Recording(file) as recording:
        assert len(list(recording.events())) == 11
        assert recording.cut_off


def test_what_the_reader_is_too_slow_for_is_counted(server: ManagedServer, kind: str) -> None:
    with watching(server, probe=kind, events=True, ring_bytes=4096) as watch:
        load(server, 2_000, "-t", "set", "-c", "1")
        commands = counted(watch, 2_000)
        totals = watch.all().totals
        assert commands["SET"].answered == 2_000
        assert totals["dropped"] > 0
        assert totals["events"] + totals["dropped"] == sum(one.answered for one in commands.values())
        assert len(watch.records()) == totals["events"]


def test_known_commands_are_those_of_the_server(server: ManagedServer) -> None:
    known = set(
        latency.known_commands(
            dict.fromkeys(
                (f"KFLEX_LAT_F_{name}" for name in ("KEY", "BLOCKS", "SUBSCRIBE", "STREAM", "CLIENT")), 1
            )
        )
    )
    with server.client(decode_responses=True) as client:
        assert {name.upper() for name in client.command()} <= known


# --- the command line --------------------------------------------------------------------------------------


def command(*args: str, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kflex_repro", "monitor", *args],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_shows_the_whole_and_leaves_nothing(server: ManagedServer, tmp_path: Path) -> None:
    from kflex_repro.build import toolchain

    def programs() -> set[int]:
        listed = subprocess.run(
            [toolchain.bpftool().path, "prog", "list", "-j"], capture_output=True, text=True, check=True
        )
        return {one["id"] for one in json.loads(listed.stdout) if one.get("name") == "kflex_send"}

    before = programs()
    file = tmp_path / "out"
    with file.open("w") as stream:
        process = command("--port", str(server.port), "--events", "--json", stdout=stream)
    try:
        eventually(lambda: programs() - before)
        ours = programs() - before
        with server.client() as client:
            eventually(lambda: client.get("k") or "\n" in file.read_text())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["type"] == "reply"
    assert lines[-1]["type"] == "summary"
    assert lines[-1]["commands"]["GET"]["calls"] >= 1
    assert not programs() & ours


def test_it_ends_by_itself(server: ManagedServer, tmp_path: Path) -> None:
    process = command("--port", str(server.port), "--json", "--duration", "0.5", "--interval", "0.2")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    kinds = [json.loads(line)["type"] for line in out.splitlines()]
    assert kinds[-1] == "summary"
    assert "interval" in kinds


def test_it_ends_with_the_process_it_was_told(server: ManagedServer) -> None:
    process = command("--pid", str(server.pid), "--json", "--interval", "0.1")
    assert process.stdout is not None
    process.stdout.readline()
    server.kill()
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "has ended" in err


def test_bad_input_is_one_clear_line(server: ManagedServer, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        foreign = str(other.getsockname()[1])
        recording = tmp_path / "there"
        recording.write_text("no recording")
        port = str(server.port)
        cases = [
            (["--pid", str(gone.pid)], "no process"),
            (["--pid", "1"], "not a Redis"),
            (["--port", str(free_port())], "nothing listens there"),
            (["--port", foreign], "not a Redis"),
            (["--port", port, "--record", str(recording)], "the file exists"),
            (["--port", port, "--key", "a*b"], "--events"),
            (["--port", port, "--slower-than", "1ms"], "--events"),
            (["replay", str(recording)], "not a recording"),
            (["replay", str(tmp_path / "none")], "No such file"),
        ]
        for args, words in cases:
            process = command(*args)
            out, err = process.communicate(timeout=PATIENCE_S)
            assert process.returncode not in (0, None), (args, out)
            assert words in err, (args, err)
            assert "Traceback" not in err
            assert len(err.strip().splitlines()) == 1, (args, err)


def test_without_permission() -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; from kflex_repro.cli import main; import kflex_repro.probe.cli; os.setuid(65534); "
            "raise SystemExit(main(['monitor', '--port', '1']))",
        ],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": "/nonexistent"},
    )
    assert process.returncode == 3
    assert "needs root" in process.stderr


def test_targets_without_a_choice(server: ManagedServer) -> None:
    assert server.pid in {one.pid for one in targets.everything()}
    with pytest.raises(KflexError, match="no process"):
        targets.by_pid(2**22 - 3)
