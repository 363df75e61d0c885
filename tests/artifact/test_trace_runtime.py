"""The traced libbpf's runtime, in a program of its own: what it writes, and that it never gets in the way."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.build import objects, toolchain

HERE = Path(__file__).parent
SAID = re.compile(rb"kflex-trace: no more is traced: errno \d+ at what KFLEX_TRACE names\n")

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trace_driver.c with the runtime in it, as strictly compiled as libbpf is."""
    program = tmp_path_factory.mktemp("driver") / "driver"
    runtime = objects.source_root() / "patches" / "libbpf_trace"
    flags = ["-std=gnu89", "-O2", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wdeclaration-after-statement"]
    command = [toolchain.cc().path, *flags, "-Werror", f"-I{runtime}", HERE / "trace_driver.c"]
    subprocess.run([*command, runtime / "kflex_trace.c", "-o", program, "-pthread"], check=True)
    return program


@pytest.fixture
def run(driver: Path, tmp_path: Path) -> Run:
    """run(KFLEX_TRACE, step, …): the driver in an empty directory, to its end."""

    def start(trace: str | Path | None, *steps: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        environment = {key: value for key, value in os.environ.items() if key != "KFLEX_TRACE"}
        if trace is not None:
            environment["KFLEX_TRACE"] = str(trace)
        return subprocess.run(
            [driver, *steps],
            check=False,
            capture_output=True,
            cwd=tmp_path,
            env=environment,
            timeout=30,
            **more,
        )

    return start


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def unharmed(done: subprocess.CompletedProcess[bytes], said: bool) -> None:
    """The program's own result, and at most one line about the trace."""
    assert (done.returncode, done.stdout) == (0, b"done\n"), done.stderr
    assert bool(SAID.fullmatch(done.stderr)) == said and (said or not done.stderr), done.stderr


def test_what_is_written(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    unharmed(run(trace, "map", "create=13", "heap", "12", "create=13", "heap", "0"), said=False)
    start, good, bad, failed, made = events(trace)
    assert {(event["v"], event["pid"], event["tid"]) for event in events(trace)} == {
        (1, start["pid"], start["pid"])
    }
    times = [event["t"] for event in events(trace)]
    assert times == sorted(times)
    assert start["event"] == "start" and start["program"].endswith("/driver")
    assert start["rlimit_as"] in (-1, resource.getrlimit(resource.RLIMIT_AS)[0])
    assert (good["event"], good["map"], good["errno"], good["length"]) == ("mmap", "good", 0, 4096)
    assert int(good["address"], 16) % 4096 == 0 and good["hint"] == "0x0"
    assert (bad["map"], bad["errno"], bad["address"], bad["hint"]) == ("bad", 22, None, "0x1000")
    assert (failed["event"], failed["name"], failed["errno"], failed["fd"]) == ("map_create", "heap", 12, -1)
    # Mappable: values of 13 bytes take 16, all of them whole pages.
    expected = {"type": 2, "type_name": "array", "key_size": 4, "value_size": 13, "max_entries": 1000}
    assert expected.items() <= made.items()
    assert (made["flags"], made["bytes"], made["map_extra"]) == (1024, 16384, "0x100000000")
    assert (made["errno"], made["fd"]) == (0, 9)


def test_off_it_does_nothing(run: Run, tmp_path: Path) -> None:
    unharmed(run(None, "map", "children"), said=False)
    unharmed(run("", "map"), said=False)
    assert list(tmp_path.iterdir()) == []


def test_off_is_one_branch(tmp_path: Path) -> None:
    """An instrumented mmap is the plain one, a load, a test and a jump that is not taken."""
    runtime = objects.source_root() / "patches" / "libbpf_trace"
    source = tmp_path / "probe.c"
    source.write_text(
        '#include "kflex_trace.h"\nvoid *probe(void *hint, size_t length, int fd)\n'
        '{\n\treturn kflex_trace_mmap("m", hint, length, PROT_READ, MAP_SHARED, fd, 0);\n}\n'
    )
    command = [toolchain.cc().path, "-O2", "-S", "-o", "-", f"-I{runtime}", source]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    body = text[text.index("probe:") : text.index(".cfi_endproc")]
    assert "call\tkflex_trace_mapped" in body or "kflex_trace_mapped" in text
    taken = body[: body.index("ret")]
    assert len(re.findall(r"kflex_trace_state", taken)) == 1
    assert len(re.findall(r"^\s+j\w+\s", taken, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ('quote"back\\slash', 'quote"back\\slash'),
        ("line\nfeed\ttab\x7f", "line\nfeed\ttab\x7f"),
        # Not every name is UTF-8: each byte is the code point of its number.
        ("caf\xe9", "caf\xc3\xa9"),
        ("", ""),
        ("x" * 5000, "x" * 255),
        ("\x01" * 5000, "\x01" * 255),
    ],
)
def test_any_name_is_json(run: Run, tmp_path: Path, name: str, written: str) -> None:
    trace = tmp_path / "trace"
    unharmed(run(trace, "create=8", name, "0"), said=False)
    assert events(trace)[1]["name"] == written
    assert max(map(len, trace.read_bytes().splitlines())) < select.PIPE_BUF


def test_sizes_that_overflow_are_the_largest(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    unharmed(run(trace, "create=4294967295", "most", "7"), said=False)
    assert events(trace)[1]["bytes"] == 4294967296 * 1000


def test_threads_and_children_share_a_file(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    unharmed(run(trace, "threads=200", "children", "threads=200"), said=False)
    found = events(trace)
    names = [event["map"] for event in found if event["event"] == "mmap"]
    for thread in "abcd":
        # Nothing torn, nothing lost, each thread's in its order.
        own = [name for name in names if name.startswith(f"{thread}-")]
        assert own == [f"{thread}-{i}" for i in range(200)] * 2
    first = found[0]["pid"]
    others = [event for event in found if event["pid"] != first]
    assert [event["event"] for event in others] == ["mmap", "mmap", "start", "mmap", "mmap"]


def test_a_relative_name_stays_where_it_was(run: Run, tmp_path: Path) -> None:
    unharmed(run("trace", "chdir=/", "map"), said=False)
    assert len(events(tmp_path / "trace")) == 3


def unwritable(directory: Path) -> Path:
    """A directory that root cannot write to either."""
    directory.mkdir()
    subprocess.run(["chattr", "+i", directory], check=True, capture_output=True)
    return directory / "trace"


@pytest.mark.parametrize(
    "trace",
    ["/nowhere/trace", "/dev/full", "/", "fd:77", "fd:", "fd:3x", "fd:99999999999", "x" * 5000, "y" * 300],
)
def test_where_nothing_can_be_written(run: Run, trace: str) -> None:
    unharmed(run(trace, "map", "threads=5", "create=1", "m", "12", "signals"), said=True)


def test_a_read_only_directory(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    try:
        unharmed(run(unwritable(place), "map", "map"), said=True)
    except (OSError, subprocess.CalledProcessError):
        # No such attribute on this file system: /proc has no files of ours either.
        unharmed(run("/proc/trace", "map", "map"), said=True)
    finally:
        subprocess.run(["chattr", "-i", place], check=False, capture_output=True)


def test_a_fifo_without_a_reader(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    unharmed(run("fifo", "map"), said=True)


def test_a_reader_that_went_away(run: Run) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        # Neither dies of SIGPIPE nor loses one that was meant for it.
        unharmed(run(f"fd:{writing}", "map", "signals", "map", pass_fds=[writing]), said=True)
    finally:
        os.close(writing)


def test_a_reader_that_sleeps(run: Run) -> None:
    reading, writing = os.pipe()
    try:
        unharmed(run(f"fd:{writing}", "many=2000", pass_fds=[writing]), said=True)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_file_that_may_not_grow(run: Run, tmp_path: Path) -> None:
    unharmed(run("trace", "fsize=2000", "many=50", "signals"), said=True)
    kept = (tmp_path / "trace").read_bytes()
    assert len(kept) == 2000 and all(json.loads(line) for line in kept.splitlines()[:-1])


def test_interrupted_all_the_time(run: Run, tmp_path: Path) -> None:
    unharmed(run("trace", "interrupted", "many=3000"), said=False)
    assert len(events(tmp_path / "trace")) == 3001


@pytest.mark.parametrize("steps", [["map"], ["map", "map", "children"]])
def test_a_program_that_closes_what_it_does_not_know(run: Run, tmp_path: Path, steps: Sequence[str]) -> None:
    # It then has a file of its own under each number: no line may land there.
    unharmed(run("trace", "map", "close=3", "data", *steps), said=False)
    assert set((tmp_path / "data").read_bytes()) == {ord("x")}
    assert len(events(tmp_path / "trace")) == 1 + 2 + (2 if len(steps) == 1 else 4 + 2 + 3)


def test_a_given_descriptor_that_it_closes(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "trace").open("ab") as stream:
        fd = stream.fileno()
        unharmed(run(f"fd:{fd}", "map", "close=3", "data", "map", pass_fds=[fd]), said=True)
    assert set((tmp_path / "data").read_bytes()) == {ord("x")}
    assert len(events(tmp_path / "trace")) == 3


def test_standard_error_that_is_somebodys_data(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "trace").open("ab") as stream:
        fd = stream.fileno()
        unharmed(run(f"fd:{fd}", "map", "close=2", "data", "map", pass_fds=[fd]), said=False)
    assert set((tmp_path / "data").read_bytes()) == {ord("x")}


def test_a_number_that_is_somebodys_data(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with data.open("wb") as stream:
        unharmed(run(f"fd:{stream.fileno()}", "map", pass_fds=[stream.fileno()]), said=True)
    assert data.read_bytes() == b""


def test_a_descriptor_and_a_pipe(run: Run, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        unharmed(run(f"fd:{writing}", "map", pass_fds=[writing]), said=False)
        os.close(writing)
        with open(reading, "rb", closefd=False) as stream:
            assert [json.loads(line)["event"] for line in stream] == ["start", "mmap", "mmap"]
    finally:
        os.close(reading)


def test_no_descriptor_is_left(run: Run, tmp_path: Path) -> None:
    # What is traced before and after says the same: nothing is opened when nothing needs to be.
    unharmed(run("trace", "create=1", "before", "0", "no-descriptors", "create=1", "after", "24"), said=False)
    assert [event.get("name") for event in events(tmp_path / "trace")] == [None, "before", "after"]


def test_few_descriptors(run: Run, tmp_path: Path) -> None:
    few = (resource.RLIMIT_NOFILE, (64, 64))
    unharmed(run("trace", "map", "children", preexec_fn=lambda: resource.setrlimit(*few)), said=False)
    assert len(events(tmp_path / "trace")) == 3 + 2 + 3


@pytest.mark.parametrize("how", ["removed", "replaced", "moved", "made a directory"])
def test_a_file_that_is_taken_away(driver: Path, tmp_path: Path, how: str) -> None:
    trace, other = tmp_path / "trace", tmp_path / "other"
    child = subprocess.Popen(
        [driver, "map", "stop", "map"],
        env={**os.environ, "KFLEX_TRACE": str(trace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        before = trace.read_bytes()
        if how == "removed":
            trace.unlink()
        elif how == "replaced":
            other.touch()
            other.replace(trace)
        elif how == "moved":
            trace.rename(other)
        else:
            trace.unlink()
            trace.mkdir()
        child.send_signal(signal.SIGCONT)
        out, errors = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    unharmed(subprocess.CompletedProcess([], child.returncode, out, errors), how == "made a directory")
    if how in ("removed", "replaced"):
        assert [event["event"] for event in events(trace)] == ["mmap", "mmap"]
    elif how == "moved":
        assert other.read_bytes().startswith(before) and len(events(other)) == 5


def test_a_new_file_can_be_read_by_others(run: Run, tmp_path: Path) -> None:
    unharmed(run("trace", "map"), said=False)
    assert stat.S_IMODE((tmp_path / "trace").stat().st_mode) & ~0o644 == 0
