"""``bench probe``: runs every arm beside plain runs, and turns the runs into ratios and verdicts."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from kflex_repro.bench.cpu import CpuCost, CpuMeter
from kflex_repro.bench.load import PREFIX, Outcome, Target, driver, redis_benchmark_binary
from kflex_repro.bench.mark import without_ratios
from kflex_repro.bench.probe_arms import LABELS, OPTIONS, PLAIN, PROBES
from kflex_repro.bench.probe_figures import ArmRun, OpResult
from kflex_repro.bench.probe_plan import (
    VALUE_BYTES,
    Load,
    Op,
    Round,
    Study,
    judge,
    read_study,
    schedule,
)
from kflex_repro.bench.result import make_directory
from kflex_repro.bench.run import calm_exit, host_facts, uninterrupted
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.files import write_atomically

SCHEMA = 1
KIND = "probe"
FULL_PAIRS, FULL_SECONDS = 5, 1.1
QUICK_PAIRS, QUICK_SECONDS = 3, 0.5
# What a run takes besides its load, seconds: attaching and filling keys; starting each generator.
_OVERHEAD_S, _START_S = 0.4, 0.27
_ARM_S = {"old": 0.4, "bpftrace": 5.0}
_GUESS = 10_000.0
_CALIBRATE = 0.15
_FILL_BATCH = 50_000
_CLOCK_S = 0.04
_FILL = """
for i = tonumber(ARGV[2]), tonumber(ARGV[3]) do
  redis.call('SET', ARGV[1] .. string.format('%012d', i), ARGV[4])
