"""``build --artifact`` on the small tree: built for real, kept, resumed, and refused in one line."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.artifact.building import (
    PLAIN,
    TOP,
    append,
    build,
    command,
    copy_tree,
    fingerprint,
    kflex,
    refusal,
    states,
)
from tests.conftest import require

ALL_BUILT = dict.fromkeys(("tree", "libbpf", "objects", "program"), "built")
ALL_CACHED = dict.fromkeys(ALL_BUILT, "cached")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def test_a_tree_is_built_once_and_not_touched(tree: Path) -> None:
    before = fingerprint(tree)
    planned = build(tree, "--dry-run")
    assert set(states(planned).values()) == {"to do"} and planned["program"] is None

    first = build(tree)
    assert states(first) == ALL_BUILT and fingerprint(tree) == before
    assert {recipe["id"] for recipe in first["recipes"]["taken"]} >= {"address-search", "out-of-heap"}
    # As the tree declares them.
    assert {Path(heap["path"]).name: heap["gb"] for heap in first["heaps"]} == {
        "bench_data_structures.bpf.o": 64,
        "ffkx_memcache.bpf.o": 128,
        "ffkx_memcached.bpf.o": 256,
        "ffkx_redis.bpf.o": 256,
    }
    for name in ("ffkx", "ffkx-test", "ffkx-bench"):
        assert os.access(Path(first["program"]).with_name(name), os.X_OK)
    assert subprocess.run([Path(first["program"]).with_name("ffkx-test")], check=False).returncode == 0

    again = build(tree)
    assert states(again) == ALL_CACHED and again["program"] == first["program"]


def test_only_what_a_change_touches_is_built_again(tree: Path) -> None:
    def to_do() -> set[str]:
        planned = states(build(tree, *PLAIN, "--program-only", "--dry-run"))
        return {name for name, state in planned.items() if state == "to do"}

    build(tree, *PLAIN, "--program-only")
    append(tree / "src" / "Main.cpp", "// more\n")
    assert to_do() == {"tree", "program"}
    header = tree / "bpf" / "include" / "ffkx_heap.bpf.h"
    before = header.read_bytes()
    append(header, "/* more */\n")
    assert to_do() == {"tree", "objects", "program"}
    # Objects are made with libbpf's headers, not with its sources.
    header.write_bytes(before)
    append(tree / "libbpf" / "src" / "libbpf.c", "/* more */\n")
    assert to_do() == {"tree", "libbpf", "program"}


def test_recipes_change_the_copy_and_what_the_tree_has_is_not_applied_again(tree: Path) -> None:
    """Heaps fitted in the tree by hand of fit-heap, fitted again in the copy only."""
    assert kflex("fit-heap", "--source", tree, "--gb", "2").returncode == 0
    before = fingerprint(tree)
    report = build(tree, *PLAIN, "--program-only")
    assert {heap["gb"] for heap in report["heaps"]} == {2}
    assert [said["id"] for said in report["recipes"]["taken"]] == ["heap-size"]

    report = build(tree, *PLAIN, "--program-only", "--heap-gb", "1")
    assert {heap["gb"] for heap in report["heaps"]} == {1} and fingerprint(tree) == before
    # The user-space program knows the capacities of the heap, libbpf does not.
    assert states(report) == {**ALL_BUILT, "libbpf": "cached"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recipe", "nonsense"], "there is no recipe nonsense"),
        (["--no-recipe", "nonsense"], "there is no recipe nonsense"),
        (["--recipe", "out-of-heap", "--no-recipe", "out-of-heap"], "leave one of them out"),
        (["--recipe", "heap-size"], "--heap-gb N or auto"),
        (["--heap-gb", "3"], "power of two"),
        (["--heap-gb", "many"], "is not a number of GB"),
        (["--heap-gb", "4096"], "the nearest size that works"),
    ],
)
def test_recipes_and_sizes_that_cannot_be(tree: Path, words: list[str], expected: str) -> None:
    line = refusal(kflex("build", "--artifact", "--source", tree, "--dry-run", *words))
    assert expected in line


def test_a_recipe_that_does_not_fit_the_tree(tree: Path) -> None:
    text = tree / "src" / "Main.cpp"
    text.write_text(text.read_text().replace("/sys/fs/cgroup", "/sys/fs/cgroup/mine"))
    line = refusal(kflex("build", "--artifact", "--source", tree, "--dry-run", "--recipe", "cgroup2-path"))
    assert "cgroup2-path, step" in line and "src/Main.cpp" in line


def test_a_read_only_tree_is_built(tree: Path) -> None:
    require("root", "capabilities")
    subprocess.run(["mount", "--bind", "-o", "ro", tree, tree], check=True)
    try:
        with pytest.raises(OSError):
            (tree / "probe").touch()
        assert states(build(tree, *PLAIN, "--program-only")) == ALL_BUILT
    finally:
        subprocess.run(["umount", tree], check=True)


# --- ended midway -----------------------------------------------------------------------------------------


@pytest.fixture
def stalling(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A C++ compiler that says its process id when it comes to Main.cpp, and then goes on for ever.

    Yields the descriptor it says it to.
    """
    said = tmp_path / "said"
    os.mkfifo(said)
    reader = os.open(said, os.O_RDONLY | os.O_NONBLOCK)
    sleeping = f'case "$*" in *Main.cpp*-c*|*-c*Main.cpp*) echo $$ > {said}; exec sleep 1000;; esac\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "slow-c++", f'{sleeping}exec c++ "$@"\n')))
    try:
        yield reader
    finally:
        os.close(reader)


