"""Functions counted and timed against programs that call them a known number of times."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kflex_repro import host
from kflex_repro.errors import KflexError
from kflex_repro.probe import elf, functions, process
from kflex_repro.redis.server import ManagedServer
from tests.conftest import unavailable
from tests.probe.conftest import Bpftrace, Child

pytestmark = pytest.mark.bpf

TOP = Path(__file__).resolve().parents[2]

WORK = r"""
#include <pthread.h>
#include <setjmp.h>
#include <time.h>

static jmp_buf home;

VISIBLE void leaf(void) { __asm__ volatile(""); }
VISIBLE int down(int n) { __asm__ volatile(""); return n ? 1 + down(n - 1) : 0; }
VISIBLE void pause_20ms(void) { struct timespec t = {0, 20000000}; nanosleep(&t, 0); }
VISIBLE void around(void) { pause_20ms(); pause_20ms(); __asm__ volatile(""); }
VISIBLE void leaps(void) { longjmp(home, 1); }
VISIBLE void never(void) { __asm__ volatile(""); }
static void *thread(void *unused) { for (int i = 0; i < 500; i++) leaf(); return unused; }

static void work(void)
{
	pthread_t threads[4];

	for (int i = 0; i < 1000; i++)
		leaf();
	for (int i = 0; i < 4; i++)
		pthread_create(&threads[i], 0, thread, 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], 0);
	for (int i = 0; i < 10; i++)
		if (!setjmp(home))
			leaps();
	down(100);
	around();
}
"""
NAMES = ["leaf", "down", "pause_20ms", "around", "leaps", "never"]
COUNTS = {"leaf": 3000, "down": 101, "pause_20ms": 2, "around": 1, "leaps": 10}


def multi_or_skip(multi: bool) -> None:
    if multi and host.fact("uprobe_multi").state != "ok":
        unavailable("uprobe_multi: this kernel is older than 6.6")


def traced(
    pid: int, match: list[str], *, timed: bool = False, multi: bool | None = None
) -> functions.FunctionTrace:
    found = process.by_pid(pid)
    chosen = functions.select(functions.binary(found), match)
    return functions.FunctionTrace(found, found.exe, chosen, timed=timed, multi=multi)


@pytest.mark.parametrize("multi", [True, False], ids=["multi", "one by one"])
def test_calls_of_all_threads_are_counted_once(
    multi: bool, child: Callable[..., Child], c_program: Callable[..., Path]
) -> None:
    multi_or_skip(multi)
    program = str(c_program(WORK))
    watched, other = child(program), child(program)
    with traced(watched.pid, NAMES, multi=multi) as trace:
        watched.go()
        other.go()
        assert {one.function.name: one.calls for one in trace.read()} == COUNTS
        trace.stop()
        watched.go()
        assert {one.function.name: one.calls for one in trace.read()} == COUNTS
    assert trace.refused == []


@pytest.mark.parametrize("multi", [True, False], ids=["multi", "one by one"])
def test_times_nest(multi: bool, child: Callable[..., Child], c_program: Callable[..., Path]) -> None:
    multi_or_skip(multi)
    watched = child(str(c_program(WORK)))
    with traced(watched.pid, NAMES, timed=True, multi=multi) as trace:
        for _ in range(3):
            watched.go()
        found = {one.function.name: one for one in trace.read()}
    assert {name: one.calls for name, one in found.items()} == {name: 3 * n for name, n in COUNTS.items()}
    inner, outer = found["pause_20ms"], found["around"]
    assert inner.times is not None and outer.times is not None
    assert inner.returned == 6 and outer.returned == 3
    assert inner.times.ns >= 6 * 20e6 and inner.self_ns == inner.times.ns
    # To the nanosecond: what is not its own is what it called.
    assert outer.times.ns - outer.self_ns == inner.times.ns
    # Left by longjmp, so not timed, and what came after is not charged to it.
    assert found["leaps"].returned == 0
    assert found["leaf"].returned == 9000
    # The kernel follows 64 nested returns.
    assert found["down"].calls == 303 and 3 <= found["down"].returned <= 303


def test_bpftrace_counts_the_same(
    child: Callable[..., Child], c_program: Callable[..., Path], bpftrace: Callable[..., Bpftrace]
) -> None:
    """docs/probes.md calls this one-liner an equal of `trace functions`."""
    program = c_program(WORK)
    watched = child(str(program))
    where = ", ".join(f"uprobe:{program}:{name}" for name in NAMES)
    with traced(watched.pid, NAMES) as trace:
        other = bpftrace(f"{where} /pid == {watched.pid}/ {{ @[func] = count(); }}")
        watched.go()
        ours = {one.function.name: one.calls for one in trace.read()}
        assert other.counts() == ours == COUNTS


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_trace_leaves_the_process_as_it_was(
    signum: int, child: Callable[..., Child], c_program: Callable[..., Path]
) -> None:
    watched = child(str(c_program(WORK)))
    code = executable(watched.pid)
    arguments = [
        "functions",
        "--pid",
        str(watched.pid),
        "--match",
        "leaf",
        "--match",
        "d*n",
        "--duration",
        "60",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "kflex_repro", "trace", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=TOP,
    ) as tool:
        try:
            deadline = time.monotonic() + 60
            while executable(watched.pid) == code:
                assert tool.poll() is None and time.monotonic() < deadline
            watched.go()
            tool.send_signal(signum)
            out, _ = tool.communicate(timeout=60)
        finally:
            tool.kill()
    if signum == signal.SIGINT:
        found = {one["name"]: one["calls"] for one in json.loads(out)["functions"]}
        assert found == {"leaf": 3000, "down": 101}
    # The breakpoints are out of its code again.
    deadline = time.monotonic() + 30
    while executable(watched.pid) != code:
        assert time.monotonic() < deadline
    watched.go()


def executable(pid: int) -> bytes:
    """The program's code as it is in the process's memory now."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    first = next(line.split() for line in lines if "r-xp" in line and line.endswith("/child"))
    start, end = (int(part, 16) for part in first[0].split("-"))
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        memory.seek(start)
        return memory.read(end - start)


