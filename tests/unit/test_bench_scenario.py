"""Scenarios are data: the file that ships is complete, and a wrong one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kflex_repro.bench.scenario import data_dir, estimate, load_scenarios, read_toml, select
from kflex_repro.errors import KflexError

GOOD = """
[defaults]
driver = "redis-benchmark"
[[scenario]]
name = "a"
about = "GET"
op = "GET"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenarios.toml"
    path.write_text(text)
    return path


def test_the_shipped_file_has_every_row_of_the_table_of_targets() -> None:
    by_name = {scenario.name: scenario for scenario in load_scenarios()}
    wanted = {
        "get-2t": {"rps": 2.3, "rps_unix": 1.7, "p99": 0.25, "system_cpu": 0.5},
        "set-2t": {"rps": 2.2, "rps_unix": 1.7, "p99": 0.4, "set_in_redis_ms": 20},
        "store-get": {"rps": 2.4},
        "store-set": {"rps": 2.8},
        "get-1t": {"rps": 1.4},
        "set-1t": {"rps": 1.4},
        "mix-90-10": {"rps": 2.2},
        "mix-50-50": {"rps": 2.2},
        "incr-1pct": {"rps": 2.0},
        "incr-10pct": {"rps": 1.5},
        "incr-50pct": {"rps": 1.1},
        "burst": {"recovery_s": 1.0},
        "get-2t-p16": {"rps": 1.5},
        "pass-incr-c1": {"rps": 0.95},
        "pass-incr-c50": {"rps": 0.95},
        "pass-lpush-c1": {"rps": 0.95},
        "pass-lpush-c50": {"rps": 0.95},
        "veth-get": {"rps": 0.95},
        "veth-set": {"rps": 0.95},
    }
    for name, targets in wanted.items():
        assert dict(by_name[name].targets) == targets, name


def test_the_shipped_file_covers_sizes_clients_threads_and_pipelines() -> None:
    scenarios = load_scenarios()
    for op in ("GET", "SET"):
        mine = [s for s in scenarios if s.op == op and s.driver == "redis-benchmark" and s.path == "local"]
        assert {64, 512, 1024, 4096} <= {s.value_bytes for s in mine}
        assert {1, 10, 50, 200} <= {s.clients for s in mine}
        assert {(t, p) for t in (1, 2) for p in (1, 16)} <= {(s.client_threads, s.pipeline) for s in mine}
        assert any(s.driver == "fixed-rate" and s.op == op for s in scenarios)
    assert {"90:10", "50:50", "10:90"} <= {s.mix_label for s in scenarios}


def test_quick_is_get_set_and_the_mix_within_two_minutes() -> None:
    quick = select(load_scenarios(), quick=True)
    assert [s.name for s in quick] == ["get-2t", "set-2t", "mix-90-10"]
    assert estimate(quick, 3, 2.5) < 120


def test_the_default_run_is_estimated_below_forty_minutes() -> None:
    assert estimate(select(load_scenarios(), netns=True), 5, 3.0) < 40 * 60


def test_names_and_prefixes_select() -> None:
    scenarios = load_scenarios()
    assert [s.name for s in select(scenarios, ["set-1t", "get-1t"])] == ["get-1t", "set-1t"]
    assert {s.name for s in select(scenarios, ["store-*"])} == {"store-get", "store-set"}


@pytest.mark.parametrize("name", ["nope", "nope*", ""])
def test_an_unknown_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(KflexError) as caught:
        select(load_scenarios(), [name])
    assert caught.value.exit_code == 2


def test_veth_needs_netns() -> None:
    scenarios = load_scenarios()
    assert all(s.path == "local" for s in select(scenarios))
    assert any(s.path == "remote" for s in select(scenarios, netns=True))
    with pytest.raises(KflexError) as caught:
        select(scenarios, ["veth-get"])
    assert caught.value.exit_code == 2
    assert "--netns" in str(caught.value)


def test_peers_are_what_the_driver_can_do() -> None:
    by_name = {scenario.name: scenario for scenario in load_scenarios()}
    assert by_name["get-2t"].arms == ("baseline", "unix", "offload")
    assert by_name["mix-90-10"].arms == ("baseline", "offload")
    assert by_name["veth-get"].arms == ("baseline", "offload")


def test_a_good_file_parses(tmp_path: Path) -> None:
    (scenario,) = load_scenarios(write(tmp_path, GOOD))
    assert (scenario.clients, scenario.value_bytes, scenario.mix_label) == (50, 64, None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('driver = "wrk"', "driver"),
        ("colour = 3", "colour"),
        ("mix = { GET = 50, SET = 50 }", "MIX"),
        ("clients = 0", "clients"),
        ("rate = 100", "fixed-rate"),
        ("targets = { speed = 2 }", "speed"),
        ('peers = ["tls"]', "tls"),
        ('mode = "fast"', "mode"),
        ('path = "moon"', "path"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(KflexError) as caught:
        load_scenarios(write(tmp_path, GOOD + line + "\n"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[[scenario", "", GOOD + GOOD.partition("\n[[")[2].join(["[[", ""])])
def test_a_file_that_is_no_scenario_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(KflexError):
        load_scenarios(write(tmp_path, text))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KflexError, match=r"scenarios\.toml"):
        load_scenarios(tmp_path / "scenarios.toml")


def test_every_published_figure_names_source_and_machine() -> None:
    for entry in read_toml(data_dir() / "reference.toml")["figure"]:
        assert {"system", "what", "value", "machine", "source"} <= set(entry)
        assert all(str(value).strip() for value in entry.values())
