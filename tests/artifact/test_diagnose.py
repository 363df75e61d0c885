"""`diagnose` against failures that really happen: both ENOMEMs, limits, a memory cgroup; and their logs."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kflex_repro.bpf import fs
from kflex_repro.build import libbpf, toolchain
from kflex_repro.build.objects import source_root
from kflex_repro.diagnose import probes
from kflex_repro.errors import Unavailable
from tests.conftest import require, unavailable

DATA = Path(__file__).parent / "data"
GIB = 1 << 30
PEOPLE_TRY = {"max-map-count", "overcommit", "swappiness", "rlimit-memlock", "rlimit-as"}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small program that fails as the artifact does."""
    target = tmp_path_factory.mktemp("failing") / "failing"
    source = Path(__file__).with_name("failing.c")
    subprocess.run(["cc", "-Wall", "-Werror", "-o", target, source], check=True)
    return str(target)


@pytest.fixture(scope="module")
def failing_traced(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with the runtime of the traced libbpf in it."""
    target = tmp_path_factory.mktemp("failing") / "failing-traced"
    runtime = source_root() / "patches/libbpf_trace"
    sources = [Path(__file__).with_name("failing.c"), runtime / "kflex_trace.c"]
    subprocess.run(["cc", "-Wall", "-DWITH_TRACE", f"-I{runtime}", "-o", target, *sources], check=True)
    return str(target)


def diagnose(*arguments: str, status: int = 0, **options: object) -> dict:
    """The JSON report of one run of the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "kflex_repro", "diagnose", "--json", *arguments],
        capture_output=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == status, (done.stdout.decode(), done.stderr.decode())
    report = json.loads(done.stdout)
    assert report["schema"] == 1
    return report


def causes(report: dict) -> list[str]:
    return [cause["id"] for cause in report["causes"]]


def ruled_out(report: dict) -> dict[str, str]:
    return {one["id"]: one["how"] for one in report["ruled_out"]}


def require_strace() -> None:
    if shutil.which("strace") is None:
        unavailable("strace is not installed")


def under_strace(log: Path, *command: str) -> None:
    require_strace()
    subprocess.run(["strace", "-f", "-o", log, *command], check=False, capture_output=True)


# --- the two ENOMEMs --------------------------------------------------------------------------------------


def test_a_map_larger_than_ram_is_found_from_its_strace(failing: str, tmp_path: Path) -> None:
    require("root", "capabilities")
    log = tmp_path / "log"
    under_strace(log, failing, "create", "256")
    report = diagnose("--log", str(log), "--this-machine")
    first = report["causes"][0]
    assert (first["id"], first["confidence"], first["recipe"]) == ("eager-heap", "certain", "fit-heap")
    assert "256 GiB" in first["evidence"][0] and "67108864 x 4096" in first["evidence"][0]
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    assert f"{ram:.1f} GiB of RAM" in first["evidence"][1]
    # What people try is ruled out, and the report says by what: the same creation, refused here too.
    out = ruled_out(report)
    assert out.keys() >= PEOPLE_TRY
    assert "256 GiB gives ENOMEM" in out["overcommit"]
    assert "RLIMIT_MEMLOCK = 0 works" in out["rlimit-memlock"]


def test_a_search_that_runs_out_is_found_from_its_strace(failing: str, tmp_path: Path) -> None:
    if probes.here()["va_bits"] != 47:
        unavailable("user space does not end at 2^47 here: the search succeeds")
    log = tmp_path / "log"
    under_strace(log, failing, "search", "4")
    report = diagnose("--log", str(log), "--this-machine")
    first = report["causes"][0]
    assert (first["id"], first["confidence"], first["recipe"]) == (
        "address-search",
        "certain",
        "address-search",
    )
    assert "1024 tries from 0x1000000000000 to 0xfc0100000000" in first["evidence"][0]
    assert "0x7ffffffff000" in first["evidence"][1]
    assert "here the same 1024 mmaps of an empty file give ENOMEM" in " ".join(first["evidence"])
    out = ruled_out(report)
    assert out.keys() >= PEOPLE_TRY | {"ram"}
    assert "4 GiB at an address left to the kernel works" in out["max-map-count"]
    assert "works inside user space" in out["ram"]