def test_a_redis_executes_each_command_once() -> None:
    with ManagedServer(["--io-threads", "2"]) as server, server.client() as client:
        client.ping()
        (listener,) = process.by_port(server.port)
        assert listener.pid == server.pid
        with traced(server.pid, ["processCommand", "setGenericCommand", "getCommand"], timed=True) as trace:
            for number in range(300):
                client.set(f"key:{number}", "value")
            pipe = client.pipeline(transaction=False)
            for number in range(200):
                pipe.get(f"key:{number}")
            pipe.execute()
            found = {one.function.name: one for one in trace.read()}
    assert {name: one.calls for name, one in found.items()} == {
        "processCommand": 500,
        "setGenericCommand": 300,
        "getCommand": 200,
    }
    whole = found["processCommand"]
    assert whole.returned == 500 and whole.times is not None
    assert whole.times.ns > whole.self_ns > 0


def test_all_functions_of_a_redis_at_once() -> None:
    multi_or_skip(True)
    with ManagedServer() as server, server.client() as client:
        client.ping()
        with traced(server.pid, ["*"]) as trace:
            for number in range(50):
                client.set(f"key:{number}", "value")
            found = {one.function.name: one.calls for one in trace.read()}
        assert len(trace.functions) > 2000 and found["processCommand"] == 50
        assert client.ping()


def test_of_a_library(python: Callable[[str], Child]) -> None:
    calls = python("import ctypes\nlabs = ctypes.CDLL(None).labs\nfor _ in range(321): labs(1)")
    found = process.by_pid(calls.pid)
    library = functions.binary(found, "libc.so")
    with functions.FunctionTrace(found, library.path, functions.select(library, ["labs"])) as trace:
        calls.go()
        (labs,) = trace.read()
    assert labs.calls == 321 and "labs" in (labs.function.name, *labs.function.aliases)
    with pytest.raises(KflexError, match="no library matches 'nonsense'"):
        functions.binary(found, "nonsense")


def test_functions_by_pattern(child: Callable[..., Child], c_program: Callable[..., Path]) -> None:
    watched = child(str(c_program(WORK)))
    found = functions.binary(process.by_pid(watched.pid))
    assert [one.name for one in functions.select(found, ["pause*", "around"], ["arou*"])] == ["pause_20ms"]
    with pytest.raises(KflexError, match=r"no function matches lead .*did you mean leaf"):
        functions.select(found, ["lead"])
    leaf = functions.select(found, ["leaf"])[0]
    assert found.at(leaf.offset) == leaf and found.at(leaf.offset + leaf.size - 1) == leaf
    assert found.at(0) is None


def test_a_stripped_program_without_exports_is_refused(
    child: Callable[..., Child], c_program: Callable[..., Path]
) -> None:
    program = c_program(WORK, "-s", "-static")
    with pytest.raises(KflexError, match=r"stripped: no function has a name \(.*child\): install its debug"):
        functions.binary(process.by_pid(child(str(program)).pid))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF", b"#!/bin/sh\n", Path(sys.executable).resolve().read_bytes()[:3000]):
        path = tmp_path / "damaged"
        path.write_bytes(content)
        try:
            assert elf.read(path).functions == ()
        except KflexError as error:
            assert "not a usable ELF file" in str(error)


def kflex(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kflex_repro", "trace", *args]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=TOP, stdin=subprocess.DEVNULL
    )


def test_the_command_measures_before_it_probes_thousands(tmp_path: Path) -> None:
    with ManagedServer() as server:
        refused = kflex("functions", "--port", str(server.port))
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
        assert "µs longer (measured here)" in refused.stderr and "go on with --yes" in refused.stderr
        png = tmp_path / "chart.png"
        some = ["--match", "serverCron", "--match", "databasesCron", "--png", str(png)]
        done = kflex("functions", "--port", str(server.port), *some, "--time", "--duration", "1.5", "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        dry = kflex("functions", "--pid", str(server.pid), "--match", "dict*", "--dry-run")
        listed = kflex("list", "functions", "--pid", str(server.pid), "--match", "dict*", "--json")
    # A server calls both ten times a second.
    found = {one["name"]: one for one in report["functions"]}
    assert found["serverCron"]["calls"] > 5 and found["databasesCron"]["calls"] > 5
    assert found["serverCron"]["time_us"] > found["databasesCron"]["time_us"]
    assert report["probe_added_ns"] > 0 and report["probe_floor_ns"] > 0 and report["probed"] == 2
    assert png.read_bytes().startswith(b"\x89PNG")
    names = [one["name"] for one in json.loads(listed.stdout)]
    assert dry.stdout.splitlines() == names and "dictFind" in names
    assert f"would probe {len(names)} functions" in dry.stderr


def test_what_can_be_probed_is_listed() -> None:
    tracepoints = kflex("list", "tracepoints", "--match", "sched_switch")
    assert tracepoints.stdout == "sched_switch\n"
    calls = kflex("list", "syscalls", "--match", "epoll_w*", "--json")
    assert "epoll_wait" in [one["name"] for one in json.loads(calls.stdout)]
    nothing = kflex("list", "syscalls", "--match", "nonsense")
    assert nothing.returncode == 1 and nothing.stderr.startswith("kflex-repro: no syscalls match nonsense")
    assert kflex("list", "functions").returncode == 2
