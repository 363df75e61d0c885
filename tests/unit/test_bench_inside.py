"""`bench redis --probe`: the server's own percentiles beside the client's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kflex_repro.bench import inside, plot
from kflex_repro.bench.bed import Endpoint
from kflex_repro.bench.inside import Watched
from kflex_repro.bench.pair import Pairs
from kflex_repro.bench.report import render
from kflex_repro.bench.result import Result, problems
from kflex_repro.bench.scenario import Scenario
from kflex_repro.errors import Unavailable
from kflex_repro.probe.latency import PHASES, Counts, histogram
from tests.unit.bench_fakes import arm_run

MIX = Scenario("mix", "GET and SET", "MIX", mix=(("GET", 90), ("SET", 10)))


def counts(values: Sequence[int]) -> Counts:
    """Requests that took as many ns in every phase."""
    calls = len(values)
    return Counts(calls, calls, 0, 0, 0, 0, {phase: histogram(values) for phase in PHASES})


def document(watched: bool = True) -> dict[str, object]:
    pairs = Pairs(MIX)
    for number in (1, 2, 3):
        seen = {
            "baseline": {"GET": counts([10_000 * number] * 9), "SET": counts([20_000]), "PING": counts([1])},
            "offload": {"GET": counts([5_000])},
        }
        pairs.done.append({arm: arm_run(arm) for arm in MIX.arms})
        for arm, run in pairs.done[-1].items():
            if watched:
                pairs.done[-1][arm] = type(run)(run.outcome, run.cost, run.checked, run.served, 0,
                                                watched=Watched(seen[arm]))  # fmt: skip
    result = pairs.result()
    assert result is not None
    return Result({"emulated": False}, {"version": "7.0.15"}, "bench", "now", (result,)).to_json()


def test_every_phase_is_a_figure_over_the_runs() -> None:
    made = document()
    assert problems(made) == []
    (scenario,) = made["scenarios"]  # type: ignore[misc]
    found = scenario["inside"]
    assert set(found) == {"baseline", "offload"}
    # Commands that are not the scenario's are left out; those that never came have no row.
    assert set(found["baseline"]) == {"GET", "SET"}
    assert set(found["offload"]) == {"GET"}
    get = found["baseline"]["GET"]
    assert get["calls"] == 27
    assert set(get) == {"calls", *PHASES}
    # Buckets are an eighth wide: their middle is at most a sixteenth off.
    assert get["total"]["p50_us"]["median"] == pytest.approx(20, rel=0.07)
    assert get["exec"]["p99_us"]["max"] == pytest.approx(30, rel=0.07)
    assert len(get["queue"]["p999_us"]["runs"]) == 3


def test_the_table_has_the_client_beside_the_server() -> None:
    rows = inside.rows(document(), plot.ARM_NAMES)
    assert [row[:3] for row in rows] == [
        ("mix", "Redis, TCP", "GET"),
        ("mix", "Redis, TCP", "SET"),
        ("mix", "Redis + offload", "GET"),
    ]
    assert all(len(row) == 2 + len(inside.HEADINGS) for row in rows)
    # 0.4 ms and 1.2 ms are the client's.
    assert rows[0][4] == "400 / 1200"
    assert "Inside the server" in render(document())


def test_without_a_probe_nothing_is_said() -> None:
    made = document(watched=False)
    assert "inside" not in made["scenarios"][0]  # type: ignore[index]
    assert inside.rows(made, plot.ARM_NAMES) == []
    assert "Inside the server" not in render(made)


def test_a_server_elsewhere_cannot_be_watched() -> None:
    elsewhere = Endpoint("192.0.2.1", 6379, None, None, "192.0.2.1")
    with pytest.raises(Unavailable, match="not on this machine"), inside.watching(elsewhere):
        pass