def test_a_search_that_runs_out_is_found_from_the_trace_alone(failing_traced: str, tmp_path: Path) -> None:
    log = tmp_path / "trace"
    subprocess.run([failing_traced, "search", "4"], env={"KFLEX_TRACE": str(log)}, check=False)
    first = diagnose("--log", str(log), "--other-machine")["causes"][0]
    assert (first["id"], first["confidence"]) == ("address-search", "certain")
    assert "map 'heap' 4 GiB, 1024 tries from 0x1000000000000 to 0xfc0100000000" in first["evidence"][0]


@pytest.mark.parametrize(
    ("sample", "cause"),
    [
        ("create-256gb", "eager-heap"),
        ("search-4gb", "address-search"),
        ("load-arena-beyond", "address-search"),
        ("create-heap-type", "no-map-type"),
        ("create-eperm", "capability"),
        ("create-e2big", "arena-size"),
        ("search-256gb", None),
        ("load", None),
    ],
)
def test_recorded_traces_name_the_cause_by_themselves(sample: str, cause: str | None) -> None:
    plain, packed = DATA / f"{sample}.trace", DATA / f"{sample}.trace.gz"
    data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    report = diagnose("--log", "-", "--other-machine", input=data)
    assert causes(report)[:1] == ([cause] if cause else [])
    assert report["log"]["forms"] == ["trace"]


@pytest.fixture(scope="module")
def traced_libbpf() -> Path:
    """The traced libbpf, from the cache or built now."""
    runner = toolchain.Runner()
    try:
        return libbpf.traced(runner)[0]
    except Unavailable as error:
        unavailable(str(error))
    finally:
        runner.stop()


@pytest.mark.usefixtures("traced_libbpf")
def test_a_program_of_shared_libbpf_is_traced_when_it_is_run() -> None:
    require("root", "capabilities")
    program = "from kflex_repro.bpf.maps import Map; Map.create(2, 4, 4096, 1 << 26, 1 << 10, 'heap')"
    report = diagnose("--", sys.executable, "-c", program)
    assert "trace" in report["log"]["forms"]
    assert (causes(report)[0], report["command_status"]) == ("eager-heap", 1)
    assert "(67108864 x 4096 bytes)" in report["causes"][0]["evidence"][0]


@pytest.mark.usefixtures("traced_libbpf")
def test_a_program_without_shared_libbpf_says_so(failing: str) -> None:
    """Its own words are read all the same: they do not say what was asked for, and nothing is guessed."""
    require("root")
    report = diagnose("--", failing, "create", "256", status=3)
    assert report["unknown"] and not causes(report)
    assert any("--strace" in line for line in report["collect"])


def test_both_are_found_when_the_command_is_run(failing: str) -> None:
    require("root", "capabilities")
    created = diagnose("--strace", "--", failing, "create", "256")
    assert causes(created)[0] == "eager-heap"
    assert created["command_status"] == 1
    if probes.here()["va_bits"] == 47:
        searched = diagnose("--strace", "--", failing, "search", "4")
        assert causes(searched)[0] == "address-search"


def test_recorded_logs_name_the_cause_by_themselves(tmp_path: Path) -> None:
    """As if from another machine: only what is in them counts. libbpf's debug words have the size."""
    searched = tmp_path / "search"
    searched.write_bytes(gzip.decompress((DATA / "search-4gb.strace.gz").read_bytes()))
    assert causes(diagnose("--log", str(searched), "--other-machine"))[0] == "address-search"
    for name in ("create-256gb.strace", "create-256gb.libbpf", "create-256gb.libbpf-debug"):
        report = diagnose("--log", str(DATA / name), "--other-machine")
        assert causes(report)[0] == "eager-heap", name
        assert "256 G" in " ".join(report["causes"][0]["evidence"]), name
        assert not report["unknown"]
        assert "ram_total" not in report["host"]["facts"]


