"""Plans, and a run that is cut short: what is kept, what is put away, what the exit code is."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from kflex_repro import host
from kflex_repro.bench import cli, run
from kflex_repro.bench.netns import VethPair, sweep
from kflex_repro.bench.pair import Runner, Warmer
from kflex_repro.bench.result import read_result
from kflex_repro.bench.run import Clock, Options, Run, calm_exit, make_plan
from kflex_repro.errors import KflexError, Unavailable
from tests.unit.bench_fakes import FakeBed, measure_with


def test_quick_and_full_defaults() -> None:
    quick, full = make_plan(Options(quick=True)), make_plan(Options())
    assert (quick.pairs, quick.seconds) == (3, 2.5)
    assert (full.pairs, full.seconds) == (5, 3.0)
    assert quick.estimate_s < 120
    assert full.out.parent == Path("results")
    assert make_plan(Options(quick=True, pairs=7, seconds=1.0)).pairs == 7


def test_keys_replace_the_scenarios_own() -> None:
    assert {s.keys for s in make_plan(Options(keys=500)).scenarios} == {500}


@pytest.mark.parametrize(
    "options",
    [
        Options(attach="localhost:1", port=2),
        Options(attach="localhost:1", netns=True),
        Options(attach="nonsense"),
        Options(attach=":1", names=("store-get",)),
        Options(names=("nope",)),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(options: Options) -> None:
    with pytest.raises(KflexError) as caught:
        make_plan(options)
    assert caught.value.exit_code == 2


def test_attach_leaves_out_what_needs_own_servers() -> None:
    plan = make_plan(Options(attach=":6379"))
    assert plan.scenarios
    assert all(s.mode == "coherent" and s.path == "local" for s in plan.scenarios)


def test_not_root_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable) as caught:
        run.check_host()
    assert caught.value.exit_code == 3


def test_list_and_dry_run_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(cli.group, ["redis", "--list"])
    assert listed.exit_code == 0
    assert "get-2t" in listed.output
    as_json = CliRunner().invoke(cli.group, ["redis", "--list", "--json"])
    assert {"name", "targets"} <= set(json.loads(as_json.output)[0])
    # Where BPF is refused, it is the VM's plan that is shown.
    monkeypatch.setattr(host, "refusal", lambda: "")
    planned = CliRunner().invoke(cli.group, ["redis", "--quick", "--dry-run"])
    assert planned.exit_code == 0
    assert "24 runs" in planned.output
    plan = CliRunner().invoke(cli.group, ["redis", "--quick", "--dry-run", "--json"])
    assert json.loads(plan.output)["scenarios"] == ["get-2t", "set-2t", "mix-90-10"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [["--pairs", "0"], ["--seconds", "0"], ["--keys", "1"], ["--port", "99999"]]
)
def test_numbers_out_of_range_are_usage_errors(option: list[str]) -> None:
    assert CliRunner().invoke(cli.group, ["redis", *option]).exit_code == 2


class Place:
    """A run whose beds and measurements are stand-ins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.log: list[tuple[str, bool]] = []
        self.closed = 0
        place = self

        @contextmanager
        def bed(**_: object) -> Iterator[FakeBed]:
            try:
                yield FakeBed()
            finally:
                place.closed += 1

        measured = measure_with(self.log, fail_at)
        monkeypatch.setattr(run, "own_bed", bed)
        monkeypatch.setattr(run, "_built", lambda: None)
        monkeypatch.setattr(run, "host_facts", lambda: {"kernel": "6.1", "emulated": False})
        monkeypatch.setattr(run.netns, "sweep", list)
        monkeypatch.setattr(run, "Runner", lambda *args: Runner(*args[:3], measure_arm=measured))
        monkeypatch.setattr(Warmer, "warm", lambda *_: 1.0)


def plan_in(tmp_path: Path, *names: str) -> run.Plan:
    return make_plan(Options(names=names, pairs=2, out=tmp_path / "out"))


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)
    plan = plan_in(tmp_path, "get-2t", "store-get")
    Run(plan, "kflex-repro bench redis").execute()
    document = read_result(plan.out / "result.json")
    assert [s["name"] for s in document["scenarios"]] == ["get-2t", "store-get"]
    assert document["interrupted"] is False
    assert (plan.out / "report.html").exists()
    # One bed for the coherent scenario, one for the store.
    assert place.closed == 2


def test_ctrl_c_keeps_what_was_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # get-2t: 3 calibrations and 6 runs; then get-1t: 3 calibrations interleaved with the first pair.
    place = Place(monkeypatch, fail_at=12)
    plan = plan_in(tmp_path, "get-2t", "get-1t")
    with pytest.raises(KeyboardInterrupt):
        Run(plan, "x").execute()
    document = read_result(plan.out / "result.json")
    assert document["interrupted"] is True
    assert [s["name"] for s in document["scenarios"]] == ["get-2t"]
    assert (plan.out / "report.html").exists()
    assert place.closed == 1


def test_a_results_directory_that_cannot_be_written_fails_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(monkeypatch)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(KflexError, match="--out"):
        Run(plan_in(tmp_path, "get-2t"), "x").execute()
    assert place.log == []


def test_a_second_ctrl_c_cannot_stop_the_cleaning_up() -> None:
    cleaned: list[str] = []

    @contextmanager
    def thing() -> Iterator[None]:
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append("yes")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), calm_exit(thing()):
        raise KeyboardInterrupt
    assert cleaned == ["yes"]
    assert signal.getsignal(signal.SIGINT) is before


def test_calm_exit_passes_the_value_through() -> None:
    @contextmanager
    def thing() -> Iterator[int]:
        yield 3

    with calm_exit(thing()) as value:
        assert value == 3


def test_the_clock_learns() -> None:
    now = [0.0]
    clock = Clock(100.0, lambda: now[0])
    assert clock.left_s == 100.0
    clock.advance(50.0)
    now[0] = 100.0
    # Twice as slow as estimated so far.
    assert clock.left_s == pytest.approx(100.0)
    clock.advance(1000.0)
    assert clock.left_s == 0.0


def test_namespace_names_tell_their_owner() -> None:
    pair = VethPair()
    assert pair.server_ns.split("-")[2] == str(os.getpid())
    assert pair.left_behind() == []
    assert VethPair().server_ns != pair.server_ns


def test_sweep_leaves_namespaces_of_the_living(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kflex_repro.bench import netns

    deleted: list[str] = []
    monkeypatch.setattr(netns, "RUN", tmp_path)
    monkeypatch.setattr(netns, "_ip", lambda *args: deleted.append(args[-1]))
    mine = VethPair().server_ns
    stale = f"kflexb-s-{os.getpid()}-1-abcd"
    for name in (mine, stale, "someone-elses", "kflexb-odd"):
        (tmp_path / name).touch()
    assert sweep() == [stale]
    assert deleted == [stale]
