"""The load generators, the checker and the error paths against real servers, without the offload."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from kflex_repro.bench import netns
from kflex_repro.bench.bed import Bed, Endpoint, attached_bed, family_keys
from kflex_repro.bench.load import Job, Target, driver
from kflex_repro.bench.pair import Runner, Warmer, measure
from kflex_repro.bench.result import problems
from kflex_repro.bench.scenario import Scenario
from kflex_repro.errors import KflexError
from kflex_repro.redis.server import ManagedServer, free_port
from tests.conftest import require
from tests.unit.bench_fakes import FakeSession

MIX = (("GET", 45), ("SET", 5), ("INCR", 50))


@pytest.fixture(scope="module")
def server() -> Iterator[ManagedServer]:
    with ManagedServer(unix=True) as managed:
        yield managed


def job(op: str, **kw: object) -> Job:
    values: dict[str, object] = {
        "mix": (), "clients": 10, "threads": 1, "value_bytes": 64, "pipeline": 1, "keys": 1000,
        "distribution": "uniform", "seconds": 1.0,
    }  # fmt: skip
    return Job(op, **{**values, **kw})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "what", "unix"),
    [
        ("redis-benchmark", job("GET"), False),
        ("redis-benchmark", job("SET", threads=2, pipeline=4), True),
        ("redis-benchmark", job("LPUSH", clients=1), False),
        ("resp-benchmark", job("MIX", mix=MIX, distribution="zipfian"), False),
        ("fixed-rate", job("GET", rate=2000), False),
        ("fixed-rate", job("SET", rate=2000), True),
    ],
)
def test_every_driver_reports_what_it_can(server: ManagedServer, name: str, what: Job, unix: bool) -> None:
    path = str(server.unix_path) if unix else None
    running = driver(name).prepare(what, Target("127.0.0.1", server.port, path), 5000)
    before = server.client().info("stats")["total_commands_processed"]
    try:
        running.go()
        outcome = running.wait()
    finally:
        running.stop()
    done = server.client().info("stats")["total_commands_processed"] - before
    assert outcome.ops > 100
    assert outcome.ops == pytest.approx(done, abs=60)
    assert outcome.p99_ms is not None
    assert outcome.p99_ms > 0
    percentiles = (outcome.p50_ms, outcome.p999_ms)
    assert all(value is None for value in percentiles) == (name == "resp-benchmark")
    if name == "fixed-rate":
        assert outcome.rps == pytest.approx(2000, rel=0.1)


def test_the_mix_is_what_it_says(server: ManagedServer) -> None:
    client = server.client()
    client.config_resetstat()
    running = driver("resp-benchmark").prepare(job("MIX", mix=MIX), Target("127.0.0.1", server.port), 0)
    try:
        running.go()
        running.wait()
    finally:
        running.stop()
    stats = client.info("commandstats")
    calls = {op: stats[f"cmdstat_{op.lower()}"]["calls"] for op, _ in MIX}
    for op, share in MIX:
        assert calls[op] / sum(calls.values()) == pytest.approx(share / 100, abs=0.03)


@pytest.mark.parametrize("name", ["redis-benchmark", "resp-benchmark", "fixed-rate"])
def test_no_server_is_one_line(name: str) -> None:
    target = Target("127.0.0.1", free_port())
    with pytest.raises(KflexError) as caught:
        running = driver(name).prepare(job("GET", rate=100), target, 1000)
        running.go()
        running.wait()
    assert "\n" not in str(caught.value)
    assert "refused" in str(caught.value).lower()


def test_a_server_that_dies_under_load_is_one_line() -> None:
    with ManagedServer() as managed:
        running = driver("redis-benchmark").prepare(job("GET"), Target("127.0.0.1", managed.port), 10_000_000)
        running.go()
        client = managed.client()
        while client.info("clients")["connected_clients"] < 5:
            pass
        managed.kill()
        with pytest.raises(KflexError) as caught:
            running.wait()
        running.stop()
    assert "\n" not in str(caught.value)


def bed_of(plain: ManagedServer, served: ManagedServer) -> Bed:
    ends = [Endpoint("127.0.0.1", s.port, str(s.unix_path), s.pid, "127.0.0.1") for s in (plain, served)]
    return Bed(ends[0], ends[1], FakeSession(), "7.0", ())


def test_one_pair_on_two_servers(server: ManagedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Warmer, "warm", lambda *_: 1.0)
    scenario = Scenario("g", "GET", "GET", keys=500, clients=5, client_threads=1, peers=("unix",))
    with ManagedServer(unix=True) as other:
        bed = bed_of(server, other)
        result = Runner(1, 1.0, measure_arm=measure).run(bed, scenario)
        assert other.client().exists(*family_keys("numbered", 500)) == 500
        bed.clean()
        assert [key for key in other.client().keys("kflex:bench:*") if b":chk:" not in key] == []
    assert result.mismatches == 0
    assert result.checked_ops > 50
    for side in (result.baseline, result.offload, result.peers["unix"]):
        assert side.server_cpu_us_per_op is not None
        assert side.rps is not None
    assert result.served_in_kernel == 0.0
    document = {
        "schema": 1, "host": {"emulated": False}, "redis": {}, "command": "", "started": "",
        "scenarios": [result.to_json()],
    }  # fmt: skip
    assert problems(document) == []


def test_attach_to_nothing() -> None:
    with pytest.raises(KflexError, match="no server answers"), attached_bed("127.0.0.1", free_port()):
        pass


def test_attach_to_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = listening.getsockname()[1]
        with pytest.raises(KflexError, match="not a usable Redis"), attached_bed("127.0.0.1", port):
            pass


def test_attach_to_a_server_with_a_password() -> None:
    with (
        ManagedServer(["--requirepass", "x"]) as managed,
        pytest.raises(KflexError, match="login"),
        attached_bed("127.0.0.1", managed.port),
    ):
        pass


def test_a_veth_pair_joins_two_namespaces_and_goes() -> None:
    require("root", "capabilities")
    with netns.VethPair() as pair:
        assert len(pair.left_behind()) == 2
        with (
            netns.inside(pair.server_ns),
            ManagedServer(
                ["--protected-mode", "no"], unix=True, bind=f"127.0.0.1 {pair.server_host}"
            ) as managed,
        ):
            target = Target(pair.server_host, managed.port, netns=pair.client_ns)
            running = driver("redis-benchmark").prepare(job("SET"), target, 1000)
            running.go()
            assert running.wait().ops >= 1000
            peers = {line.split("addr=")[1].split(":")[0] for line in managed.client().execute_command(
                "CLIENT", "LIST").decode().splitlines()}  # fmt: skip
            assert peers == {"127.0.0.1"}
    assert pair.left_behind() == []


def test_a_veth_pair_goes_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    require("root", "capabilities")
    pair = netns.VethPair()

    def fail(*_: object) -> None:
        raise KflexError("no")

    monkeypatch.setattr(pair, "_up", fail)
    with pytest.raises(KflexError), pair:
        pass
    assert pair.left_behind() == []
