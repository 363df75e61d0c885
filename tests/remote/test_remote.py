"""Probe commands on another host: as if they ran here; nothing is left there, whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import require
from tests.redis.harness import plain_server
from tests.remote.sshd import Host


def test_a_command_says_there_what_it_says_here(there: Host) -> None:
    ran = there.run("trace", "list", "syscalls", "--match", "epoll*")
    local = subprocess.run(
        [sys.executable, "-m", "kflex_repro", "trace", "list", "syscalls", "--match", "epoll*"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "epoll_wait" in ran.stdout and ran.stdout == local.stdout


def test_the_exit_code_and_the_error_of_the_command_come_back(there: Host) -> None:
    ran = there.run("trace", "list", "syscalls", "--match", "no_such_call")
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith(f"kflex-repro: {there.name}: no syscalls match")
    assert ran.stderr.count("\n") == 1


def test_files_are_fetched_and_named_as_here(there: Host, here: Path) -> None:
    require("tp_btf")
    png = here / "chart.png"
    ran = there.run("trace", "syscalls", "--duration", "0.3", "--json", "--png", png)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["syscalls"]
    assert png.read_bytes().startswith(b"\x89PNG") and png.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82")
    assert f"chart: {png}" in ran.stderr and "kflex-remote-" not in ran.stderr
    assert [one.name for one in here.iterdir()] == ["chart.png"]


def test_a_recording_is_fetched_as_private_as_it_is_there(there: Host, here: Path) -> None:
    require("tp_btf")
    with plain_server() as sut:
        ran = there.run(
            "monitor", "--port", str(sut.port), "--duration", "0.3", "--record", here / "busy.kmon"
        )
    assert ran.returncode == 0, ran.stderr
    assert (here / "busy.kmon").stat().st_mode & 0o777 == 0o600
    replayed = there.run("monitor", "replay", here / "busy.kmon", host=False, toolkit=False)
    assert replayed.returncode == 0, replayed.stderr


def test_a_directory_of_results_is_fetched(there: Host, here: Path) -> None:
    require("capabilities")
    ran = there.run("profile", "--all", "--duration", "0.3", "--out", here / "a" / "profile")
    assert ran.returncode == 0, ran.stderr
    assert {one.name for one in (here / "a" / "profile").iterdir()} == {
        "flamegraph.html",
        "profile.json",
        "stacks.collapsed",
    }
    assert f"flame graph: {here}/a/profile/flamegraph.html" in ran.stdout
