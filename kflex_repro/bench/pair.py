"""Runs scenarios in interleaved pairs and turns the runs into figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from kflex_repro.bench.bed import Bed, family_keys
from kflex_repro.bench.burst import WATCH_AFTER_S, run_burst
from kflex_repro.bench.checker import COHERENT_OPS, STORE_OPS, Checked, Checker, Wire, encode
from kflex_repro.bench.cpu import CpuCost, CpuMeter
from kflex_repro.bench.inside import Inside, Watched, inside, watching
from kflex_repro.bench.load import Job, Outcome, driver
from kflex_repro.bench.result import Ratio, Recovery, ScenarioResult, Side
from kflex_repro.bench.scenario import BURST_RUN_S, CALIBRATION_S, OVERHEAD_S, PREPARE_S, Scenario
from kflex_repro.bench.stats import ShareSample, figure, pair_order, ratios, recovery_seconds
from kflex_repro.patience import FACTOR, emulated, patient

WARM_ENOUGH = 0.97
_WARM_PASSES = 6
_WARM_SAMPLE = 512
_WARM_BATCH = 32
# A guess that was far too low gives a run too short to tell the rate: then once more, with what it gave.
_CALIBRATIONS = 3


@dataclass(frozen=True)
class ArmRun:
    """One arm of one pair.

    ``served`` and ``passed`` count the requests that the offload saw meanwhile, the checker's included (None
    for ``served`` of the other arms); ``burst`` and ``shares`` are in seconds from the start of the run;
    ``watched`` is what a probe saw inside the server.
    """

    outcome: Outcome
    cost: CpuCost
    checked: Checked
    served: int | None = None
    passed: int = 0
    oldest_set_ms: float | None = None
    shares: tuple[ShareSample, ...] = ()
    burst: tuple[float, float] | None = None
    watched: Watched | None = None


def job_of(scenario: Scenario, seconds: float) -> Job:
    """The load generator's view of a scenario."""
    return Job(
        op=scenario.op,
        mix=scenario.mix,
        clients=scenario.clients,
        threads=scenario.client_threads,
        value_bytes=scenario.value_bytes,
        pipeline=scenario.pipeline,
        keys=scenario.keys,
        distribution=scenario.distribution,
        seconds=seconds,
        rate=scenario.rate,
    )


def family_of(scenario: Scenario) -> str | None:
    """The key family a scenario reads and writes; None if it touches counters or lists only."""
    if scenario.op in ("INCR", "LPUSH"):
        return None
    return "short" if scenario.driver == "resp-benchmark" else "numbered"


def first_guess(scenario: Scenario) -> float:
    """Requests/s to calibrate with: low enough that the calibration run stays short on a slow machine."""
    guess = (10_000 if scenario.clients < 10 else 40_000) * (3 if scenario.pipeline > 1 else 1)
    return guess / (2 * FACTOR if emulated() else 1)


