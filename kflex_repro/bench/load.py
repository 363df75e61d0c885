"""Load generators: redis-benchmark, resp-benchmark and our fixed-rate one, behind one interface.

What each can say about latency (a figure that a driver does not report is None, never made up):

- redis-benchmark: p50, p99, p99.9 from its own HDR histogram (p99.9 is its 99.902 % line). With a pipeline it
  times a whole batch.
- resp-benchmark: p99 only, in steps of 10 µs below 1 ms and of 100 µs below 10 ms. Its target rate (``-t``)
  times a request from when it was sent, so it is not used for latency at a fixed rate.
- fixed-rate: exact percentiles, each request timed from the moment it was due (no coordinated omission).

The throughput of redis-benchmark is taken from its last progress line, not from its summary: with
``--threads`` its clock runs on to the next multiple of 250 ms after the last reply.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Protocol

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.patience import patient

PREFIX = "kflex:bench:"
COUNTERS = 1000
LISTS = 1000


def numbered_key(index: int) -> str:
    """Key ``index`` of the key space that redis-benchmark and the fixed-rate driver use."""
    return f"{PREFIX}{index:012d}"


def short_key(index: int) -> str:
    """Key ``index`` of the key space of the mixes (unpadded: padding in Lua would cost the client as much
    as sending).
    """
    return f"{PREFIX}z:{index}"


def counter_key(index: int) -> str:
    return f"{PREFIX}ctr:{index:012d}"


def list_key(index: int) -> str:
    return f"{PREFIX}list:{index:012d}"


@dataclass(frozen=True)
class Target:
    """Where to send load.

    ``unix_path`` wins over host and port; ``netns`` is the client's network namespace.
    """

    host: str
    port: int
    unix_path: str | None = None
    netns: str | None = None


@dataclass(frozen=True)
class Job:
    """What to send: a Scenario reduced to what a load generator needs. ``seconds`` is the length aimed at."""

    op: str
    mix: tuple[tuple[str, int], ...]
    clients: int
    threads: int
    value_bytes: int
    pipeline: int
    keys: int
    distribution: str
    seconds: float
    rate: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a driver measured: ``ops`` completed, ``rps`` in 1/s, latencies in ms (None: the driver cannot
    say).
    """

    ops: int
    rps: float
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None


class Driver(Protocol):
    """A load generator. ``supports_unix``: can use a unix socket. ``calibrated``: needs the expected rate."""

    name: str
    supports_unix: bool
    calibrated: bool

    def prepare(self, job: Job, target: Target, expected_rps: float) -> Running:
        """Start the generator up to the point where it waits for ``go``."""
        ...


class Running(Protocol):
    def go(self) -> None: ...

    def wait(self) -> Outcome: ...

    def stop(self) -> None: ...


# --- child processes ------------------------------------------------------------------------------


