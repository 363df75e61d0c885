"""Parsers on real output, command lines, the fixed-rate generator's parts, and CPU accounting."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kflex_repro.bench import load
from kflex_repro.bench.cpu import CpuMeter, parse_busy_ticks, parse_process_ticks
from kflex_repro.bench.load import Child, Job, Target, mix_script, parse_redis_benchmark
from kflex_repro.bench.rate_worker import Generator, reply_size
from kflex_repro.errors import KflexError, Unavailable

DATA = Path(__file__).parent / "data"
HERE = Target("127.0.0.1", 7777)


def job(op: str = "GET", mix: tuple[tuple[str, int], ...] = (), **kw: object) -> Job:
    values: dict[str, object] = {
        "clients": 50, "threads": 2, "value_bytes": 64, "pipeline": 1, "keys": 1000,
        "distribution": "uniform", "seconds": 3.0,
    }  # fmt: skip
    return Job(op, mix, **{**values, **kw})  # type: ignore[arg-type]


def text(name: str) -> str:
    return (DATA / name).read_bytes().decode()


def test_threads_output_takes_its_rate_from_the_last_progress_line() -> None:
    outcome = parse_redis_benchmark(text("bench_redis_benchmark_threads.txt"))
    assert outcome.ops == 200_000
    # Its summary says 66577.90: its clock ran on to 3.00 s.
    assert outcome.rps == 69169.8
    assert (outcome.p50_ms, outcome.p99_ms, outcome.p999_ms) == (0.575, 1.967, 3.359)


def test_a_run_of_one_progress_line() -> None:
    outcome = parse_redis_benchmark(text("bench_redis_benchmark_pipeline.txt"))
    assert outcome.rps == 1071171.4
    assert (outcome.p50_ms, outcome.p99_ms, outcome.p999_ms) == (0.607, 0.975, 2.527)


def test_a_run_without_progress_takes_the_summary() -> None:
    head, _, tail = text("bench_redis_benchmark_pipeline.txt").partition("rps=1071171.4")
    outcome = parse_redis_benchmark(head + tail[tail.index("=====") :])
    assert outcome.rps == 1067615.75


@pytest.mark.parametrize("output", ["", "Could not connect to Redis at 127.0.0.1:1: Connection refused\n"])
def test_other_output_is_one_line(output: str) -> None:
    with pytest.raises(KflexError, match="redis-benchmark"):
        parse_redis_benchmark(output)


def test_commands_touch_only_our_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFLEX_REDIS_BENCHMARK", "redis-benchmark")
    for op in ("GET", "SET", "INCR", "LPUSH"):
        argv = load.redis_benchmark_argv(job(op), HERE, 100)
        assert argv[argv.index(op) + 1].startswith(load.PREFIX)
    assert "-s" in load.redis_benchmark_argv(job(), Target("", 0, "/x/redis.sock"), 1)
    assert "--threads" not in load.redis_benchmark_argv(job(threads=1), HERE, 1)


def test_the_key_names_agree_with_redis_benchmarks() -> None:
    assert load.numbered_key(42) == f"{load.PREFIX}000000000042"


def test_a_missing_redis_benchmark_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFLEX_REDIS_BENCHMARK", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable):
        load.redis_benchmark_binary()


def test_the_mix_script_covers_all_hundred_percent() -> None:
    script = mix_script(job("MIX", (("GET", 81), ("SET", 9), ("INCR", 10)), distribution="zipfian"))
    assert "n < 81" in script
    assert "n < 90" in script
    assert "n < 100" in script
    # resp-benchmark's zipfian begins at 1 and includes its bound.
    assert 'bench.key(999, "zipfian"' in script


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failing_child_says_its_last_line() -> None:
    child = Child(python("import sys; print('first', file=sys.stderr); sys.exit('no luck')"), HERE)
    with pytest.raises(KflexError, match="no luck"):
        child.finish(20.0)


def test_a_hanging_child_is_ended() -> None:
    child = Child(python("import time; time.sleep(600)"), HERE)
    with pytest.raises(KflexError, match="did not finish"):
        child.finish(0.2)
    assert child.process.poll() is not None


def test_stop_ends_a_child_that_ignores_sigterm() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    child = Child(python(code), HERE)
    assert child.process.stdout is not None
    assert child.process.stdout.readline() == "up\n"
    child.stop()
    child.stop()
    assert child.process.returncode == -9


def test_a_program_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.shutil, "which", lambda _name: None)
    with pytest.raises(Unavailable, match="not installed"):
        Child(["/nonexistent/redis-benchmark"], HERE)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"", 0),
        (b"+OK\r", 0),
        (b"+OK\r\n", 5),
        (b"$-1\r\n", 5),
        (b"$3\r\nab", 0),
        (b"$3\r\nabc\r", 0),
        (b"$3\r\nabc\r\n", 9),
        (b"$0\r\n\r\n", 6),
        (b"-ERR x\r\n", 8),
        (b":12\r\n", 5),
    ],
)
def test_reply_size(data: bytes, size: int) -> None:
    assert reply_size(data) == size


@pytest.mark.parametrize("op", ["GET", "SET"])
def test_the_fixed_rate_request_is_resp(op: str) -> None:
    spec = {"keys": 10, "rate": 100, "seconds": 1, "op": op, "value_bytes": 5, "clients": 0}
    request = Generator(spec)._request()
    assert request.startswith(b"*2\r\n$3\r\nGET\r\n" if op == "GET" else b"*3\r\n$3\r\nSET\r\n")
    assert request.endswith(b"\r\n" if op == "GET" else b"$5\r\nxxxxx\r\n")


def test_process_ticks_survive_a_strange_name() -> None:
    stat = "12 (a b) c) (x) S 1 12 12 0 -1 4194560 1 0 0 0 700 300 0 0 20 0 5 0 100 0 0"
    assert parse_process_ticks(stat) == 1000


def test_busy_ticks_leave_out_idle_iowait_and_steal() -> None:
    assert parse_busy_ticks("cpu  10 2 30 1000 500 4 5 900 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n") == 51


def test_the_meter_divides_by_operations(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()

    def write(process: int, user: int) -> None:
        stat = f"7 (redis-server) S {' '.join(['0'] * 10)} {process} 0 0 0"
        (tmp_path / "7" / "stat").write_text(stat)
        (tmp_path / "stat").write_text(f"cpu {user} 0 0 0 0 0 0 0\n")

    write(100, 1000)
    meter = CpuMeter(7, tmp_path)
    write(150, 1300)
    tick_us = 1e6 / os.sysconf("SC_CLK_TCK")
    cost = meter.per_op(1000)
    assert cost.server == pytest.approx(50 * tick_us / 1000)
    assert cost.system == pytest.approx(300 * tick_us / 1000)


def test_a_server_that_cannot_be_seen_has_no_cpu_figure(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu 1 0 0 0 0 0 0 0\n")
    assert CpuMeter(None, tmp_path).per_op(1).server is None
    assert CpuMeter(99, tmp_path).per_op(1).server is None
