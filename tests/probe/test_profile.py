"""Profiles of children of ours that spend their time where we say."""

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

from kflex_repro.bpf import fs
from kflex_repro.probe import offcpu, perf, process, stacks
from tests.probe.conftest import Child

pytestmark = pytest.mark.bpf

TOP = Path(__file__).resolve().parents[2]

BUSY = r"""
VISIBLE long spin(long n) { volatile long sum = 0; for (long i = 0; i < n; i++) sum += i; return sum; }
VISIBLE void NAME(void) { spin(300000000); __asm__ volatile(""); }
VISIBLE void aside(void) { volatile long sum = 0; for (long i = 0; i < 10000000; i++) sum += i; }
static void work(void) { NAME(); aside(); }
"""


def kflex(*args: str) -> list[str]:
    return [sys.executable, "-m", "kflex_repro", "profile", *args]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        kflex(*args), check=False, capture_output=True, text=True, cwd=TOP, env={**os.environ, **env}
    )


def sampled(child: Child, data: Path, **request: str) -> dict[stacks.Stack, int]:
    with perf.Recording(perf.Request((process.by_pid(child.pid),), 499, **request), data) as recording:
        child.go()
        recording.stop()
    return perf.read(data)


@pytest.mark.parametrize("unwind", ["dwarf", "fp"])
def test_a_busy_child_is_seen_where_it_is_busy(
    unwind: str, child: Callable[..., Child], c_program: Callable[..., Path], tmp_path: Path
) -> None:
    pointers = "-fno-omit-frame-pointer" if unwind == "fp" else "-fomit-frame-pointer"
    busy = child(str(c_program(BUSY.replace("NAME", "alpha"), pointers)))
    found = sampled(busy, tmp_path / "perf.data", unwind=unwind)
    weights = stacks.by_function(found)
    assert sum(found.values()) > 50
    assert weights["spin"].own > weights["aside"].own > 0
    assert weights["alpha"].own == 0 and weights["alpha"].total >= weights["spin"].own * 0.95
    assert weights["main"].total >= weights["alpha"].total
    deepest = max(found, key=lambda stack: found[stack])
    assert deepest[0] == "child" and deepest[-3:] == ("main", "alpha", "spin")


def test_the_command_and_the_difference_of_two_profiles(
    child: Callable[..., Child], c_program: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("alpha", "beta"):
        busy = child(str(c_program(BUSY.replace("NAME", name))))
        with subprocess.Popen(
            kflex("--pid", str(busy.pid), "--duration", "60", "--json", "--out", str(tmp_path / name)),
            stdout=subprocess.PIPE,
            text=True,
            cwd=TOP,
        ) as tool:
            try:
                wait_for_perf(tool.pid)
                busy.go()
                busy.end()
                out, _ = tool.communicate(timeout=60)
            finally:
                tool.kill()
        summary = json.loads(out)
        assert tool.returncode == 0 and summary["ended"] == "process" and summary["total"] > 20
        # perf's own data is gone; what is there is what was said.
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "flamegraph.html",
            "profile.json",
            "stacks.collapsed",
        ]
    graph = tmp_path / "difference.html"
    done = run("diff", str(tmp_path / "alpha"), str(tmp_path / "beta"), "--out", str(graph), "--json")
    assert done.returncode == 0, done.stderr
    changes = {one["name"]: one for one in json.loads(done.stdout)["own_share"]}
    assert abs(changes["spin"]["after"] - changes["spin"]["before"]) < 0.5
    text = graph.read_text()
    assert '"alpha",' in text and '"beta",' in text and '"diff":["before","after"]' in text


