"""`bench probe`: which runs are compared, how goals are judged, what is left, what the report says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kflex_repro.bench import probe_arms, probe_report, probe_run
from kflex_repro.bench.cpu import CpuCost
from kflex_repro.bench.load import Outcome, Target, redis_benchmark_argv
from kflex_repro.bench.mark import EMULATED
from kflex_repro.bench.probe_arms import PLAIN, PROBES, Sight
from kflex_repro.bench.probe_figures import ArmRun
from kflex_repro.bench.probe_plan import Goal, Load, Op, judge, read_study, schedule
from kflex_repro.bench.probe_run import Options, Run, make_plan
from kflex_repro.bench.stats import figure
from kflex_repro.errors import KflexError

# What each arm costs on the machine of these tests.
COST = {PLAIN: 1.0, "histogram": 0.99, "events": 0.94, "sampled": 1.0, "old": 0.3, "bpftrace": 0.5}


class FakeSite:
    """Every run is a hundredth slower than the one before it: drift that pairs must take out."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.log: list[tuple[str, str]] = []
        self.prepared: list[tuple[str, bool]] = []
        self._fail_at = fail_at

    def prepare(self, op: Op, first: bool) -> None:
        self.prepared.append((op.name, first))

    def run(self, op: Op, loads: Sequence[Load], arm: str, seconds: float) -> ArmRun:
        if len(self.log) == self._fail_at:
            raise KeyboardInterrupt
        drift = 0.99 ** len(self.log)
        self.log.append((op.name, arm))
        rps = 80_000 * drift * COST[arm]
        outcome = Outcome(int(rps), rps, 50_000 / rps, 200_000 / rps, None)
        sight = None
        if arm != PLAIN:
            sight = Sight({op.command: 900 if arm == "bpftrace" else 1000}, 100 if arm == "bpftrace" else 0)
        return ArmRun({load.name: (outcome, CpuCost(8.0, 15.0)) for load in loads}, 1000, 3, sight)


def done(tmp_path: Path, site: FakeSite | None = None, **options: Any) -> dict[str, Any]:
    """The document of a whole run on a fake site, as if bpftrace were there."""
    plan = make_plan(Options(out=tmp_path / "out", arms=tuple(PROBES), **options))
    run = Run(plan, "kflex-repro bench probe")
    run.measure(site or FakeSite())
    return run.document()


@pytest.fixture(autouse=True)
def with_bpftrace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")


# --- which runs are compared -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 6))
def test_each_probe_runs_beside_a_plain_run(count: int) -> None:
    probes = list(PROBES)[:count]
    for number in (0, 1, 2):
        one = schedule(probes, number)
        assert set(one.pairs) == set(probes)
        for probe, (without, with_) in one.pairs.items():
            assert (one.runs[without], one.runs[with_]) == (PLAIN, probe)
            assert abs(without - with_) == 1


def test_rounds_go_to_and_fro() -> None:
    assert schedule(["a", "b", "c"], 0).runs == (PLAIN, "a", "b", PLAIN, "c")
    assert schedule(["a", "b", "c"], 1).runs == ("c", PLAIN, "b", "a", PLAIN)
    there, back = schedule(["a"], 0).pairs["a"], schedule(["a"], 1).pairs["a"]
    assert there == (0, 1)
    assert back == (1, 0)


def test_drift_favours_nobody(tmp_path: Path) -> None:
    document = done(tmp_path, pairs=4)
    ratio = document["ops"][0]["ratio"]["saturation"]
    # Forwards a run is 1 % too slow, backwards 1 % too fast; the median of both is what it costs.
    for arm in PROBES:
        assert ratio[arm]["rps"]["median"] == pytest.approx(COST[arm], rel=1e-3)
        assert ratio[arm]["rps"]["min"] < COST[arm] < ratio[arm]["rps"]["max"]


def test_noise_is_what_plain_runs_differ_by(tmp_path: Path) -> None:
    noise = done(tmp_path, pairs=1)["ops"][0]["noise"]["saturation"]["rps"]
    # Plain runs are three apart: three times a hundredth.
    assert noise["median"] == pytest.approx(0.99**3, rel=1e-4)
    assert len(noise["runs"]) == 2


def test_keys_are_set_before_every_run() -> None:
    site = FakeSite()
    plan = make_plan(Options(arms=("histogram",), pairs=2))
    Run(plan, "").measure(site)
    firsts = [first for name, first in site.prepared if name == "get"]
    assert firsts == [True, False, False, False]
    assert [op for op, _ in site.log] == [op for op in ("set", "update", "get", "delete") for _ in range(4)]


