"""Pairs: who runs when, with which hooks, and what an interruption leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kflex_repro.bench.bed import family_keys, parse_host_port, server_args
from kflex_repro.bench.load import PREFIX
from kflex_repro.bench.pair import Pairs, Runner, Warmer, family_of, job_of
from kflex_repro.bench.result import ScenarioResult
from kflex_repro.bench.scenario import Scenario
from kflex_repro.bench.stats import ShareSample
from kflex_repro.errors import KflexError
from tests.unit.bench_fakes import FakeBed, arm_run, measure_with

GET = Scenario("get", "GET", "GET", peers=("unix",))
INCR = Scenario("incr", "INCR", "INCR")


@pytest.fixture(autouse=True)
def no_warming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Warmer, "warm", lambda *_: 1.0)


def run(bed: FakeBed, scenario: Scenario, pairs: int = 4) -> tuple[ScenarioResult, list[tuple[str, bool]]]:
    log: list[tuple[str, bool]] = []
    return Runner(pairs, 1.0, measure_arm=measure_with(log)).run(bed, scenario), log


def test_arms_interleave_and_only_the_offload_has_hooks() -> None:
    bed = FakeBed()
    result, log = run(bed, GET)
    # The first run of each arm is its calibration.
    first = ["baseline", "baseline", "unix", "unix", "offload", "offload"]
    assert [arm for arm, _ in log][:6] == first
    assert [arm for arm, _ in log][6:9] == ["offload", "unix", "baseline"]
    assert all(on == (arm == "offload") for arm, on in log)
    assert not bed.on
    assert result.pairs == 4
    # Hooks move only where they must: four offload arms, two of them back to back with the next pair's.
    assert bed.fake_session.calls == ["resume", "suspend"] * 2


def test_the_figures_are_of_every_pair() -> None:
    result, _ = run(FakeBed(), GET, pairs=3)
    assert result.baseline.rps is not None
    assert len(result.baseline.rps.runs) == 3
    assert result.ratio.rps is not None
    assert result.ratio.rps.median == pytest.approx(2.5)
    unix = result.ratio_to["unix"].rps
    assert unix is not None
    assert unix.median == pytest.approx(200 / 110)
    # 9 measured runs and 3 calibrations, 100 answers each.
    assert result.checked_ops == 1200


def test_without_a_unix_socket_there_is_no_such_peer() -> None:
    result, log = run(FakeBed(unix=None), GET, pairs=1)
    assert result.peers == {}
    assert "unix" not in {arm for arm, _ in log}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KflexError("the server went away")])
def test_an_interruption_keeps_the_completed_pairs(error: BaseException) -> None:
    # 2 calibrations and 2 pairs of 2 runs; then it happens in the middle of the third pair.
    runner = Runner(5, 1.0, measure_arm=measure_with([], 7, error))
    with pytest.raises(type(error)):
        runner.run(FakeBed(), INCR)
    runner.give_up()
    runner.give_up()
    (result,) = runner.results
    assert result.pairs == 2
    assert runner.checked.ops == 700


def test_an_interruption_in_the_first_pair_leaves_no_scenario() -> None:
    runner = Runner(5, 1.0, measure_arm=measure_with([], 1))
    with pytest.raises(KeyboardInterrupt):
        runner.run(FakeBed(), INCR)
    runner.give_up()
    assert runner.results == []


def test_progress_adds_up_to_the_estimate() -> None:
    from kflex_repro.bench.scenario import estimate

    steps: list[float] = []
    Runner(3, 2.0, lambda s, _text: steps.append(s), measure_with([])).run(FakeBed(), GET)
    assert sum(steps) == pytest.approx(estimate([GET], 3, 2.0) - 3.0)


def test_served_share_counts_the_checker_too() -> None:
    pairs = Pairs(INCR, [{"baseline": arm_run("baseline"), "offload": arm_run("offload")}])
    assert pairs.served_in_kernel() == pytest.approx(0.98 * 200_000 / 200_100, abs=1e-3)


def test_served_share_counts_what_the_offload_saw_pass() -> None:
    run = replace(arm_run("offload"), served=100_000, passed=300_000)
    pairs = Pairs(INCR, [{"baseline": arm_run("baseline"), "offload": run}])
    assert pairs.served_in_kernel() == 0.25


def test_a_burst_that_never_ends_counts_as_long_as_it_was_watched() -> None:
    shares = tuple(ShareSample(i / 10, 0 if i > 20 else 9, 9 if i > 20 else 1) for i in range(60))
    run = replace(arm_run("offload"), shares=shares, burst=(2.0, 3.0))
    recovery = Pairs(INCR, [{"baseline": arm_run("baseline"), "offload": run}]).recovery()
    assert recovery is not None
    assert recovery.seconds is not None
    assert recovery.seconds.median == 3.0


def test_family_and_job() -> None:
    mix = Scenario("m", "", "MIX", mix=(("GET", 90), ("SET", 10)), driver="resp-benchmark")
    assert [family_of(s) for s in (GET, INCR, mix)] == ["numbered", None, "short"]
    assert job_of(mix, 2.5).mix == mix.mix
    for family in ("numbered", "short", "counters", "lists"):
        keys = family_keys(family, 10)
        assert len(set(keys)) == len(keys)
        assert all(key.startswith(PREFIX.encode()) for key in keys)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("localhost:6379", ("localhost", 6379)), (":7000", ("127.0.0.1", 7000)), ("[::1]:6379", ("::1", 6379))],
)
def test_host_port(text: str, parsed: tuple[str, int]) -> None:
    assert parse_host_port(text) == parsed


@pytest.mark.parametrize("text", ["", "localhost", "a:b", "a:0", "a:70000", "6379"])
def test_bad_host_port_is_a_usage_error(text: str) -> None:
    with pytest.raises(KflexError) as caught:
        parse_host_port(text)
    assert caught.value.exit_code == 2


def test_server_args_name_no_place_of_this_run() -> None:
    command = [
        "/x/redis-server",
        "--port",
        "1",
        "--dir",
        "/tmp/y",
        "--save",
        "",
        "--loadmodule",
        "/c/kflex.so",
    ]
    assert server_args(command) == ("--save", "", "--loadmodule", "kflex.so")