def children_of(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_perf(pid: int) -> bool:
    try:
        return b"record" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def wait_for_perf(tool: int) -> int:
    """The pid of the tool's perf, once it counts: perf holds its events' descriptors then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in filter(is_perf, children_of(tool)):
            try:
                held = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            if any("perf_event" in one for one in held):
                return pid
        time.sleep(0.01)
    raise AssertionError("perf did not start")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_however_it_ends_perf_ends_too(
    signum: int, code: int, child: Callable[..., Child], c_program: Callable[..., Path], tmp_path: Path
) -> None:
    busy = child(str(c_program(BUSY.replace("NAME", "alpha"))))
    with subprocess.Popen(
        kflex("--pid", str(busy.pid), "--duration", "60", "--json", "--out", str(tmp_path / "out")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TOP,
    ) as tool:
        try:
            recorder = wait_for_perf(tool.pid)
            busy.go()
            tool.send_signal(signum)
            out, err = tool.communicate(timeout=60)
        finally:
            tool.kill()
    assert tool.returncode == code and "Traceback" not in err
    if signum == signal.SIGINT:
        assert json.loads(out)["ended"] == "interrupted"
    if signum != signal.SIGKILL:
        assert not list((tmp_path / "out").glob(".perf*"))
    deadline = time.monotonic() + 30
    while not gone(recorder):
        assert time.monotonic() < deadline
        time.sleep(0.01)


WAITS = r"""
#include <time.h>
VISIBLE void rests(void) { struct timespec t = {0, 30000000}; nanosleep(&t, 0); }
VISIBLE void waits(void) { rests(); rests(); __asm__ volatile(""); }
static void work(void) { waits(); }
"""


@pytest.mark.parametrize("kind", ["tp_btf", "raw_tp"])
def test_off_cpu_sums_the_waits_by_stack(
    kind: str, child: Callable[..., Child], c_program: Callable[..., Path]
) -> None:
    sleeper = child(str(c_program(WAITS, "-fno-omit-frame-pointer")))
    trace = offcpu.OffCpuTrace([process.by_pid(sleeper.pid)])
    trace.kind = kind
    with trace:
        sleeper.go()
        trace.stop()
        found = trace.read()
    assert found.lost == 0 and found.waits >= 2
    weights = stacks.by_function(found.stacks)
    # Microseconds, each wait cut to whole ones.
    assert weights["waits"].total >= 2 * 30_000 - 2
    slept = max(found.stacks, key=lambda stack: found.stacks[stack])
    assert slept[0] == "child" and slept.index("main") < slept.index("waits")
    assert any("nanosleep" in frame and frame.endswith(stacks.KERNEL) for frame in slept)
    assert not any("schedule" in frame or frame.endswith(stacks.BPF) for frame in slept)


def test_who_still_waits_is_counted(python: Callable[[str], Child], tmp_path: Path) -> None:
    sleeper = python("import time\ntime.sleep(3600)")
    with offcpu.OffCpuTrace([process.by_pid(sleeper.pid)]) as trace:
        sleeper.start()
        deadline = time.monotonic() + 30
        while Path(f"/proc/{sleeper.pid}/wchan").read_text() != "hrtimer_nanosleep":
            assert time.monotonic() < deadline
        began = time.monotonic()
        while time.monotonic() < began + 0.05:
            os.sched_yield()
        trace.stop()
        found = trace.read()
    asleep = {stack: us for stack, us in found.stacks.items() if any("nanosleep" in frame for frame in stack)}
    assert sum(asleep.values()) >= 50_000


BPF_LOOP = r"""
SEC("xdp")
int our_named_loop(struct xdp_md *context)
{
	volatile __u32 sum = 0;
	for (int i = 0; i < 4000; i++)
		sum += i;
	return sum & 1;
}
char LICENSE[] SEC("license") = "GPL";
"""


def test_our_bpf_programs_have_their_names(
    compile_bpf: Callable[[str, str], Path], python: Callable[[str], Child], tmp_path: Path
) -> None:
    made = compile_bpf("named", BPF_LOOP)
    busy = python(f"""
from pathlib import Path
from kflex_repro.bpf import Object
with Object.open(Path({str(made)!r})) as obj:
    obj.load()
    obj.programs["our_named_loop"].test_run(bytes(64), repeat=100_000)
""")
    found = stacks.by_function(sampled(busy, tmp_path / "perf.data"))
    assert found["our_named_loop_[b]"].own > 10
    assert any(name.startswith("bpf_test_run") and name.endswith(stacks.KERNEL) for name in found)


@pytest.mark.parametrize(
    ("arguments", "env", "code", "text"),
    [
        (["--pid", "999999999"], {}, 1, "no process 999999999"),
        (["--port", "1"], {}, 1, "nothing listens there (port 1)"),
        (["--pid", "{idle}", "--duration", "0.3"], {}, 1, "not one sample"),
        (["--pid", "{idle}"], {"KFLEX_PERF": "/nonexistent"}, 3, "no working perf found"),
        (["--pid", "{idle}", "--out", "/proc/nothing"], {}, 1, "cannot make the directory"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    env: dict[str, str],
    code: int,
    text: str,
    python: Callable[[str], Child],
    tmp_path: Path,
) -> None:
    idle = python("pass")
    given = [one.format(idle=idle.pid) for one in arguments]
    done = run(*([] if "--out" in given else ["--out", str(tmp_path)]), *given, **env)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"kflex-repro: {text}")


def test_a_full_disk_is_said(
    child: Callable[..., Child], c_program: Callable[..., Path], tmp_path: Path
) -> None:
    busy = child(str(c_program(BUSY.replace("NAME", "alpha"))))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        assert small in fs.mounts("tmpfs")
        for _ in range(40):
            busy.start()
        done = run("--pid", str(busy.pid), "--duration", "60", "--freq", "2000", "--out", str(small / "out"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no space for perf's samples" in done.stderr
