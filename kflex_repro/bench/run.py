"""One benchmark run from plan to result: which beds, in which order, what is kept when it is cut short."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kflex_repro.bench import inside, netns
from kflex_repro.bench.bed import Bed, attached_bed, own_bed, parse_host_port
from kflex_repro.bench.load import redis_benchmark_binary
from kflex_repro.bench.pair import Runner, measure
from kflex_repro.bench.result import Result, ScenarioResult, make_directory, write_result
from kflex_repro.bench.scenario import Scenario, estimate, load_emulation, load_scenarios, select
from kflex_repro.errors import KflexError, Unavailable

FULL_PAIRS, FULL_SECONDS = 5, 3.0
QUICK_PAIRS, QUICK_SECONDS = 3, 2.5

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where nothing was said."""

    attach: str | None = None
    quick: bool = False
    names: tuple[str, ...] = ()
    pairs: int | None = None
    seconds: float | None = None
    netns: bool = False
    out: Path | None = None
    keys: int | None = None
    port: int | None = None
    probe: bool = False
    emulated: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be run. ``estimate_s`` in seconds of wall clock; ``emulated``: on an emulated CPU."""

    scenarios: tuple[Scenario, ...]
    pairs: int
    seconds: float
    attach: tuple[str, int] | None
    port: int | None
    out: Path
    probe: bool = False
    emulated: bool = False

    @property
    def estimate_s(self) -> float:
        return estimate(self.scenarios, self.pairs, self.seconds, emulated=self.emulated)

    @property
    def runs(self) -> int:
        """Measured runs of the load generator (calibration not counted)."""
        return sum(len(scenario.arms) for scenario in self.scenarios) * self.pairs

    def to_json(self) -> dict[str, Any]:
        return {
            "scenarios": [scenario.name for scenario in self.scenarios],
            "pairs": self.pairs,
            "seconds": self.seconds,
            "runs": self.runs,
            "estimate_s": round(self.estimate_s),
            "attach": f"{self.attach[0]}:{self.attach[1]}" if self.attach else None,
            "probe": self.probe,
            "emulated": self.emulated,
            "out": str(self.out),
        }


def make_plan(options: Options, scenarios: Sequence[Scenario] | None = None) -> Plan:
    """Turn options into a plan; KflexError with exit code 2 for what does not go together."""
    if options.attach and (options.port or options.netns):
        raise KflexError("--attach goes with neither --port nor --netns", exit_code=2)
    every = load_scenarios() if scenarios is None else scenarios
    pairs, seconds = (QUICK_PAIRS, QUICK_SECONDS) if options.quick else (FULL_PAIRS, FULL_SECONDS)
    if options.emulated:
        small = load_emulation()
        names = options.names or (small.quick if options.quick else small.scenarios)
        chosen = tuple(small.fit(s) for s in select(every, names, netns=options.netns))
        pairs, seconds = small.pairs, small.quick_seconds if options.quick else small.seconds
    else:
        chosen = select(every, options.names, quick=options.quick, netns=options.netns)
    if options.attach:
        unfit = [s.name for s in chosen if s.mode != "coherent" or s.path != "local" or s.aof]
        if unfit and options.names:
            raise KflexError(f"scenario {unfit[0]} needs servers of its own", "--attach", exit_code=2)
        chosen = tuple(s for s in chosen if s.name not in unfit)
    if options.keys:
        chosen = tuple(replace(s, keys=options.keys) for s in chosen)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Plan(
        scenarios=chosen,
        pairs=options.pairs or pairs,
        seconds=options.seconds or seconds,
        attach=parse_host_port(options.attach) if options.attach else None,
        port=options.port,
        out=options.out or Path("results") / f"{stamp}-redis",
        probe=options.probe,
        emulated=options.emulated,
    )


def check_host() -> None:
    """Unavailable (exit code 3) if this user or machine cannot run a benchmark at all."""
    if os.geteuid() != 0:
        raise Unavailable(
            "the benchmark attaches the offload", fix="run it as root: sudo kflex-repro bench redis"
        )
    redis_benchmark_binary()


@contextmanager
def calm_exit(inner: AbstractContextManager[_T]) -> Iterator[_T]:
    """``inner``, whose exit cannot be interrupted: a second Ctrl-C must not leave hooks or servers behind."""
    value = inner.__enter__()
    try:
        yield value
    except BaseException as error:
        with uninterrupted():
            if not inner.__exit__(type(error), error, error.__traceback__):
                raise
    else:
        with uninterrupted():
            inner.__exit__(None, None, None)


@contextmanager
def uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Events:
    """Who wants to know: ``step(seconds of the estimate done, what is going on)``, ``finished(result)``."""

    step: Callable[[float, str], None] = lambda _seconds, _text: None
    finished: Callable[[ScenarioResult], None] = lambda _result: None


class Run:
    """Executes a plan. ``result`` is what there is so far, at any time, also after a failure."""

    def __init__(
        self, plan: Plan, command: str, events: Events | None = None, *, report: bool = True
    ) -> None:
        self.plan = plan
        self._report = report
        self._command = command
        self._events = events or Events()
        self._started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._host: dict[str, Any] = {}
        self._redis: dict[str, Any] = {"version": "?", "args": []}
        self._notes: list[str] = [inside.NOTE] if plan.probe else []
        measure_arm = partial(measure, probe=True) if plan.probe else measure
        self._runner = Runner(plan.pairs, plan.seconds, self._events.step, measure_arm)
        self._complete = False
        self._made_out = False

    @property
    def mismatches(self) -> int:
        """Wrong answers so far, also in pairs that were not completed."""
        return self._runner.checked.mismatches

    def result(self) -> Result:
        return Result(
            host=self._host,
            redis=self._redis,
            command=self._command,
            started=self._started,
            scenarios=tuple(self._runner.results),
            interrupted=not self._complete,
            notes=(*self._notes, *self._runner.notes),
        )

    def execute(self) -> Result:
        """Run everything, write result.json after every scenario and the report at the end.

        Whatever ends it early (Ctrl-C, a dead server, a full disk) leaves what was completed in result.json,
        marked as interrupted, and goes on as an exception.
        """
        self._make_out()
        try:
            self._events.step(0.0, "looking at the machine")
            self._host = host_facts()
            # Also a promise that there is room: better now than after half an hour.
            self._save()
            self._all()
        except BaseException:
            with uninterrupted():
                self._runner.give_up()
                if self._runner.results:
                    with suppress(KflexError):
                        self._save()
                else:
                    self._unmake_out()
            if self._runner.results:
                with suppress(KflexError):
                    self._write_report()
            raise
        self._complete = True
        self._save()
        self._write_report()
        return self.result()

    def _make_out(self) -> None:
        self._made_out = make_directory(self.plan.out)

    def _unmake_out(self) -> None:
        """A run that completed nothing leaves nothing."""
        with suppress(OSError):
            (self.plan.out / "result.json").unlink()
            if self._made_out:
                self.plan.out.rmdir()

    def _save(self) -> None:
        write_result(self.result(), self.plan.out)

    def _write_report(self) -> None:
        if not self._report:
            return
        self._events.step(0.0, "drawing the report")
        # Not above: the plotting library takes seconds to come on an emulated CPU, where nothing is drawn.
        from kflex_repro.bench.report import write_report

        write_report(self.result().to_json(), self.plan.out)

    def _all(self) -> None:
        scenarios = self.plan.scenarios
        if self.plan.attach:
            self._on(attached_bed(*self.plan.attach), scenarios)
            return
        netns.sweep()
        self._events.step(0.0, "building what is not built yet")
        built = _built()
        for mode, aof in (("coherent", False), ("coherent", True), ("store", False)):
            group = [s for s in scenarios if s.path == "local" and (s.mode, s.aof) == (mode, aof)]
            if group:
                self._on(own_bed(mode=mode, aof=aof, port=self.plan.port, built=built), group)
        remote = [s for s in scenarios if s.path == "remote"]
        if remote:
            with calm_exit(netns.VethPair()) as veth:
                self._on(own_bed(port=self.plan.port, veth=veth, built=built), remote)

    def _on(self, making: AbstractContextManager[Bed], scenarios: Sequence[Scenario]) -> None:
        self._events.step(0.0, "starting the servers")
        with calm_exit(making) as bed:
            self._redis = {"version": bed.redis_version, "args": list(bed.redis_args)}
            self._notes += [note for note in bed.notes if note not in self._notes]
            for scenario in scenarios:
                result = self._runner.run(bed, scenario)
                self._events.finished(result)
                self._save()


def _built() -> Any:
    from kflex_repro import build

    return build.ensure()


def host_facts() -> dict[str, Any]:
    from kflex_repro import host

    return dict(host.summary())


class Clock:
    """How long a run still takes: the estimate, corrected by how the part that is done went."""

    def __init__(self, estimate_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._now = max(1.0, estimate_s), now
        self._start = now()
        self.done = 0.0

    def advance(self, seconds: float) -> None:
        """``seconds`` of the estimate are done."""
        self.done = min(self._total, self.done + seconds)

    @property
    def share(self) -> float:
        return self.done / self._total

    @property
    def left_s(self) -> float:
        """Seconds left; trusts the estimate until a tenth is done."""
        elapsed = self._now() - self._start
        rest = self._total - self.done
        if self.share < 0.1:
            return max(0.0, self._total - elapsed) if elapsed > self.done else rest
        return rest * elapsed / self.done