class Warmer:
    """Makes sure that a scenario's keys are in the table before the offload is measured."""

    def __init__(self) -> None:
        self._reached: dict[tuple[str, int], float] = {}

    def warm(self, bed: Bed, scenario: Scenario) -> float:
        """The share (0 to 1) of sampled keys that a GET finds in the table, after loading what was missing.

        Keys get into the table by GETs that Redis answers (or, in store mode, by SETs). A table that cannot
        hold them all is loaded once as far as it goes and then left alone.
        """
        family = family_of(scenario)
        if family is None:
            return 0.0
        keys = family_keys(family, scenario.keys)
        label = (family, scenario.value_bytes)
        wire = Wire(bed.offload.host, bed.offload.port, patient(60.0))
        try:
            wire.ask(b"PING")
            share = self._sample(bed, wire, keys)
            for _ in range(_WARM_PASSES):
                if share >= min(WARM_ENOUGH, self._reached.get(label, 1.0) - 0.05):
                    break
                self._pass(wire, keys, b"x" * scenario.value_bytes if bed.mode == "store" else None)
                share = self._sample(bed, wire, keys)
            self._reached[label] = share
            return share
        finally:
            wire.close()

    def _sample(self, bed: Bed, wire: Wire, keys: Sequence[bytes]) -> float:
        step = max(1, len(keys) // _WARM_SAMPLE)
        chosen = keys[::step][:_WARM_SAMPLE]
        before = bed.served()
        for key in chosen:
            wire.ask(b"GET", key)
        return min(1.0, (bed.served() - before) / len(chosen))

    def _pass(self, wire: Wire, keys: Sequence[bytes], value: bytes | None) -> None:
        for start in range(0, len(keys), _WARM_BATCH):
            batch = keys[start : start + _WARM_BATCH]
            wire.send(
                b"".join(encode([b"GET", key] if value is None else [b"SET", key, value]) for key in batch)
            )
            for _ in batch:
                wire.reply()


Progress = Callable[[float, str], None]
Count = Callable[[Checked], None]
Measure = Callable[[Bed, Scenario, str, float, float, Count], ArmRun]


def measure(
    bed: Bed,
    scenario: Scenario,
    arm: str,
    seconds: float,
    expected_rps: float,
    count_checked: Count,
    probe: bool = False,
) -> ArmRun:
    """Run one arm for about ``seconds``, with the checker beside it on the same server.

    What the checker found goes to ``count_checked`` also when the run itself fails. With ``probe`` the
    monitor's histograms are on meanwhile.
    """
    endpoint = bed.endpoint(arm)
    with watching(endpoint) if probe else nullcontext() as watched:
        run = _measure(bed, scenario, arm, seconds, expected_rps, count_checked)
    return replace(run, watched=watched)


def _measure(
    bed: Bed, scenario: Scenario, arm: str, seconds: float, expected_rps: float, count_checked: Count
) -> ArmRun:
    endpoint = bed.endpoint(arm)
    running = driver(scenario.driver).prepare(job_of(scenario, seconds), endpoint.target(arm), expected_rps)
    checker = Checker(endpoint.host, endpoint.port, ops=COHERENT_OPS if bed.mode == "coherent" else STORE_OPS)
    shares: tuple[ShareSample, ...] = ()
    burst: tuple[float, float] | None = None
    offloaded = arm == "offload"
    try:
        checker.start()
        served, passed = (bed.served(), bed.passed()) if offloaded else (0, 0)
        meter = CpuMeter(endpoint.pid)
        running.go()
        if scenario.driver == "burst":
            count = (lambda: (bed.served(), bed.passed())) if offloaded else None
            shares, burst = run_burst(running, endpoint.target(arm), count)
        outcome = running.wait()
        cost = meter.per_op(outcome.ops)
        if offloaded:
            served, passed = bed.served() - served, bed.passed() - passed
    finally:
        running.stop()
        checked = checker.stop()
        count_checked(checked)
    oldest = bed.oldest_set_ms() if offloaded and bed.mode == "coherent" and scenario.share("SET") else None
    return ArmRun(outcome, cost, checked, served if offloaded else None, passed, oldest, shares, burst)


@dataclass
class Pairs:
    """The completed pairs of one scenario, and every answer checked on the way."""

    scenario: Scenario
    done: list[dict[str, ArmRun]] = field(default_factory=list)
    checked: Checked = field(default_factory=lambda: Checked(0, 0))

    def column(self, arm: str, pick: Callable[[ArmRun], float | None]) -> list[float | None]:
        return [pick(pair[arm]) for pair in self.done]

    def side(self, arm: str) -> Side:
        return Side(
            rps=figure(self.column(arm, lambda run: run.outcome.rps)),
            p50_ms=figure(self.column(arm, lambda run: run.outcome.p50_ms)),
            p99_ms=figure(self.column(arm, lambda run: run.outcome.p99_ms)),
            p999_ms=figure(self.column(arm, lambda run: run.outcome.p999_ms)),
            server_cpu_us_per_op=figure(self.column(arm, lambda run: run.cost.server)),
            system_cpu_us_per_op=figure(self.column(arm, lambda run: run.cost.system)),
        )

    def ratio_to(self, arm: str) -> Ratio:
        def quotient(pick: Callable[[ArmRun], float | None]) -> list[list[float | None]]:
            return [self.column("offload", pick), self.column(arm, pick)]

        return Ratio(
            rps=ratios(*quotient(lambda run: run.outcome.rps)),
            p99=ratios(*quotient(lambda run: run.outcome.p99_ms)),
            server_cpu=ratios(*quotient(lambda run: run.cost.server)),
            system_cpu=ratios(*quotient(lambda run: run.cost.system)),
        )

    def served_in_kernel(self) -> float | None:
        """The share of all requests of the offload arms, the checker's included, that the kernel answered."""
        runs = [pair["offload"] for pair in self.done]
        # Clients of another namespace are not seen by the offload at all, but their requests count.
        total = sum(max(run.outcome.ops + run.checked.ops, (run.served or 0) + run.passed) for run in runs)
        served = sum(run.served or 0 for run in runs)
        return round(min(1.0, served / total), 4) if total else None

    def recovery(self) -> Recovery | None:
        runs = [pair["offload"] for pair in self.done]
        first = next((run for run in runs if run.burst), None)
        if first is None or first.burst is None:
            return None
        seconds = [recovery_seconds(run.shares, *run.burst) for run in runs if run.burst]
        # Not back while it was watched: as bad as the watch was long, at least.
        seconds = [WATCH_AFTER_S if second is None else second for second in seconds]
        series = tuple((sample.t, sample.share) for sample in first.shares)
        return Recovery(figure(seconds), first.burst, series)

    def result(self) -> ScenarioResult | None:
        """The figures of the completed pairs; None if there is not one."""
        if not self.done:
            return None
        peers = [arm for arm in self.done[0] if arm not in ("baseline", "offload")]
        return ScenarioResult(
            scenario=self.scenario,
            pairs=len(self.done),
            baseline=self.side("baseline"),
            offload=self.side("offload"),
            served_in_kernel=self.served_in_kernel(),
            ratio=self.ratio_to("baseline"),
            peers={arm: self.side(arm) for arm in peers},
            ratio_to={arm: self.ratio_to(arm) for arm in peers},
            checked_ops=self.checked.ops,
            mismatches=self.checked.mismatches,
            mismatch_examples=self.checked.examples,
            set_in_redis_ms=figure(self.column("offload", lambda run: run.oldest_set_ms)),
            recovery=self.recovery(),
            inside=self.inside(),
            requests={arm: sum(pair[arm].outcome.ops for pair in self.done) for arm in self.done[0]},
        )

    def inside(self) -> dict[str, dict[str, Inside]]:
        """arm -> command -> what the server's probe saw; empty without one."""
        commands = [op for op, _ in self.scenario.mix] or [self.scenario.op]
        found = {}
        for arm in self.done[0]:
            seen = [pair[arm].watched for pair in self.done]
            watched = [one.commands for one in seen if one is not None]
            if watched:
                found[arm] = inside(watched, commands)
        return found


class Runner:
    """Runs scenarios on beds and keeps what was completed, so that an interrupted run still has its
    figures.
    """

    def __init__(
        self, pairs: int, seconds: float, progress: Progress | None = None, measure_arm: Measure = measure
    ) -> None:
        self._pairs, self._seconds = pairs, seconds
        self._progress: Progress = progress or (lambda _seconds, _text: None)
        self._measure = measure_arm
        self._warmers: dict[Bed, Warmer] = {}
        self._current: Pairs | None = None
        self.results: list[ScenarioResult] = []
        # Every answer checked so far, also of pairs that were never completed.
        self.checked = Checked(0, 0)
        self.notes: list[str] = []

    def run(self, bed: Bed, scenario: Scenario) -> ScenarioResult:
        """All pairs of one scenario; its result is also appended to ``results``."""
        if "unix" in scenario.peers and bed.baseline.unix_path is None:
            scenario = replace(scenario, peers=())
        pairs = self._current = Pairs(scenario)
        self._prepare(bed, scenario)
        expected: dict[str, float] = {}
        for number in range(self._pairs):
            runs: dict[str, ArmRun] = {}
            for arm in pair_order(scenario.arms, number):
                text = f"{scenario.name}: pair {number + 1} of {self._pairs}, {arm}"
                self._progress(0.0, text)
                runs[arm] = self._arm(bed, scenario, arm, expected)
                self._progress(self._length(scenario) + OVERHEAD_S, text)
            pairs.done.append(runs)
        self._current = None
        bed.offload_off()
        result = pairs.result()
        assert result is not None
        self.results.append(result)
        return result

    def give_up(self) -> None:
        """Keep the completed pairs of the scenario that was cut short."""
        pairs, self._current = self._current, None
        result = pairs.result() if pairs else None
        if result is not None:
            self.results.append(result)

    def _count(self, checked: Checked) -> None:
        self.checked += checked
        if self._current is not None:
            self._current.checked += checked

    def _length(self, scenario: Scenario) -> float:
        return BURST_RUN_S if scenario.driver == "burst" else self._seconds

    def _prepare(self, bed: Bed, scenario: Scenario) -> None:
        self._progress(0.0, f"{scenario.name}: filling the key space")
        family = family_of(scenario)
        if family is not None:
            bed.fill(family, scenario.keys, scenario.value_bytes)
        self._progress(PREPARE_S, scenario.name)

    def _arm(self, bed: Bed, scenario: Scenario, arm: str, expected: dict[str, float]) -> ArmRun:
        if scenario.op == "LPUSH":
            # Lists only grow: without this each run would find them longer than the last.
            bed.offload_off()
            bed.delete(family_keys("lists", 0), bed.endpoint(arm))
        if arm == "offload":
            bed.offload_on()
            share = self._warmers.setdefault(bed, Warmer()).warm(bed, scenario)
            if scenario.path == "local" and family_of(scenario) and share < WARM_ENOUGH:
                self._note(f"{scenario.name}: only {share:.0%} of its keys were in the table")
        else:
            bed.offload_off()
        if driver(scenario.driver).calibrated and arm not in expected:
            steady = replace(scenario, driver="redis-benchmark")
            expected[arm] = first_guess(scenario)
            for _ in range(_CALIBRATIONS):
                found = self._measure(bed, steady, arm, CALIBRATION_S / 2, expected[arm], self._count).outcome
                expected[arm] = found.rps
                if found.ops / found.rps > CALIBRATION_S / 4:
                    break
            self._progress(CALIBRATION_S, scenario.name)
        rate = expected.get(arm, 0.0)
        run = self._measure(bed, scenario, arm, self._length(scenario), rate, self._count)
        if scenario.driver != "burst":
            expected[arm] = run.outcome.rps
        return run

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
