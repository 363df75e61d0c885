"""result.json: schema 1, checked when written; all of it is there, or nothing."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.bench.result import Result, problems, read_result, write_result
from kflex_repro.bench.scenario import load_scenarios
from kflex_repro.errors import KflexError
from kflex_repro.files import write_atomically
from tests.unit.bench_fakes import scenario_result

TOP = Path(__file__).resolve().parents[2]


def result(*names: str, interrupted: bool = False, mismatches: int = 0) -> Result:
    chosen = [s for s in load_scenarios() if not names or s.name in names]
    return Result(
        host={"kernel": "6.1"},
        redis={"version": "7.0.15", "args": []},
        command="kflex-repro bench redis",
        started="2026-01-01T00:00:00Z",
        scenarios=tuple(scenario_result(s, mismatches=mismatches) for s in chosen),
        interrupted=interrupted,
    )


def test_every_scenario_makes_a_valid_document(tmp_path: Path) -> None:
    path = write_result(result(), tmp_path)
    document = read_result(path)
    assert document["schema"] == 1
    assert document["host"]["emulated"] is False
    assert len(document["scenarios"]) == len(load_scenarios())


def test_the_document_has_the_designs_shape() -> None:
    (scenario,) = json.loads(json.dumps(result("get-2t").to_json()))["scenarios"]
    needed = {
        "name", "op", "path", "mode", "clients", "client_threads", "value_bytes", "pipeline", "keys",
        "distribution", "baseline", "peers", "offload", "ratio", "ratio_to", "checked",
    }  # fmt: skip
    assert needed <= set(scenario)
    side = {"rps", "p50_ms", "p99_ms", "p999_ms", "server_cpu_us_per_op", "system_cpu_us_per_op"}
    assert set(scenario["baseline"]) == side
    assert set(scenario["peers"]["unix"]) == side
    assert set(scenario["offload"]) == side | {"served_in_kernel"}
    assert set(scenario["ratio"]) == {"rps", "p99", "server_cpu", "system_cpu"}
    assert set(scenario["ratio_to"]["unix"]) == {"rps", "p99"}
    assert set(scenario["baseline"]["rps"]) == {"median", "min", "max", "runs"}
    assert set(scenario["checked"]) == {"ops", "mismatches"}
    assert "mix" not in scenario


def test_a_mix_is_named_and_its_missing_percentiles_are_null() -> None:
    (scenario,) = result("mix-90-10").to_json()["scenarios"]
    assert scenario["mix"] == "90:10"
    assert scenario["baseline"]["p50_ms"] is None
    assert scenario["baseline"]["p99_ms"] is not None


def test_targets_know_whether_they_were_met() -> None:
    (scenario,) = result("get-2t").to_json()["scenarios"]
    met = {target["metric"]: target["met"] for target in scenario["targets"]}
    # 200/80 = 2.5, 200/110 = 1.8; equal latency and CPU on both sides.
    assert met == {"rps": True, "rps_unix": True, "p99": False, "system_cpu": False}


def test_an_unmeasured_target_is_neither_met_nor_missed() -> None:
    (scenario,) = result("set-2t").to_json()["scenarios"]
    target = next(t for t in scenario["targets"] if t["metric"] == "set_in_redis_ms")
    assert (target["measured"], target["met"]) == (None, None)


def _set(document: dict[str, Any], path: str, value: object) -> None:
    *head, last = path.split(".")
    at = document["scenarios"][0]
    for step in head:
        at = at[step]
    at[last] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("baseline.rps.median", float("nan"), "finite"),
        ("baseline.rps.median", -1.0, "negative"),
        ("baseline.rps.median", 1.0, "outside"),
        ("baseline.rps.runs", [], "no runs"),
        ("baseline.rps.runs", ["fast"], "finite"),
        ("baseline.rps", 3, "not a figure"),
        ("baseline.rps", None, "without throughput"),
        ("peers.unix", {}, "incomplete"),
        ("offload.served_in_kernel", 1.2, "share"),
        ("checked.ops", None, "count"),
        ("mode", "fast", "mode"),
    ],
)
def test_a_wrong_document_is_noticed(path: str, value: object, said: str) -> None:
    document = copy.deepcopy(result("get-2t").to_json())
    assert problems(document) == []
    _set(document, path, value)
    assert any(said in problem for problem in problems(document)), problems(document)


def test_missing_parts_are_noticed() -> None:
    document = result("get-2t").to_json()
    for key in ("host", "redis", "command", "started", "scenarios"):
        assert problems({k: v for k, v in document.items() if k != key})
    assert problems({**document, "schema": 2})
    del document["scenarios"][0]["ratio"]
    assert problems(document)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 7}', "\x00"])
def test_reading_something_else_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(KflexError, match=r"result\.json"):
        read_result(path)


# A file size limit fails a write half-way, with nothing to mount and no root: like a disk that fills up.
FULL_DISK = """
import resource, sys
from pathlib import Path
from kflex_repro.files import write_atomically
from kflex_repro.errors import KflexError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomically(Path(sys.argv[1]), b"x" * 100_000)
except KflexError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "free some space" in done.stdout
    assert path.read_text() == "old"
    assert [left.name for left in tmp_path.iterdir()] == ["result.json"]


def test_no_such_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KflexError, match="--out"):
        write_atomically(tmp_path / "gone" / "x", b"")