def started(tree: Path, stalling: int) -> tuple[subprocess.Popen[str], int]:
    """A build that is compiling Main.cpp: (its process, a pidfd of the compiler)."""
    process = subprocess.Popen(
        command("build", "--artifact", "--source", tree, "--program-only", *PLAIN),
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    poll = select.poll()
    poll.register(stalling, select.POLLIN)
    if not any(event & select.POLLIN for _, event in poll.poll(120_000)):
        process.kill()
        pytest.fail(f"the compiler was never started: {process.communicate()}")
    return process, os.pidfd_open(int(os.read(stalling, 100)))


def ended(compiler: int) -> bool:
    """Whether the compiler is gone (a pidfd becomes readable then)."""
    return bool(select.select([compiler], [], [], 60)[0])


def test_a_killed_build_goes_on_where_it_was(
    tree: Path, stalling: int, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, compiler = started(tree, stalling)
    process.kill()
    process.communicate()
    # Nobody could end the compiler: it is the orphan whose leftovers the next build meets.
    monkeypatch.delenv("CXX")
    report = build(tree, *PLAIN, "--program-only")
    assert states(report) == {"tree": "cached", "libbpf": "cached", "objects": "cached", "program": "built"}
    signal.pidfd_send_signal(compiler, signal.SIGKILL)
    assert ended(compiler)
    os.close(compiler)
    leftovers = [path.name for path in own_cache.glob("artifact-*/*") if path.name.startswith(".")]
    assert leftovers == []


def test_interrupting_a_build_ends_the_compilers(
    tree: Path, stalling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, compiler = started(tree, stalling)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and err.splitlines()[-1] == "kflex-repro: interrupted"
    assert ended(compiler)
    os.close(compiler)
    monkeypatch.delenv("CXX")
    assert states(build(tree, *PLAIN, "--program-only"))["objects"] == "cached"


# --- what can be wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "breakage", "step"),
    [
        ("libbpf/src/libbpf.c", '#error "no such thing"\n', "KFlex's libbpf"),
        ("bpf/ffkx_redis.bpf.c", '#error "no such thing"\n', "the BPF objects"),
        ("src/Main.cpp", '#error "no such thing"\n', "the program"),
        ("CMakeLists.txt", 'message(FATAL_ERROR "no such thing")\n', "the program"),
    ],
)
def test_a_source_that_does_not_compile(tree: Path, file: str, breakage: str, step: str) -> None:
    append(tree / file, breakage)
    line = refusal(kflex("build", "--artifact", "--source", tree, "--program-only", *PLAIN))
    assert f"building {step} failed" in line and Path(file).name in line
    assert str(tree.parent / "cache" / "artifact-") not in line, "names a copy that is gone"
    log = Path(line.rpartition("the whole log is ")[2])
    assert "no such thing" in log.read_text()


def test_missing_packages_are_named_with_one_command(tree: Path, tmp_path: Path) -> None:
    append(tree / "src" / "CMakeLists.txt", "find_package(absl)\npkg_search_module(JEMALLOC jemalloc)\n")
    append(tree / "tests" / "CMakeLists.txt", "# find_package(benchmark)\nfind_package(GTest)\n")
    empty = tmp_path / "nothing"
    empty.mkdir()
    bare = script(tmp_path / "bare-c++", 'exec c++ -nostdinc -nostdinc++ "$@"\n')
    env = {"CXX": str(bare), "PKG_CONFIG_LIBDIR": str(empty), "PKG_CONFIG_PATH": str(empty)}

    done = kflex("build", "--artifact", "--source", tree, env=env)
    line = refusal(done)
    assert done.returncode == 3 and "abseil" in line
    packages = line.rpartition("apt install ")[2].removeprefix("--reinstall ").split()
    assert packages == ["libelf-dev", "zlib1g-dev", "libabsl-dev", "libjemalloc-dev", "libgtest-dev"]
    # The plan says the same, and everything that is there.
    planned = kflex("build", "--artifact", "--source", tree, "--dry-run", "--program-only", *PLAIN, env=env)
    assert refusal(planned).endswith("libelf-dev zlib1g-dev libabsl-dev libjemalloc-dev")
    assert "needs     jemalloc: missing" in planned.stdout and "needs     cmake: 3" in planned.stdout


def test_missing_programs_are_named_with_one_command(tree: Path, tmp_path: Path) -> None:
    few = tmp_path / "bin"
    few.mkdir()
    for name in ("c++", "gcc", "pkg-config", "dpkg-query", "apt-cache", "git"):
        if found := shutil.which(name):
            (few / name).symlink_to(found)
    line = refusal(kflex("build", "--artifact", "--source", tree, env={"PATH": str(few)}))
    assert all(name in line for name in ("make", "cmake", "ninja")) and "pkg-config" not in line
    assert line.rpartition("apt install ")[2].removeprefix("--reinstall ") == "make cmake ninja-build"


def test_a_compiler_that_does_not_know_the_standard(tree: Path) -> None:
    text = tree / "CMakeLists.txt"
    text.write_text(text.read_text().replace("CXX_STANDARD 20", "CXX_STANDARD 95"))
    line = refusal(kflex("build", "--artifact", "--source", tree))
    assert "does not know -std=c++95" in line


@pytest.mark.parametrize("what", ["none", "absent", "file", "empty", "part", "above", "kernel"])
def test_what_is_no_tree(tmp_path: Path, own_cache: Path, what: str) -> None:
    tree = copy_tree(tmp_path / "KFlex")
    source: Path | None = tree
    expected = "not a KFlex source tree: no bpf/include/ffkx_heap.bpf.h"
    if what == "none":
        source, expected = None, "--source DIR, where DIR is a clone of KFlex"
    elif what == "absent":
        source, expected = tmp_path / "nowhere", "no such directory"
    elif what == "file":
        source, expected = tree / "build.sh", "not a directory"
    elif what == "empty":
        source = tmp_path / "empty"
        source.mkdir()
    elif what == "part":
        source, expected = tree / "bpf", f"--source {tree}"
    elif what == "above":
        source, expected = tmp_path, f"--source {tree}"
    else:
        source, expected = tmp_path / "linux", "this is KFlex's kernel"
        (source / "kernel" / "bpf").mkdir(parents=True)
        (source / "kernel" / "bpf" / "heap.c").touch()
        (source / "Kbuild").touch()
    line = refusal(kflex("build", "--artifact", *(["--source", source] if source else [])))
    assert expected in line


def test_parts_of_the_tree_that_were_not_fetched(tree: Path) -> None:
    (tree / ".gitmodules").write_text(
        '[submodule "linux"]\n\tpath = linux\n\turl = https://example.org/linux\n'
        '[submodule "libbpf"]\n\tpath = libbpf\n\turl = https://example.org/libbpf\n'
    )
    (tree / "linux").mkdir()
    # The kernel is not needed for the build; it is said how to get it.
    planned = kflex("build", "--artifact", "--source", tree, "--dry-run", *PLAIN)
    assert planned.returncode == 0, planned.stderr
    assert (
        f"not there: linux (KFlex's kernel: to run, not to build); git -C {tree} submodule" in planned.stdout
    )

    for path in sorted((tree / "libbpf").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    line = refusal(kflex("build", "--artifact", "--source", tree))
    assert line.endswith(f"git -C {tree} submodule update --init --depth 1 libbpf")

    (tree / ".gitmodules").unlink()
    line = refusal(kflex("build", "--artifact", "--source", tree))
    assert line.endswith(f"git -C {tree} checkout HEAD -- libbpf")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--source", "DIR"], "want --artifact"),
        (["--dry-run"], "want --artifact"),
        (["--artifact", "--source", "DIR", "--only", "kflex.so"], "not for --artifact"),
    ],
)
def test_options_that_do_not_go_together(own_cache: Path, words: list[str], expected: str) -> None:
    done = kflex("build", *words)
    assert done.returncode == 2 and expected in done.stderr


def test_a_recipe_for_other_sources_names_the_tree_and_no_copy_of_it(tree: Path) -> None:
    line = refusal(kflex("build", "--artifact", "--source", tree, "--dry-run", "--recipe", "libbpf-trace"))
    assert "no file tools/lib/bpf/libbpf.c" in line and f"({tree})" in line
    planned = build(tree, *PLAIN, "--dry-run")
    assert "libbpf-trace" not in str(planned["recipes"]["left"]).replace("libbpf-trace-artifact", "")