# --- goals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "runs", "met", "clear"),
    [
        ("rps", [0.99, 0.985, 1.01], True, True),
        ("rps", [0.97, 0.985, 1.01], True, False),
        ("rps", [0.97, 0.96, 0.975], False, True),
        ("rps", [0.98], True, True),
        ("p50", [1.0, 1.01, 1.02], True, True),
        ("p50", [1.0, 1.03, 1.05], False, False),
    ],
)
def test_a_goal_is_judged_by_the_median_of_the_pairs(
    metric: str, runs: list[float], met: bool, clear: bool
) -> None:
    goal = Goal("histogram", "saturation", {metric: 0.98 if metric == "rps" else 1.02})
    (verdict,) = judge([goal], "get", {"saturation": {"histogram": {metric: figure(runs)}}})
    assert (verdict.met, verdict.clear) == (met, clear)


def test_what_was_not_measured_is_not_judged() -> None:
    goal = Goal("events", "saturation", {"rps": 0.95})
    assert judge([goal], "get", {"saturation": {"histogram": {}}}) == []
    assert judge([goal], "get", {"single": {"events": {}}}) == []
    (verdict,) = judge([goal], "get", {"saturation": {"events": {"rps": None}}})
    assert verdict.met is None


def test_the_goals_of_the_design_are_those_of_the_file() -> None:
    bounds = {
        (goal.arm, metric): bound for goal in read_study().goals for metric, bound in goal.bounds.items()
    }
    assert bounds == {
        ("histogram", "rps"): 0.98,
        ("histogram", "p50"): 1.02,
        ("events", "rps"): 0.95,
        ("events", "p50"): 1.05,
        ("sampled", "rps"): 0.98,
        ("sampled", "p50"): 1.02,
    }


def test_the_verdict_names_what_was_missed(tmp_path: Path) -> None:
    document = done(tmp_path, ops=("get",), pairs=2)
    # 0.94 of the throughput is less than 0.95, and 1/0.94 of the latency more than 1.05.
    missed = [(goal["arm"], goal["metric"]) for goal in document["goals"] if not goal["met"]]
    assert missed == [("events", "rps"), ("events", "p50")]
    line = probe_report.verdict(document)
    assert line == "4 of 6 goals met; missed: events throughput of GET, events p50 of GET"


def test_a_noisy_machine_is_told(tmp_path: Path) -> None:
    document = done(tmp_path, ops=("get",), pairs=1)
    # Plain runs three runs apart differ by 3 %, the goals allow 2 %.
    assert "3.0% among themselves, more than the 2%" in probe_report.doubt(document)
    noise = document["ops"][0]["noise"]["saturation"]["rps"]
    noise["runs"] = [1.01, 0.995]
    assert probe_report.doubt(document) == ""


# --- plan --------------------------------------------------------------------------------------------------


def test_the_whole_run_and_the_quick_one_keep_to_their_time() -> None:
    whole, quick = make_plan(Options()), make_plan(Options(quick=True))
    assert whole.pairs >= 5
    assert whole.estimate_s <= 12 * 60
    assert [op.name for op in whole.study.ops] == ["set", "update", "get", "delete"]
    assert quick.estimate_s <= 90
    assert "bpftrace" not in quick.arms


@pytest.mark.parametrize("options", [Options(ops=("hset",)), Options(arms=("strace",))])
def test_unknown_names_are_one_line(options: Options) -> None:
    with pytest.raises(KflexError, match=r"no '(hset|strace)'") as caught:
        make_plan(options)
    assert caught.value.exit_code == 2