end
"""


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where nothing was said."""

    quick: bool = False
    ops: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    pairs: int | None = None
    seconds: float | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What will be run; ``seconds`` of a saturation run, the others take their share of it."""

    study: Study
    arms: tuple[str, ...]
    pairs: int
    seconds: float
    out: Path
    quick: bool = False

    @property
    def rounds(self) -> tuple[Round, ...]:
        """Of one op."""
        return tuple(schedule(self.arms, number) for number in range(self.pairs))

    @property
    def runs(self) -> int:
        """Arms attached and loaded, in all."""
        return len(self.study.ops) * sum(len(one.runs) for one in self.rounds)

    def run_s(self, arm: str) -> float:
        """One run of an arm, seconds."""
        share = sum(load.share for load in self.study.loads)
        return self.seconds * share + self._overhead_s + _ARM_S.get(arm, 0.0)

    @property
    def _overhead_s(self) -> float:
        return _OVERHEAD_S + _START_S * len(self.study.loads)

    @property
    def estimate_s(self) -> float:
        each = sum(self.run_s(arm) for one in self.rounds for arm in one.runs)
        return 5.0 + len(self.study.ops) * (each + 1.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "ops": [op.name for op in self.study.ops],
            "loads": [load.name for load in self.study.loads],
            "arms": [PLAIN, *self.arms],
            "pairs": self.pairs,
            "seconds": self.seconds,
            "runs": self.runs,
            "estimate_s": round(self.estimate_s),
            "out": str(self.out),
        }


def make_plan(options: Options, study: Study | None = None) -> Plan:
    """Options into a plan; KflexError with exit code 2 for names that are not there."""
    study = study or read_study()
    ops = [op for op in study.ops if op.name in options.ops] if options.ops else list(study.ops)
    for name, known in (
        *((name, [op.name for op in study.ops]) for name in options.ops),
        *((name, list(PROBES)) for name in options.arms),
    ):
        if name not in known:
            raise KflexError(f"no {name!r}", fix=f"there are: {', '.join(known)}", exit_code=2)
    loads = study.loads
    arms = tuple(arm for arm in PROBES if not options.arms or arm in options.arms)
    if options.quick:
        ops = ops if options.ops else [op for op in ops if op.quick]
        loads = tuple(load for load in loads if load.quick)
        if not options.arms:
            arms = tuple(arm for arm in arms if arm != "bpftrace")
    if "bpftrace" in arms and shutil.which("bpftrace") is None:
        if options.arms:
            raise Unavailable("bpftrace is not installed", fix="apt install bpftrace, or leave it out")
        arms = tuple(arm for arm in arms if arm != "bpftrace")
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Plan(
        replace(study, ops=tuple(ops), loads=tuple(loads)),
        arms,
        options.pairs or (QUICK_PAIRS if options.quick else FULL_PAIRS),
        options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS),
        options.out or Path("results") / f"{stamp}-probe",
        options.quick,
    )


def check_host() -> None:
    """Unavailable (exit code 3) if this user or machine cannot run it at all."""
    if os.geteuid() != 0:
        raise Unavailable("probes need root", fix="run it as root: sudo kflex-repro bench probe")
    redis_benchmark_binary()


# --- one run -----------------------------------------------------------------------------------------------


class Site(Protocol):
    """Where runs are made: a real server (LiveSite), or what a test has instead of one."""

    def prepare(self, op: Op, first: bool) -> None: ...

    def run(self, op: Op, loads: Sequence[Load], arm: str, seconds: float) -> ArmRun: ...


def steady_rate(samples: Sequence[tuple[float, int]], total: int) -> float | None:
    """Requests/s between the first and the last sample in the midst of a run; None without two of them.

    By the server's count: redis-benchmark with threads looks at its own clock every 250 ms, which is too
    seldom for runs of a second.
    """
    inner = [(at, count) for at, count in samples if total * 0.04 < count < total * 0.97]
    if len(inner) < 2 or inner[-1][1] - inner[0][1] < total / 4:
        return None
    (start, before), (end, after) = inner[0], inner[-1]
    return (after - before) / (end - start)


class LiveSite:
    """A redis-server of ours and its load generators."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._target = Target("127.0.0.1", server.port)
        self._client = server.client(socket_timeout=120)
        self._expected: dict[tuple[str, str, str], float] = {}

    def prepare(self, op: Op, first: bool) -> None:
        """The keys of ``op``, as many as each run is to find."""
        if not first and not op.refill:
            return
        self._client.flushall()
        for start in range(0, op.fill, _FILL_BATCH):
            end = min(start + _FILL_BATCH, op.fill) - 1
            self._client.eval(_FILL, 0, PREFIX, start, end, "x" * VALUE_BYTES)

    def _counts(self) -> dict[str, int]:
        stats = self._client.info("commandstats")
        return {name.removeprefix("cmdstat_").upper(): int(one["calls"]) for name, one in stats.items()}

    def run(self, op: Op, loads: Sequence[Load], arm: str, seconds: float) -> ArmRun:
        """Attach the arm, put every load on, take it off."""
        from kflex_repro.bench import probe_arms

        keys = self._client.dbsize()
        with calm_exit(probe_arms.attach(arm, self._server.pid, self._server.port)) as attached:
            before = self._counts()
            done = {load.name: self._load(op, load, arm, seconds) for load in loads}
            after = self._counts()
            sight = attached.end()
        came = {name: count - before.get(name, 0) for name, count in after.items()}
        requests = came.pop(op.command, 0)
        deleted = keys - self._client.dbsize() if op.command == "DEL" else None
        hits = deleted / requests if deleted is not None and requests else None
        return ArmRun(done, requests, sum(came.values()), sight, hits)

    def _load(self, op: Op, load: Load, arm: str, seconds: float) -> tuple[Outcome, CpuCost]:
        label = (op.name, load.name, arm)
        generator = driver(load.driver)
        if generator.calibrated and label not in self._expected:
            self._expected[label] = self._once(op, load, seconds * _CALIBRATE, _GUESS)[0].rps
        made = self._once(op, load, seconds, self._expected.get(label, 0.0))
        self._expected[label] = made[0].rps
        return made

    def _once(self, op: Op, load: Load, seconds: float, expected: float) -> tuple[Outcome, CpuCost]:
        running = driver(load.driver).prepare(load.job(op, seconds), self._target, expected)
        try:
            meter = CpuMeter(self._server.pid)
            with self._clocked(op) as clocked:
                running.go()
                outcome = running.wait()
            cost = meter.per_op(outcome.ops)
        finally:
            running.stop()
        rate = None if load.rate else steady_rate(clocked, outcome.ops)
        return (replace(outcome, rps=rate) if rate else outcome), cost

    @contextmanager
    def _clocked(self, op: Op) -> Iterator[list[tuple[float, int]]]:
        """Samples of how many requests the server has had, ``(seconds, requests)``, taken meanwhile."""
        samples: list[tuple[float, int]] = []
        first = self._counts().get(op.command, 0)
        done = threading.Event()

        def look() -> None:
            while not done.wait(_CLOCK_S):
                count = self._counts().get(op.command, 0) - first
                samples.append((time.monotonic(), count))

        thread = threading.Thread(target=look, name="clock", daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            done.set()
            thread.join()

    def program_costs(self, op: Op, load: Load, arm: str, seconds: float) -> dict[str, dict[str, float]]:
        """What the programs of one of our modes take themselves, by the kernel's own count."""
        from kflex_repro.bpf import libbpf
        from kflex_repro.probe import latency, targets

        with (
            libbpf.run_statistics(),
            latency.Probe([targets.by_port(self._server.port)], OPTIONS[arm]) as probe,
        ):
            before = self._counts().get(op.command, 0)
            self._load(op, load, arm, seconds)
            requests = self._counts()[op.command] - before
            costs = probe.cost()
        return {
            name: {
                "runs_per_request": round(runs / requests, 3),
                "ns_per_run": round(ns / runs, 1) if runs else 0.0,
                "ns_per_request": round(ns / requests, 1),
            }
            for name, (runs, ns) in costs.items()
        }

    def close(self) -> None:
        """Let go of the server."""
        self._client.close()


# --- the whole ---------------------------------------------------------------------------------------------

Step = Callable[[float, str], None]


class Run:
    """Executes a plan. ``document()`` is what there is so far, at any time, also after a failure."""

    def __init__(self, plan: Plan, command: str, step: Step = lambda _seconds, _text: None) -> None:
        self.plan = plan
        self._command, self._step = command, step
        self._started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._host: dict[str, Any] = {}
        self._redis: dict[str, Any] = {"version": "?", "args": []}
        self._programs: dict[str, Any] = {}
        self._complete = False
        self.results: list[OpResult] = []

    def document(self) -> dict[str, Any]:
        """result.json."""
        return without_ratios(self._document())

    def _document(self) -> dict[str, Any]:
        study = self.plan.study
        done = [one for one in self.results if one.rounds]
        verdicts = [verdict for one in done for verdict in judge(study.goals, one.op.name, one.ratios())]
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "host": {"emulated": False, **self._host},
            "redis": self._redis,
            "command": self._command,
            "started": self._started,
            "interrupted": not self._complete,
            "quick": self.plan.quick,
            "seconds": self.plan.seconds,
            "arms": {arm: LABELS[arm] for arm in (PLAIN, *self.plan.arms)},
            "loads": {load.name: load.about for load in study.loads},
            "ops": [one.to_json() for one in done],
            "goals": [verdict.to_json() for verdict in verdicts],
            "programs": self._programs,
        }

    def measure(self, site: Site) -> None:
        """Every op, every round."""
        for op in self.plan.study.ops:
            result = OpResult(op, self.plan.study.loads)
            self.results.append(result)
            for number, one in enumerate(self.plan.rounds):
                runs = []
                for place, arm in enumerate(one.runs):
                    text = f"{op.name}: pair {number + 1} of {self.plan.pairs}, {LABELS[arm]}"
                    self._step(0.0, text)
                    site.prepare(op, first=number == place == 0)
                    runs.append(site.run(op, self.plan.study.loads, arm, self.plan.seconds))
                    self._step(self.plan.run_s(arm), text)
                result.rounds.append((one, runs))

    def execute(self) -> dict[str, Any]:
        """Run everything and write result.json, report.html and PNGs.

        Whatever ends it early leaves the completed rounds in result.json, marked as interrupted, and goes on
        as an exception; a run that completed nothing leaves nothing.
        """
        from kflex_repro.bench.probe_report import write_report

        fresh = make_directory(self.plan.out)
        try:
            self._step(0.0, "looking at the machine")
            self._host = host_facts()
            self._live()
        except BaseException:
            with uninterrupted(), suppress(KflexError, OSError):
                if any(one.rounds for one in self.results):
                    self._save()
                    write_report(self.document(), self.plan.out)
                elif fresh:
                    self.plan.out.rmdir()
            raise
        self._complete = True
        self._save()
        self._step(0.0, "drawing the report")
        document = self.document()
        write_report(document, self.plan.out)
        return document

    def _live(self) -> None:
        from kflex_repro import build
        from kflex_repro.bench.bed import server_args
        from kflex_repro.redis.server import ManagedServer

        self._step(0.0, "building what is not built yet")
        for name in ("latency", "oldmonitor"):
            build.ensure(only=name)
        with calm_exit(ManagedServer()) as server:
            with server.client() as client:
                version = str(client.info("server").get("redis_version", "?"))
            self._redis = {"version": version, "args": list(server_args(server.args))}
            site = LiveSite(server)
            try:
                self.measure(site)
                self._cost(site)
            finally:
                site.close()

    def _cost(self, site: LiveSite) -> None:
        ops = self.plan.study.ops
        op = next((one for one in ops if one.command == "GET"), ops[0])
        site.prepare(op, first=True)
        load = self.plan.study.loads[0]
        for arm in self.plan.arms:
            if arm in OPTIONS:
                self._step(0.0, f"what the programs of {LABELS[arm]} take")
                costs = site.program_costs(op, load, arm, self.plan.seconds)
                self._programs[arm] = {"op": op.name, "load": load.name, "programs": costs}

    def _save(self) -> None:
        data = json.dumps(self.document(), indent=1, allow_nan=False) + "\n"
        write_atomically(self.plan.out / "result.json", data.encode())


def is_probe_result(path: Path) -> bool:
    """Whether a result.json is one of `bench probe`; False for what is no JSON at all."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("kind") == KIND


def read_document(path: Path) -> dict[str, Any]:
    """A result.json of ours; KflexError if it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KflexError(f"cannot read {path.name}, {error}", str(path.parent)) from error
    if not isinstance(document, dict) or (document.get("schema"), document.get("kind")) != (SCHEMA, KIND):
        raise KflexError(f"{path.name} is not a result of `bench probe`", str(path.parent))
    return without_ratios(document)