# --- limits that really are the cause ---------------------------------------------------------------------


def test_an_address_space_limit_is_found_by_what_the_program_set(failing: str, tmp_path: Path) -> None:
    """256 GB fit user space from try 514 on; under a limit of 8 GB every later try fails too."""
    log = tmp_path / "log"
    under_strace(log, failing, "limit", str(8 * GIB), "search", "256")
    report = diagnose("--log", str(log), "--this-machine")
    assert causes(report)[0] == "rlimit-as"
    assert "8 GiB of address space in all (from the log)" not in report["causes"][0]["evidence"][1]
    assert "8 GiB of address space in all" in report["causes"][0]["evidence"][1]
    assert "rlimit-as" not in ruled_out(report)


def test_an_address_space_limit_is_found_though_nothing_logs_it(failing: str) -> None:
    """Set by a shell before strace starts to look: read from the process, after its end."""
    require_strace()
    script = (
        f"ulimit -v {8 << 20}; exec {sys.executable} -m kflex_repro diagnose --json --strace -- {failing}"
    )
    done = subprocess.run(["sh", "-c", f"{script} search 256"], capture_output=True, check=True)
    assert causes(json.loads(done.stdout))[0] == "rlimit-as"


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup of version 1 or 2 with a limit; its directory."""
    parents = [point for point in fs.mounts("cgroup") if point.name == "memory"]
    if parents:
        parent, name = parents[0], "memory.limit_in_bytes"
    else:
        root = fs.cgroup2_root()
        if root is None or "memory" not in (root / "cgroup.subtree_control").read_text().split():
            unavailable("no memory cgroup can be made")
        parent, name = root, "memory.max"
    path = parent / f"kflex-diagnose-{os.getpid()}"
    path.mkdir()
    try:
        (path / name).write_text(str(limit))
        yield path
    finally:
        path.rmdir()


def test_a_memory_cgroup_limit_is_the_cause(failing: str) -> None:
    """1 GiB fits the machine, not the cgroup of 512 MiB; nothing is killed, bpf() gives ENOMEM."""
    require("root", "capabilities")
    with memory_cgroup(GIB // 2) as group:

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        report = diagnose("--strace", "--", failing, "create", "1", preexec_fn=join)
    first = report["causes"][0]
    assert (first["id"], first["confidence"]) == ("cgroup-memory", "certain")
    assert "512 MiB" in first["evidence"][1] and group.name in first["evidence"][1]


# --- what is none of these --------------------------------------------------------------------------------


def test_missing_capabilities_are_the_cause_and_nothing_is_claimed_untried(failing: str) -> None:
    require("root")
    if Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text().strip() == "0":
        unavailable("this kernel lets everybody create maps")
    without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "kflex_repro"]
    command = [*without, "diagnose", "--json", "--strace", "--", failing, "create", "256"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert causes(report) == ["capability"]
    assert "CAP_BPF" in report["causes"][0]["evidence"][1]
    checked = json.loads(
        subprocess.run([*without, "diagnose", "--json"], capture_output=True, check=False).stdout
    )
    assert "capability" in causes(checked)
    assert not [one for one in checked["ruled_out"] if "16 MiB works" in one["how"]]


def test_a_map_type_that_the_kernel_lacks(failing: str) -> None:
    require("root")
    kind = probes.heap_type()
    if kind is None or kind.known or kind.meaning:
        unavailable("this kernel has a map type of that number")
    report = diagnose("--strace", "--", failing, "create", "1", str(probes.ARTIFACT_HEAP_TYPE))
    first = report["causes"][0]
    assert (first["id"], first["confidence"]) == ("no-map-type", "certain")
    assert "BPF_MAP_TYPE_HEAP" in first["evidence"][1] and "EINVAL" in first["evidence"][1]


def test_a_command_that_works_has_no_cause(failing: str) -> None:
    require("root")
    report = diagnose("--strace", "--", "true")
    assert (report["command_status"], causes(report), report["unknown"]) == (0, [], False)


def test_a_refusal_that_fits_no_cause_is_unknown(failing: str) -> None:
    """A map of no pages: EINVAL of a type that the kernel does have."""
    require("root")
    report = diagnose("--strace", "--", failing, "create", "0", status=3)
    assert (report["command_status"], causes(report), report["unknown"]) == (1, [], True)
    assert report["collect"] and any("EINVAL" in line for line in report["failures"])


def test_a_missing_command_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kflex_repro", "diagnose", "--strace", "--", "/nowhere/program"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["kflex-repro: no such program, or not executable (/nowhere/program)"]


def test_the_interrupt_ends_the_command_and_the_report_follows(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    command = ("sh", "-c", f"echo $$ > {ready}; exec sleep 1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "kflex_repro", "diagnose", "--json", "--strace", "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        child = int(ready.read_text())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.terminate()
        process.wait()
    report = json.loads(out)
    assert process.returncode == 0, err
    assert any("interrupted" in note for note in report["notes"])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


# --- repairs ----------------------------------------------------------------------------------------------


def test_what_a_recipe_can_do_is_done_and_no_longer_found(tmp_path: Path) -> None:
    require("root")
    tree = tmp_path / "tree"
    shutil.copytree(Path(__file__).with_name("tree"), tree)
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    log = str(DATA / "create-256gb.libbpf")
    command = [sys.executable, "-m", "kflex_repro", "diagnose", "--source", str(tree)]
    found = diagnose("--source", str(tree), "--log", log, "--this-machine")["causes"][0]
    assert "bpf/ffkx_redis.bpf.c:" in " ".join(found["evidence"])
    assert "fit-heap --gb" in found["fix"][0] and str(tree) in found["fix"][0]

    shown = subprocess.run([*command, "--fix", "--dry-run", "--json"], capture_output=True, check=False)
    assert b"-ffkx_heap(256, 0)" in shown.stderr
    assert "fit-heap" in {cause["recipe"] for cause in json.loads(shown.stdout)["causes"]}
    assert {path: path.read_bytes() for path in before} == before

    subprocess.run([*command, "--fix"], capture_output=True, check=False)
    left = subprocess.run([*command, "--json"], capture_output=True, check=False)
    assert not [cause["id"] for cause in json.loads(left.stdout)["causes"] if cause["recipe"]]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--fix"], "--source"),
        (["--dry-run"], "--fix"),
        (["--log", "/nowhere"], "cannot read the log: No such file or directory (/nowhere)"),
        (["--log", "/tmp"], "cannot read the log: Is a directory (/tmp)"),
        (["--source", "/nowhere"], "/nowhere"),
        (["--source", "/etc/apt"], "no heap is declared in it"),
        (["--log", "-", "--", "true"], "not both"),
        (["--strace"], "command"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kflex_repro", "diagnose", *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode not in (0, 3)
    assert "Traceback" not in done.stderr and line in done.stderr.splitlines()[-1]


# --- this machine -----------------------------------------------------------------------------------------


def test_the_check_up_says_what_would_happen_here() -> None:
    require("root")
    report = diagnose(status=1)
    found = set(causes(report))
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert ("eager-heap" in found) == (ram < 256 * GIB)
    assert ("address-search" in found) == (probes.here()["va_bits"] == 47)
    assert ("cgroup2-path" in found) == (fs.cgroup2_root() != Path("/sys/fs/cgroup"))
    kind = probes.heap_type()
    assert ("no-map-type" in found) == (kind is not None and not kind.known)


def test_trying_leaves_nothing_behind_and_says_the_kernels_answer() -> None:
    require("root")
    by_id = {one.id: one for one in probes.mmap_tries(4 * GIB, above=False)}
    assert by_id.keys() == PEOPLE_TRY
    assert by_id["rlimit-memlock"].state == "out"
    assert "gives ENOMEM" in by_id["rlimit-as"].how
    assert probes.attempts([{"call": "map_create", "length": 1 << 60}]) != [0]
