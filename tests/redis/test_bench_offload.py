"""The whole command on real servers with the real offload: short, and cut short in every way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kflex_repro import build
from kflex_repro.bench.result import read_result
from kflex_repro.redis.server import ManagedServer, free_port
from tests.conftest import require

TOP = Path(__file__).resolve().parents[2]
SHORT = ["--scenario", "get-2t", "--pairs", "1", "--seconds", "1", "--keys", "2000"]
LONG = ["--scenario", "get-2t", "--pairs", "50", "--seconds", "2", "--keys", "2000"]


@pytest.fixture(autouse=True, scope="module")
def _needs_the_offload() -> None:
    require("root")
    for feature in ("sk_msg", "sockops", "tp_btf", "cgroup2"):
        require(feature)


def bench(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kflex_repro", "bench", "redis", *args],
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """A long benchmark, its port and its results directory; ended whatever the test does."""
    port, out = free_port(), tmp_path / "out"
    process = bench(*LONG, "--port", str(port), "--out", str(out))
    try:
        until(lambda: process.poll() is not None or load_on(port), 60)
        assert process.poll() is None, process.communicate()
        yield process, port, out
    finally:
        process.kill()
        process.communicate()
        subprocess.run(
            [sys.executable, "-m", "kflex_repro", "offload", "stop", "--port", str(port)],
            cwd=TOP, capture_output=True, check=False,
        )  # fmt: skip


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def processes(text: str) -> list[int]:
    """Pids of other processes with ``text`` in their command line (a server's is ``redis-server …:PORT``)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if text.encode() in command and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def load_on(port: int) -> bool:
    """Whether redis-benchmark is at work on ``port``: everything is attached by then."""
    return any("redis-benchmark" in comm(pid) for pid in processes(f"-p\0{port}\0"))


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def pins(port: int) -> list[str]:
    root = Path("/sys/fs/bpf/kflex")
    return [path.name for path in root.glob(f"{port}-*")] if root.is_dir() else []


def test_a_short_run_is_right_and_leaves_nothing(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out"
    process = bench(*SHORT, "--port", str(port), "--out", str(out), "--json")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    document = read_result(out / "result.json")
    assert json.loads(stdout) == document
    assert document["interrupted"] is False
    (scenario,) = document["scenarios"]
    assert scenario["checked"]["mismatches"] == 0
    assert scenario["checked"]["ops"] > 100
    assert scenario["offload"]["served_in_kernel"] > 0.5
    assert scenario["baseline"]["p999_ms"] is not None
    assert {"throughput.png", "ratio.png", "latency.png", "cpu.png", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    assert "checked answers were right" in stderr
    assert pins(port) == []
    assert processes(str(port)) == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(
    running: tuple[subprocess.Popen[str], int, Path], signum: signal.Signals, code: int
) -> None:
    process, port, _ = running
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert pins(port) == []
    assert processes(str(port)) == []


def test_a_killed_server_is_one_line(running: tuple[subprocess.Popen[str], int, Path]) -> None:
    process, port, _ = running
    (server,) = [pid for pid in processes(f":{port}") if comm(pid).startswith("redis-server")]
    os.kill(server, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("kflex-repro: ")
    assert pins(port) == []
    assert processes(str(port)) == []


def test_what_a_killed_toolkit_leaves_offload_stop_takes_away(
    running: tuple[subprocess.Popen[str], int, Path],
) -> None:
    process, port, out = running
    process.kill()
    process.communicate(timeout=30)
    # Its servers and load generators follow it.
    until(lambda: processes(str(port)) == [], 20)
    stopped = subprocess.run(
        [sys.executable, "-m", "kflex_repro", "offload", "stop", "--port", str(port)],
        cwd=TOP, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert stopped.returncode == 0, stopped.stderr
    assert pins(port) == []
    assert read_result(out / "result.json")["interrupted"] is True


def test_attach_writes_and_deletes_only_its_own_keys(tmp_path: Path) -> None:
    with ManagedServer(module=build.ensure().module, unix=True) as managed:
        client = managed.client()
        client.set("mine", "kept")
        process = bench(*SHORT, "--attach", f"127.0.0.1:{managed.port}", "--out", str(tmp_path / "out"))
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert client.keys("*") == [b"mine"]
        assert client.get("mine") == b"kept"
        assert pins(managed.port) == []
    (scenario,) = read_result(tmp_path / "out" / "result.json")["scenarios"]
    assert scenario["offload"]["served_in_kernel"] > 0.5
    assert scenario["checked"]["mismatches"] == 0
    assert "only keys that begin with kflex:bench:" in stderr
    assert stdout.strip().endswith("checked answers were right")
