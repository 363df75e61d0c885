"""``doctor --hello``: counted rightly, by every way there is, and nothing left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.probe import hello
from tests.conftest import require

READS = 1000
# Reads only when it is told to, and is told by a signal: waiting for one is no read.
CHILD = f"""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1}})
zero = os.open("/dev/zero", os.O_RDONLY)
os.write(1, b"ready")
signal.sigwait({{signal.SIGUSR1}})
for _ in range({READS}):
    os.read(zero, 1)
os.write(1, b"done!")
signal.sigwait({{signal.SIGUSR1}})
"""


@pytest.mark.smoke("bpf")
@pytest.mark.parametrize("way", list(hello._WAYS))
def test_a_known_number_of_reads_is_counted(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require("tp_btf")
    monkeypatch.setattr(hello, "_WAYS", {way: hello._WAYS[way]})
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, bufsize=0)
    try:
        assert child.stdout is not None and child.stdout.read(5) == b"ready"
        with hello.counting() as running:
            child.send_signal(signal.SIGUSR1)
            assert child.stdout.read(5) == b"done!"
            found = {reads.pid: reads for reads in running.reads()}
            missed = running.missed
    finally:
        child.kill()
        child.wait()
    assert found[child.pid].calls == READS and missed == 0
    assert found[child.pid].command.startswith("python")


def test_the_second_way_is_taken_where_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require("tp_btf")
    load = hello._load
    refused: list[str] = []

    def refusing(path: Path, wanted: str) -> object:
        if not refused:
            refused.append(wanted)
            raise KflexError("refused")
        return load(path, "hello_btf")

    monkeypatch.setattr(hello, "_load", refusing)
    monkeypatch.setattr(hello, "_WAYS", {"not_here": "nothing", "hello_btf": "the second"})
    with hello.counting() as running:
        assert running.how == "the second" and refused == ["not_here"]


def loaded() -> list[object]:
    """Programs of ours that the kernel has."""
    shown = subprocess.run(["bpftool", "-j", "prog", "show"], check=True, capture_output=True, text=True)
    return [one for one in json.loads(shown.stdout) if one.get("name", "").startswith("hello_")]


def test_the_command_says_what_it_counted_and_leaves_nothing() -> None:
    require("tp_btf")
    done = subprocess.run(
        [sys.executable, "-m", "kflex_repro", "doctor", "--hello", "--json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["seconds"] >= hello.SECONDS and len(seen["top"]) <= 5
    calls = [one["calls"] for one in seen["top"]]
    assert calls == sorted(calls, reverse=True) and sum(calls) <= seen["calls"]
    # The kernel lets go of a program a moment after its last user is gone.
    deadline = time.monotonic() + 30
    while left := loaded():
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