class Child:
    """A subprocess in a session of its own, so that the terminal's Ctrl-C reaches only us, and we end it by
    its pid.
    """

    def __init__(self, argv: Sequence[str], target: Target, *, stdin: bool = False) -> None:
        full = list(argv)
        if target.netns is not None:
            full = ["nsenter", f"--net=/run/netns/{target.netns}", "--", *full]
        # If we are killed, it ends too: setpriv and nsenter become it by exec, under the same pid.
        if setpriv := shutil.which("setpriv"):
            full = [setpriv, "--pdeathsig", "KILL", *full]
        self.name = argv[0].rpartition("/")[2] if not argv[0].endswith("python") else argv[2]
        try:
            self.process = subprocess.Popen(
                full,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError as error:
            raise Unavailable(f"{error.filename} is not installed", fix="run `make setup`") from error

    def finish(self, timeout: float) -> str:
        """Wait for it to end and return its stdout.

        Raises KflexError if it fails or takes longer than ``timeout`` s.
        """
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise KflexError(
                f"{self.name} did not finish within {timeout:.0f} s", fix="is the server still answering?"
            ) from None
        if self.process.returncode != 0:
            raise KflexError(f"{self.name} failed, {_last_line(err) or _last_line(out) or self._how()}")
        return out

    def _how(self) -> str:
        code = self.process.returncode
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """End the child and what it started; harmless if it has ended."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                break
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patient(2.0))
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1] if lines else ""


# --- redis-benchmark ------------------------------------------------------------------------------

_PROGRESS = re.compile(r"rps=\S+ \(overall: (-?nan|[\d.]+)\)")
_COMPLETED = re.compile(r"(\d+) requests completed in ([\d.]+) seconds")
_SUMMARY_RPS = re.compile(r"throughput summary: ([\d.]+) requests per second")
_PERCENTILE = re.compile(r"^([\d.]+)% <= ([\d.]+) milliseconds", re.MULTILINE)


def parse_redis_benchmark(output: str) -> Outcome:
    """Read redis-benchmark's normal (not csv, not quiet) output; raises KflexError if it is not that."""
    completed = _COMPLETED.search(output)
    summary = _SUMMARY_RPS.search(output)
    if completed is None or summary is None:
        raise KflexError(f"redis-benchmark said something unexpected: {_last_line(output)[:120]!r}")
    ops = int(completed[1])
    rps = float(summary[1])
    # The first progress line comes before anything was sent.
    ticks = [float(overall) for overall in _PROGRESS.findall(output)[1:]]
    if ticks and ticks[-1] > 0:
        rps = ticks[-1]

    # The histogram by percentile comes first; the cumulative one after it steps by value and is not wanted.
    by_percentile = output.partition("Cumulative distribution")[0]
    points = [(float(percent), float(ms)) for percent, ms in _PERCENTILE.findall(by_percentile)]

    def at(percent: float) -> float | None:
        return next((ms for listed, ms in points if listed >= percent), None)

    p99 = re.search(r"p50\s+p95\s+p99\s+max\s+([\d. ]+)", output)
    # The summary has the exact p99, the histogram only the next listed step above it (99.219 %).
    exact = p99[1].split() if p99 else []
    return Outcome(ops, rps, at(50.0), float(exact[4]) if len(exact) > 4 else at(99.0), at(99.9))


def redis_benchmark_argv(job: Job, target: Target, requests: int) -> list[str]:
    """The command line for ``requests`` requests; only keys that begin with PREFIX are touched."""
    value = "x" * job.value_bytes
    command, space = {
        "GET": (["GET", f"{PREFIX}__rand_int__"], job.keys),
        "SET": (["SET", f"{PREFIX}__rand_int__", value], job.keys),
        "INCR": (["INCR", f"{PREFIX}ctr:__rand_int__"], COUNTERS),
        "DEL": (["DEL", f"{PREFIX}__rand_int__"], job.keys),
        "LPUSH": (["LPUSH", f"{PREFIX}list:__rand_int__", value], LISTS),
    }[job.op]
    where = ["-s", target.unix_path] if target.unix_path else ["-h", target.host, "-p", str(target.port)]
    threads = ["--threads", str(job.threads)] if job.threads > 1 else []
    size = ["-c", str(job.clients), "-n", str(requests), "-r", str(space), "-P", str(job.pipeline)]
    return [redis_benchmark_binary(), *where, *size, *threads, "--precision", "3", *command]


def redis_benchmark_binary() -> str:
    """The path of redis-benchmark; Unavailable if there is none."""
    binary = os.environ.get("KFLEX_REDIS_BENCHMARK") or shutil.which("redis-benchmark")
    if not binary:
        raise Unavailable("redis-benchmark is not installed", fix="run `make setup` (Debian: redis-tools)")
    return binary


def _reach(target: Target) -> None:
    """KflexError if nobody listens there: the load generators would try for ever."""
    if target.netns is not None:
        return
    kind = socket.AF_UNIX if target.unix_path else socket.AF_INET6 if ":" in target.host else socket.AF_INET
    address = target.unix_path or (target.host, target.port)
    try:
        with socket.socket(kind) as probe:
            probe.settimeout(patient(5.0))
            probe.connect(address)
    except OSError as error:
        where = target.unix_path or f"{target.host}:{target.port}"
        raise KflexError(
            f"cannot connect, {error.strerror or error}", where, "is the server still up?"
        ) from error


class RedisBenchmark:
    name = "redis-benchmark"
    supports_unix = True
    calibrated = True

    def prepare(self, job: Job, target: Target, expected_rps: float) -> Running:
        _reach(target)
        batch = job.clients * job.pipeline
        # A little more than expected: a run should rather be too long than too short.
        requests = max(batch, int(expected_rps * job.seconds * 1.04))
        return _RedisBenchmarkRun(redis_benchmark_argv(job, target, requests), target, job.seconds)


class _RedisBenchmarkRun:
    def __init__(self, argv: Sequence[str], target: Target, seconds: float) -> None:
        self._argv, self._target, self._seconds = argv, target, seconds
        self._child: Child | None = None

    def go(self) -> None:
        self._child = Child(self._argv, self._target)

    def wait(self) -> Outcome:
        assert self._child is not None
        # A server this much slower than when it was calibrated is a failure, not a slow run.
        return parse_redis_benchmark(self._child.finish(patient(15 + 6 * self._seconds)))

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()


# --- drivers that run in a Python worker ----------------------------------------------------------


def mix_script(job: Job) -> str:
    """The Lua script of resp-benchmark for a mix.

    The value is constant and the tables are reused: the generator shares the machine with the server, and
    what it computes per request would be measured as if it were Redis.
    """
    space = job.keys if job.distribution == "uniform" else job.keys - 1
    lines = [
        f'local key = bench.key({space}, "{job.distribution}", "keys")',
        f'local counter = bench.key({COUNTERS}, "uniform", "counters")',
        "local percent = bench.rand(100)",
        f'local value = string.rep("x", {job.value_bytes})',
        'local get, set, incr = {"GET", ""}, {"SET", "", value}, {"INCR", ""}',
        "function generate()",
        "  local n = tonumber(percent())",
    ]
    below = 0
    for op, share in job.mix:
        below += share
        name = op.lower()
        key = f'"{PREFIX}ctr:" .. counter()' if op == "INCR" else f'"{PREFIX}z:" .. key()'
        lines.append(f"  if n < {below} then {name}[2] = {key} return {name} end")
    lines.append("end")
    return "\n".join(lines)


_RESP_COUNT = re.compile(r"\bcnt: (\d+),")


class _WorkerRun:
    """A Python worker: says ``ready``, waits for ``go`` on stdin, prints one JSON line and ends.

    So its start (imports, connections) is outside of what is measured.
    """

    def __init__(self, module: str, spec: dict[str, object], target: Target, seconds: float) -> None:
        self._seconds = seconds
        self._child = Child([sys.executable, "-m", module, json.dumps(spec)], target, stdin=True)
        self._child.name = module.rpartition(".")[2].replace("_worker", " driver")
        assert self._child.process.stdout is not None
        try:
            line = self._child.process.stdout.readline()
            if line.strip() != "ready":
                self._child.finish(patient(10.0))
                raise KflexError(f"{self._child.name} failed to start: {line.strip()[:120]!r}")
        except BaseException:
            self._child.stop()
            raise

    def go(self) -> None:
        stdin = self._child.process.stdin
        assert stdin is not None
        stdin.write("go\n")
        stdin.flush()

    def wait(self) -> Outcome:
        return self._read(self._child.finish(patient(15 + 3 * self._seconds)))

    def _read(self, output: str) -> Outcome:
        line = _last_line(output)
        try:
            # Only resp-benchmark's last progress line has the number of requests: its API has not.
            counted = _RESP_COUNT.findall(output)
            return Outcome(**{**json.loads(line), **({"ops": int(counted[-1])} if counted else {})})
        except (ValueError, TypeError) as error:
            raise KflexError(f"{self._child.name} said something unexpected: {line[:120]!r}") from error

    def stop(self) -> None:
        self._child.stop()


class RespBenchmark:
    name = "resp-benchmark"
    supports_unix = False
    calibrated = False

    def prepare(self, job: Job, target: Target, expected_rps: float) -> Running:
        _reach(target)
        spec: dict[str, object] = {
            "host": target.host,
            "port": target.port,
            "script": mix_script(job),
            "connections": job.clients,
            "pipeline": job.pipeline,
            # It takes whole seconds only.
            "seconds": math.ceil(job.seconds),
            "threads": job.threads,
        }
        return _WorkerRun("kflex_repro.bench.resp_worker", spec, target, job.seconds)


class FixedRate:
    name = "fixed-rate"
    supports_unix = True
    calibrated = False

    def prepare(self, job: Job, target: Target, expected_rps: float) -> Running:
        spec: dict[str, object] = {**asdict(job), "host": target.host, "port": target.port}
        spec["unix_path"] = target.unix_path
        return _WorkerRun("kflex_repro.bench.rate_worker", spec, target, job.seconds)


def driver(name: str) -> Driver:
    """The driver of that name (``burst`` loads with redis-benchmark)."""
    drivers: dict[str, Driver] = {
        "redis-benchmark": RedisBenchmark(),
        "burst": RedisBenchmark(),
        "resp-benchmark": RespBenchmark(),
        "fixed-rate": FixedRate(),
    }
    return drivers[name]
