"""The real thing, short: every arm sees every request, and nothing stays attached. Speed is not looked at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.bench import probe_arms
from kflex_repro.bench.probe_arms import PLAIN
from kflex_repro.bench.result import read_result
from kflex_repro.redis.server import ManagedServer
from tests.conftest import require, unavailable

TOP = Path(__file__).resolve().parents[2]
REQUESTS = 300


@pytest.fixture(autouse=True, scope="module")
def _needs_probes() -> None:
    require("root")
    require("tp_btf")


def bench(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kflex_repro", "bench", *args],
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )


def children_of(pid: int) -> set[int]:
    """The processes that ``pid`` started and that still run."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def runs(pids: set[int], name: str) -> bool:
    """Whether one of the processes is a ``name``."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if name.encode() in (Path(f"/proc/{pid}") / "cmdline").read_bytes():
                return True
    return False


def programs_of(pids: set[int]) -> list[str]:
    """Descriptors of BPF programs and links that any of the processes holds."""
    held = []
    for pid in pids:
        try:
            entries = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        for entry in entries:
            try:
                held.append(f"{pid}: {entry.readlink()}")
            except OSError:
                continue
    return [name for name in held if "bpf-prog" in name or "bpf_link" in name or "bpf-link" in name]


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_short_run_has_every_figure_and_every_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = ["--quick", "--pairs", "1", "--seconds", "0.2", "--op", "get"]
    process = bench("probe", *short, "--json", "--out", str(out))
    try:
        printed, said = process.communicate(timeout=110)
    finally:
        process.kill()
    assert process.returncode == 0, said
    document = json.loads(printed)
    assert document == json.loads((out / "result.json").read_text())
    assert not document["interrupted"]
    assert {path.name for path in out.iterdir()} == {
        *("result.json", "report.html", "cost.png", "throughput.png", "latency.png")
    }
    (op,) = document["ops"]
    for load in ("saturation", "single"):
        assert set(op["figures"][load]) == {PLAIN, "histogram", "events", "sampled", "old"}
        assert all(figures["rps"]["median"] > 0 for figures in op["figures"][load].values())
        assert set(op["ratio"][load]) == {"histogram", "events", "sampled", "old"}
    assert {goal["arm"] for goal in document["goals"]} == {"histogram", "events", "sampled"}
    _all_seen(op["seen"])
    for arm, found in document["programs"].items():
        # At least once for the server's socket; the client's is on the same machine.
        runs = {name: one["runs_per_request"] for name, one in found["programs"].items()}
        assert all(each > 0.99 for each in runs.values()), (arm, runs)


def _all_seen(seen: dict[str, Any]) -> None:
    for arm in ("histogram", "events"):
        assert seen[arm]["seen"] == seen[arm]["requests"] > 0
        assert seen[arm]["lost"] == 0
    sampled = seen["sampled"]
    assert 0 < sampled["seen"] < sampled["requests"] / 10
    # Other commands are left out by the sampling too, and they may share a read.
    assert (
        sampled["requests"] <= sampled["seen"] + sampled["skipped"] <= sampled["requests"] + sampled["others"]
    )
    old = seen["old"]
    assert old["seen"] == old["requests"] or old["lost"] > 0
    assert old["write_us"]["median"] > 0


@pytest.mark.parametrize("arm", [*probe_arms.PROBES])
def test_an_arm_sees_what_is_asked_and_leaves_nothing(arm: str) -> None:
    if arm == "bpftrace":
        import shutil

        if shutil.which("bpftrace") is None:
            unavailable("bpftrace is not installed")
    with ManagedServer() as server, server.client() as client:
        before = children_of(os.getpid())
        with probe_arms.attach(arm, server.pid, server.port) as attached:
            for number in range(REQUESTS):
                client.set(f"key:{number}", "value")
                client.get(f"key:{number}")
            sight = attached.end()
            assert attached.end() is sight
        assert sight is not None
        if arm == "sampled":
            assert sum(sight.commands.values()) + sight.skipped >= 2 * REQUESTS
        elif arm in ("old", "bpftrace"):
            # The kernel skips programs on tracepoints where another's runs; bpftrace does not know of that.
            for command in ("SET", "GET"):
                assert 0 < sight.commands[command] <= REQUESTS
                assert sight.commands[command] == REQUESTS or arm == "bpftrace" or sight.lost
        else:
            assert (sight.commands["SET"], sight.commands["GET"]) == (REQUESTS, REQUESTS)
        assert not sight.lost or arm in ("old", "bpftrace")
        assert programs_of({os.getpid()}) == []
        assert children_of(os.getpid()) - before == set()


def test_an_arm_that_fails_leaves_nothing() -> None:
    with ManagedServer() as server:
        for arm in ("histogram", "old"):
            with pytest.raises(ZeroDivisionError), probe_arms.attach(arm, server.pid, server.port):
                assert programs_of({os.getpid()})
                _ = 1 / 0
            assert programs_of({os.getpid()}) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_attached(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    process = bench("probe", "--arm", "old", "--op", "get", "--pairs", "50", "--out", str(out))
    try:
        until(lambda: runs(children_of(process.pid), "oldmonitor_reader"), 60)
        children = children_of(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 128 + signal.SIGTERM), said
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    # Nothing was completed: nothing is left.
    assert not out.exists() or json.loads((out / "result.json").read_text())["interrupted"]


def test_bench_redis_shows_what_requests_took_inside(tmp_path: Path) -> None:
    for feature in ("sk_msg", "sockops", "cgroup2"):
        require(feature)
    out = tmp_path / "out"
    short = ["--scenario", "mix-50-50", "--pairs", "1", "--seconds", "0.5", "--keys", "2000"]
    process = bench("redis", "--probe", *short, "--out", str(out))
    try:
        printed, said = process.communicate(timeout=110)
    finally:
        process.kill()
    assert process.returncode == 0, said
    (scenario,) = read_result(out / "result.json")["scenarios"]
    assert set(scenario["inside"]) == {"baseline", "offload"}
    plain, offload = scenario["inside"]["baseline"], scenario["inside"]["offload"]
    assert set(plain) == {"GET", "SET"}
    for phases in plain.values():
        assert 0 < phases["exec"]["p50_us"]["median"] <= phases["total"]["p99_us"]["median"]
        assert phases["total"]["p50_us"]["median"] <= phases["total"]["p999_us"]["median"]
    # The server of the offload never saw what the kernel served.
    assert sum(one["calls"] for one in offload.values()) < sum(one["calls"] for one in plain.values())
    assert "inside the server" in printed
    assert "Inside the server" in (out / "report.html").read_text()