def test_without_bpftrace_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert "bpftrace" not in make_plan(Options()).arms
    with pytest.raises(KflexError, match="bpftrace is not installed"):
        make_plan(Options(arms=("bpftrace",)))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no op"),
        ("[[op]]\nname = 'x'\ncolour = 1\n", "unknown entries"),
        ("[[op]]\nname = 'x'\n", "missing"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "probe.toml"
    path.write_text(text)
    with pytest.raises(KflexError, match=what) as caught:
        read_study(path)
    assert str(path) in str(caught.value)


def test_a_dry_run_says_what_it_would_do(tmp_path: Path) -> None:
    from kflex_repro.bench.cli import group

    out = tmp_path / "out"
    result = CliRunner().invoke(group, ["probe", "--dry-run", "--json", "--quick", "--out", str(out)])
    plan = json.loads(result.output)
    assert plan["arms"] == [PLAIN, "histogram", "events", "sampled", "old"]
    assert plan["runs"] == 2 * 3 * 7
    assert not out.exists()


# --- throughput --------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_midst_of_a_run() -> None:
    # 10,000 requests at 20,000/s between a slow start and a generator that notices its end late.
    samples = [
        (0.1, 0),
        (0.2, 0),
        (0.3, 1000),
        (0.4, 3000),
        (0.5, 5000),
        (0.6, 7000),
        (0.7, 9000),
        (0.8, 10_000),
    ]
    assert probe_run.steady_rate([*samples, (0.9, 10_000), (1.0, 10_000)], 10_000) == pytest.approx(20_000)


@pytest.mark.parametrize(
    "samples", [[], [(0.1, 5000)], [(0.1, 10_000), (0.2, 10_000)], [(0.1, 900), (0.2, 1500)]]
)
def test_a_run_too_short_for_that_has_no_such_rate(samples: list[tuple[float, int]]) -> None:
    assert probe_run.steady_rate(samples, 10_000) is None


# --- what is left ------------------------------------------------------------------------------------------


def test_an_interruption_keeps_the_completed_pairs(tmp_path: Path) -> None:
    plan = make_plan(Options(arms=("histogram",), pairs=3))
    run = Run(plan, "")
    # Six runs of set, then the third pair of update begins.
    with pytest.raises(KeyboardInterrupt):
        run.measure(FakeSite(fail_at=11))
    document = run.document()
    assert document["interrupted"]
    assert [(op["name"], op["pairs"]) for op in document["ops"]] == [("set", 3), ("update", 2)]


def test_the_report_says_what_was_seen_and_what_was_published(tmp_path: Path) -> None:
    document = done(tmp_path, pairs=2)
    written = probe_report.write_report(document, tmp_path)
    assert {path.name for path in written} == {"report.html", "cost.png", "throughput.png", "latency.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written if path.suffix == ".png")
    page = written[0].read_text()
    for figure_ in ("140.8", "62.7", "twice the number of repeats", "duration of the server"):
        assert figure_ in page
    assert page.count("✗ missed") == 8
    assert "http://" not in page
    assert "<script" not in page
    assert "90 %" in {row[-1] for row in probe_report.rows(document) if row[2] == "bpftrace"}


def test_an_emulated_run_is_marked_and_compares_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(Options(out=tmp_path, arms=tuple(PROBES), pairs=2))
    run = Run(plan, "kflex-repro bench probe")
    monkeypatch.setattr(run, "_host", {"emulated": True})
    run.measure(FakeSite())
    document = run.document()
    assert document["goals"] == [] and probe_report.verdict(document) == EMULATED
    assert not any("%" in row[4] + row[7] for row in probe_report.rows(document))
    written = probe_report.write_report(document, tmp_path)
    assert {path.name for path in written} == {"report.html", "throughput.png", "latency.png"}
    page = written[0].read_text()
    assert EMULATED in page and "140.8" not in page and "✗ missed" not in page


def test_a_result_is_drawn_again(tmp_path: Path) -> None:
    from kflex_repro.bench.cli import group

    document = done(tmp_path, pairs=1, ops=("get",))
    (tmp_path / "result.json").write_text(json.dumps(document))
    result = CliRunner().invoke(group, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").exists()


def test_another_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text('{"schema": 1, "scenarios": []}')
    with pytest.raises(KflexError, match="not a result of `bench probe`"):
        probe_run.read_document(path)


# --- arms --------------------------------------------------------------------------------------------------


def test_bpftraces_lines_are_counted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    get = r"r *2\x0d\x0a$3\x0d\x0aGET\x0d\x0a$1\x0d\x0ak\x0d\x0a"
    out.write_text(
        f"attached\n{get}\nw $-1\\x0d\\x0a\n{get.replace('GET', 'get')}\nLost 17 events\nLost 3 events\n"
    )
    assert probe_arms._bpftrace_sight(out) == Sight({"GET": 2}, 20)


def test_deletes_are_sent_over_the_whole_key_space() -> None:
    study = read_study()
    delete = next(op for op in study.ops if op.name == "delete")
    argv = redis_benchmark_argv(study.loads[0].job(delete, 1.0), Target("127.0.0.1", 1), 10)
    assert argv[argv.index("-r") + 1] == str(delete.fill)
    assert argv[argv.index("--threads") + 1] == "2"
    assert argv[-2:] == ["DEL", "kflex:bench:__rand_int__"]
