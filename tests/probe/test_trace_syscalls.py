"""System calls counted against children of ours that make a known number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kflex_repro.bpf import libbpf
from kflex_repro.errors import KflexError
from kflex_repro.probe import process, syscalls
from tests.probe.conftest import Bpftrace, Child

pytestmark = pytest.mark.bpf

TOP = Path(__file__).resolve().parents[2]
CALLS = """
for _ in range(12345): os.getppid()
for _ in range(77):
    try: os.stat("/nonexistent")
    except OSError: pass
"""


def kflex(*args: str) -> list[str]:
    return [sys.executable, "-m", "kflex_repro", *args]


def by_name(found: list[syscalls.Syscall]) -> dict[str, syscalls.Syscall]:
    return {one.name: one for one in found}


@pytest.mark.parametrize("kind", ["tp_btf", "raw_tp"])
def test_every_call_is_counted_once(kind: str, python: Callable[[str], Child]) -> None:
    watched, other = python(CALLS), python(CALLS)
    trace = syscalls.SyscallTrace([process.by_pid(watched.pid)])
    trace.kind = kind
    with trace:
        watched.go()
        other.go()
        first = by_name(trace.read())
        watched.go()
        second = by_name(trace.read())
        trace.stop()
        watched.go()
        assert by_name(trace.read())["getppid"] == second["getppid"]
    for found, times in ((first, 1), (second, 2)):
        ids, stats = found["getppid"], found["newfstatat"]
        assert (ids.number, ids.calls, ids.returned, ids.errors) == (110, 12345 * times, 12345 * times, 0)
        assert (stats.calls, stats.returned, stats.errors) == (77 * times, 77 * times, 77 * times)
        assert ids.times.count == ids.returned and 0 < ids.times.ns <= ids.returned * ids.times.max_ns


def test_the_time_includes_waiting(python: Callable[[str], Child]) -> None:
    sleeper = python("import time\nfor _ in range(3): time.sleep(0.02)")
    with syscalls.SyscallTrace([process.by_pid(sleeper.pid)]) as trace:
        sleeper.go()
        found = by_name(trace.read())
    slept = found["clock_nanosleep"]
    assert slept.calls == slept.returned == 3
    median = slept.times.quantile(0.5)
    assert slept.times.ns >= 3 * 20e6 and slept.times.max_ns >= 20e6
    assert median is not None and median >= 20e6 * (1 - 1 / slept.times.shape.sub)


def test_threads_and_several_processes(python: Callable[[str], Child]) -> None:
    threads = """
import threading
def calls():
    for _ in range(1000): os.getppid()
all = [threading.Thread(target=calls) for _ in range(8)]
for one in all: one.start()
for one in all: one.join()
"""
    children = [python(threads), python(CALLS)]
    with syscalls.SyscallTrace([process.by_pid(one.pid) for one in children]) as trace:
        for one in children:
            one.go()
        assert by_name(trace.read())["getppid"].calls == 8 * 1000 + 12345


def test_of_all_processes_but_ours(python: Callable[[str], Child]) -> None:
    other = python(CALLS)
    with syscalls.SyscallTrace() as trace:
        other.go()
        for _ in range(1_000_000):
            os.getppid()
        found = by_name(trace.read())
    assert 12345 <= found["getppid"].calls < 1_000_000


def test_the_command_counts_until_the_process_ends(python: Callable[[str], Child], tmp_path: Path) -> None:
    busy = python(CALLS)
    png = tmp_path / "chart.png"
    arguments = ["trace", "syscalls", "--pid", str(busy.pid), "--duration", "60", "--json", "--png", str(png)]
    with subprocess.Popen(kflex(*arguments), stdout=subprocess.PIPE, text=True, cwd=TOP) as tool:
        try:
            wait_for_links(tool, 2)
            busy.go()
            busy.end()
            out, _ = tool.communicate(timeout=60)
        finally:
            tool.kill()
    assert tool.returncode == 0
    report = json.loads(out)
    assert report["ended"] == "process" and report["seconds"] < 60
    assert {one["name"]: one["calls"] for one in report["syscalls"]}["getppid"] == 12345
    assert png.read_bytes().startswith(b"\x89PNG")


def links_of(pid: int) -> list[int]:
    """Program ids of the links that a process holds."""
    found = []
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = entry.read_text()
        except OSError:
            continue
        if "link_id" in text:
            found += [int(line.split()[1]) for line in text.splitlines() if line.startswith("prog_id:")]
    return found


def wait_for_links(tool: subprocess.Popen[str], count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while len(found := links_of(tool.pid)) < count:
        assert tool.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_however_it_ends_nothing_stays_attached(
    signum: int, code: int, python: Callable[[str], Child]
) -> None:
    busy = python(CALLS)
    arguments = ["trace", "syscalls", "--pid", str(busy.pid), "--duration", "60", "--json"]
    with subprocess.Popen(
        kflex(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TOP
    ) as tool:
        try:
            programs = wait_for_links(tool, 2)
            busy.go()
            tool.send_signal(signum)
            out, err = tool.communicate(timeout=60)
        finally:
            tool.kill()
    assert tool.returncode == code and "Traceback" not in err
    if signum == signal.SIGINT:
        report = json.loads(out)
        assert report["ended"] == "interrupted"
        assert {one["name"]: one["calls"] for one in report["syscalls"]}["getppid"] == 12345
    deadline = time.monotonic() + 30
    for program in programs:
        # The kernel frees a program some time after its last user is gone.
        while (fd := libbpf.library().bpf_prog_get_fd_by_id(program)) >= 0:
            os.close(fd)
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--pid", "999999999"], "no process 999999999"),
        (["--port", "1"], "nothing listens there (port 1)"),
        (["--png", "/nonexistent/x.png"], "no such directory (/nonexistent)"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str) -> None:
    done = subprocess.run(
        kflex("trace", "syscalls", *arguments), check=False, capture_output=True, text=True, cwd=TOP
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"kflex-repro: {text}")


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(KflexError, match="probes need root: run it with sudo"):
        syscalls.SyscallTrace().start()


def test_names_are_the_headers() -> None:
    known = syscalls.names()
    assert len(known) > 300 and syscalls.name_of(999) == "syscall_999"
    # The C library's own numbers of a few: what they are called is not written down here.
    import ctypes

    libc = ctypes.CDLL(None)
    number = next(number for number, name in known.items() if name == "getpid")
    assert libc.syscall(number) == os.getpid()


def test_bpftrace_counts_the_same(python: Callable[[str], Child], bpftrace: Callable[..., Bpftrace]) -> None:
    """docs/probes.md calls this one-liner an equal of `trace syscalls`."""
    watched = python(CALLS)
    program = f"tracepoint:raw_syscalls:sys_enter /pid == {watched.pid}/ {{ @[args->id] = count(); }}"
    with syscalls.SyscallTrace([process.by_pid(watched.pid)]) as trace:
        other = bpftrace(program)
        before = by_name(trace.read())
        watched.go()
        ours = by_name(trace.read())
        called = {syscalls.name_of(int(number)): calls for number, calls in other.counts().items()}
    # The read in which it waits for us may begin before or after either of them looks.
    counted = {name: one.calls - (before[name].calls if name in before else 0) for name, one in ours.items()}
    for found in (counted, called):
        found.pop("read", None)
    assert counted == called and counted["getppid"] == 12345
