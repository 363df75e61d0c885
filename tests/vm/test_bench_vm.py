"""bench redis and doctor in a real VM: what the user gets, and what is left when it is cut off."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kflex_repro import host
from kflex_repro.bench.mark import EMULATED, VIRTUAL
from tests.conftest import require

TOP = Path(__file__).resolve().parents[2]
CAPABILITIES = "-bpf,-perfmon,-sys_admin"
# Far more than any of it takes on a busy machine.
PATIENCE_S = 400.0


def command(*arguments: str, drop: bool = False) -> list[str]:
    """``kflex-repro ARGUMENTS``; ``drop``: without the capabilities that BPF asks for."""
    without = ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"] if drop else []
    return [*without, sys.executable, "-m", "kflex_repro", *arguments]


def children(pid: int) -> dict[int, str]:
    """pid -> name of what a process has started, at any depth."""
    parents: dict[int, tuple[int, str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = stat.read_text().rpartition(")")
        except OSError:
            continue
        parents[int(stat.parent.name)] = (int(tail.split()[1]), head.partition("(")[2])
    found: dict[int, str] = {}
    new = {pid}
    while new:
        new = {one for one, (parent, _) in parents.items() if parent in new and one not in found}
        found |= {one: parents[one][1] for one in new}
    return found


@pytest.fixture(autouse=True)
def qemu() -> None:
    require("qemu")


def test_a_benchmark_where_bpf_is_refused_ends_with_a_report_made_in_a_vm(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("bench", "redis", "--scenario", "get-2t", "--pairs", "1", "--seconds", "1", "--out", str(out))
    done = subprocess.run(
        command(*asked, drop=os.geteuid() == 0),
        check=False, cwd=TOP, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "refuses BPF" in done.stderr or "may not use BPF" in done.stderr
    assert "CAP_BPF" in done.stderr and "running in a VM" in done.stderr
    document = json.loads((out / "result.json").read_text())
    (scenario,) = document["scenarios"]
    assert scenario["checked"]["ops"] > 50 and scenario["checked"]["mismatches"] == 0
    assert scenario["offload"]["served_in_kernel"] > 0.5
    assert min(scenario["requests"].values()) > 0
    vm = document["host"]["vm"]
    emulated = document["host"]["emulated"]
    assert emulated is (vm["accel"] == "tcg")
    assert document["host"]["kernel"] != vm["host"]["kernel"] or "--vm" in document["command"]
    mark = EMULATED if emulated else VIRTUAL
    assert mark in done.stdout and mark in (out / "report.html").read_text()
    if emulated:
        assert scenario["ratio"]["rps"] is None and "×" not in done.stdout
    assert {path.name for path in out.iterdir()} >= {"result.json", "report.html", "throughput.png"}
    assert not (out / "guest").exists()


def test_by_no_means_in_a_vm_is_refused_at_once_in_one_line() -> None:
    if os.geteuid() == 0:
        done = subprocess.run(
            command("bench", "redis", "--quick", "--no-vm", drop=True),
            check=False, cwd=TOP, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "CAP_BPF" in done.stderr
    else:
        done = subprocess.run(
            command("bench", "redis", "--quick", "--no-vm"),
            check=False, cwd=TOP, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "sudo" in done.stderr
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "leave out --no-vm" in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_cut_off_it_leaves_no_process_and_no_result(tmp_path: Path, signum: signal.Signals) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("bench", "redis", "--vm", "--quick", "--out", str(out)),
        cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    started: dict[int, str] = {}
    deadline = time.monotonic() + PATIENCE_S
    pids: list[int] = []
    try:
        while not any(name.startswith("qemu-system") for name in started.values()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no QEMU came up"
            started = children(process.pid)
            select.select([], [], [], 0.05)
        for pid in started:
            # What runs for a moment only may be gone already.
            with contextlib.suppress(ProcessLookupError):
                pids.append(os.pidfd_open(pid))
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    # A pidfd is readable when its process has ended.
    for pidfd in pids:
        assert select.select([pidfd], [], [], 30)[0], "a process outlived the command"
        os.close(pidfd)
    if signum == signal.SIGINT:
        assert process.returncode == 130 and said.splitlines()[-1] == "kflex-repro: interrupted"
        assert not out.exists()
    assert not (out / "result.json").exists()


def test_doctor_shows_the_guest_beside_the_host() -> None:
    done = subprocess.run(
        command("doctor", "--vm", "--json"),
        check=False, cwd=TOP, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["guest"]["ok"] is (done.returncode == 0)
    facts = {fact["key"]: fact for fact in report["guest"]["facts"]}
    assert [fact["key"] for fact in report["host"]["facts"]] == list(facts)
    assert report["guest"]["missing"] == [] and facts["sk_msg"]["state"] == "ok"
    assert facts["kernel"]["value"] == report["guest"]["vm"]["kernel"] != host.fact("kernel").value
