"""The build: keys, the cache's robustness, failed steps."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kflex_repro import build
from kflex_repro.build import cache, kernel_source, libbpf, objects, toolchain
from kflex_repro.errors import KflexError, Unavailable
from tests.conftest import unavailable

PROGRAM = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "shared.h"
SEC("xdp")
int %s(struct xdp_md *context)
{
    return ANSWER;
}
char LICENSE[] SEC("license") = "GPL";
"""
MODULE = '#include "shared.h"\nint answer(void);\nint answer(void)\n{\n    return ANSWER;\n}\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KFLEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tree with two objects and a module, with UAPI headers in place of vmlinux.h."""
    if toolchain.find_clang() is None or toolchain.find_cc() is None:
        unavailable("needs clang and a C compiler")
    top = tmp_path / "source"
    (top / "bpf").mkdir(parents=True)
    (top / "module" / "vendor").mkdir(parents=True)
    (top / "bpf" / "shared.h").write_text("#ifndef ANSWER\n#define ANSWER 2\n#endif\n")
    for name in ("one", "two"):
        (top / "bpf" / f"{name}.bpf.c").write_text(PROGRAM % name)
    (top / "module" / "kflex.c").write_text(MODULE)
    monkeypatch.setenv("KFLEX_SOURCE", str(top))
    fake = tmp_path / "vmlinux.h"
    fake.write_text("")
    monkeypatch.setattr(objects, "vmlinux", lambda *_: objects.Step("vmlinux.h", fake, False, 0.0, None))
    # The test programs include linux/bpf.h, which wants asm/types.h of the multiarch directory.
    asm = next(Path("/usr/include").glob("*-linux-gnu/asm"), None)
    if asm is not None:
        (top / "bpf" / "asm").symlink_to(asm)
    yield top


def built_names(made: build.Built) -> set[str]:
    return {step.name for step in made.steps if step.built}


def test_builds_once_then_is_instant(sources: Path) -> None:
    first = build.ensure()
    assert built_names(first) == {"one.bpf.o", "two.bpf.o", "kflex.so"}
    assert first.object("one").name == "one.bpf.o" and first.module.name == "kflex.so"
    assert built_names(again := build.ensure()) == set() and again == first
    with pytest.raises(KflexError, match="no BPF object three"):
        first.object("three")


def test_changes_rebuild_what_they_touch(sources: Path) -> None:
    first = build.ensure()
    text = sources / "bpf" / "one.bpf.c"
    text.write_text(text.read_text() + "int more;\n")
    assert built_names(second := build.ensure()) == {"one.bpf.o"}
    assert second.object("one") != first.object("one") and second.object("two") == first.object("two")
    (sources / "bpf" / "shared.h").write_text("#define ANSWER 1\n")
    assert built_names(build.ensure()) == {"one.bpf.o", "two.bpf.o", "kflex.so"}
    text.write_text(PROGRAM % "one")
    (sources / "bpf" / "shared.h").write_text("#ifndef ANSWER\n#define ANSWER 2\n#endif\n")
    assert built_names(build.ensure()) == set(), "the first state's outputs are still there"


def test_defines_are_variants_of_their_own(sources: Path) -> None:
    plain, broken = build.ensure(), build.ensure({"ANSWER": "1"})
    assert broken.object("one") != plain.object("one") and broken.module != plain.module
    assert broken.object("one").read_bytes() != plain.object("one").read_bytes()
    assert built_names(build.ensure({"ANSWER": "1"})) == built_names(build.ensure()) == set()


def test_only_and_force(sources: Path) -> None:
    assert built_names(build.ensure(only="two")) == {"two.bpf.o"}
    assert built_names(build.ensure(only="kflex.so")) == {"kflex.so"}
    assert built_names(build.ensure(only="two", force=True)) == {"two.bpf.o"}
    with pytest.raises(KflexError, match="not part of this build"):
        _ = build.ensure(only="two").module
    with pytest.raises(KflexError, match="nothing to build is called three"):
        build.ensure(only="three")


@pytest.mark.parametrize(
    "damage", ["empty", "changed", "gone", "manifest gone", "manifest nonsense", "a file"]
)
def test_damage_is_repaired(sources: Path, damage: str) -> None:
    made = build.ensure().object("one")
    good = made.read_bytes()
    manifest = made.parent / "manifest.json"
    if damage == "empty":
        made.write_bytes(b"")
    elif damage == "changed":
        made.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "gone":
        made.unlink()
    elif damage == "manifest gone":
        manifest.unlink()
    elif damage == "manifest nonsense":
        manifest.write_text('["x"]')
    else:
        shutil.rmtree(made.parent)
        made.parent.write_text("in the way")
    again = build.ensure()
    assert built_names(again) == {"one.bpf.o"} and again.object("one").read_bytes() == good


def test_a_failed_step_names_its_log_and_its_error(sources: Path, own_cache: Path) -> None:
    (sources / "bpf" / "two.bpf.c").write_text(
        '#include "shared.h"\nint broken(void) { return nothing_here; }\n'
    )
    with pytest.raises(build.BuildError) as caught:
        build.ensure()
    error = caught.value
    assert "two.bpf.o" in str(error) and "nothing_here" in str(error) and str(error.log) in str(error)
    assert "\n" not in str(error)
    log = error.log.read_text()
    assert log.startswith("+ ") and "nothing_here" in log
    assert not list((own_cache / "objects").glob(".*")), "no half-made entries"
    (sources / "bpf" / "two.bpf.c").write_text(PROGRAM % "two")
    build.ensure()


def test_module_warnings_are_errors(sources: Path) -> None:
    (sources / "module" / "kflex.c").write_text(
        "int answer(int unused);\nint answer(int unused) { return 1; }\n"
    )
    with pytest.raises(build.BuildError, match="unused"):
        build.ensure()


def test_missing_tools_are_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for look in (toolchain.find_clang, toolchain.find_cc, toolchain.find_bpftool):
        look.cache_clear()
    try:
        monkeypatch.setenv("KFLEX_CLANG", "/nonexistent/clang")
        with pytest.raises(Unavailable, match=r"no working clang found .*apt install clang"):
            build.ensure()
    finally:
        toolchain.find_clang.cache_clear()


def test_too_old_tools_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "clang"
    old.write_text("#!/bin/sh\necho 'clang version 9.0.1 (x)'\n")
    old.chmod(0o755)
    monkeypatch.setenv("KFLEX_CLANG", str(old))
    toolchain.find_clang.cache_clear()
    try:
        with pytest.raises(Unavailable, match=r"clang 9\.0\.1 is too old, 12 is needed"):
            toolchain.clang()
    finally:
        toolchain.find_clang.cache_clear()


def test_a_kernel_without_btf_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(objects, "KERNEL_BTF", tmp_path / "none")
    with pytest.raises(Unavailable, match="no BTF"):
        objects.vmlinux(toolchain.Runner())


def _obtain(root: str, queue: multiprocessing.Queue[bool]) -> None:
    os.environ["KFLEX_CACHE"] = root

    def make(out: Path) -> None:
        (out / "output").write_text("made")

    _, fresh = cache.obtain("kind", "key", make)
    queue.put(fresh)


def test_concurrent_users_build_once(own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[bool] = context.Queue()
    workers = [context.Process(target=_obtain, args=(str(own_cache), queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(queue.get() for _ in workers) == [False, False, False, True]


def test_a_failing_builder_leaves_nothing(own_cache: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").write_text("half")
        raise KflexError("stopped half way")

    with pytest.raises(KflexError, match="half way"):
        cache.obtain("kind", "key", fail)
    with pytest.raises(KflexError, match="made no output"):
        cache.obtain("kind", "key", lambda out: None)
    assert list((own_cache / "kind").iterdir()) == []


def test_what_a_killed_builder_left_is_removed(own_cache: Path) -> None:
    left = own_cache / "kind" / ".key-abcdefgh"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    cache.obtain("kind", "key", lambda out: (out / "output").write_text("made") and None)
    assert [path.name for path in (own_cache / "kind").iterdir()] == ["key"]


@pytest.mark.soak
def test_libbpf_from_the_distributions_source() -> None:
    runner = toolchain.Runner()
    try:
        place, fresh = libbpf.from_source(runner)
    except Unavailable as error:
        unavailable(str(error))
    assert fresh and libbpf.from_source(runner) == (place, False)
    assert (place / "include" / "bpf" / "bpf_helpers.h").exists()
    version = libbpf.system_version(str(place / "lib" / "libbpf.so.1"))
    assert version is not None and version >= libbpf.MINIMUM


def test_keys_know_boundaries() -> None:
    assert cache.digest(["ab", "c"]) != cache.digest(["a", "bc"])
    assert cache.digest(["a"]) == cache.digest([b"a"])


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KFLEX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "kflex-repro"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.root() == tmp_path / ".cache" / "kflex-repro"


def test_a_stopped_runner_ends_its_commands(tmp_path: Path) -> None:
    runner = toolchain.Runner()
    marker = tmp_path / "started"
    failures: list[BaseException] = []

    def work() -> None:
        try:
            runner.run(
                "waiting",
                ["sh", "-c", f"echo > {marker}.new; mv {marker}.new {marker}; exec cat /dev/zero"],
                tmp_path / "log",
                stdout=Path("/dev/null"),
            )
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not marker.exists() and thread.is_alive():
        threading.Event().wait(0.005)
    runner.stop()
    thread.join(10)
    assert not thread.is_alive() and isinstance(failures[0], build.BuildError)
    with pytest.raises(KflexError, match="stopped"):
        runner.run("another", ["true"], tmp_path / "log")


def test_error_lines_prefer_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "+ cc a\nold error\n+ cc b\nnote\nb.c:1: error: first\nmore\nb.c:2: error: second\nthe end\n"
    )
    assert toolchain.error_lines(log) == "b.c:1: error: first | b.c:2: error: second"
    log.write_text("+ cc b\none\ntwo\nthree\nfour\n")
    assert toolchain.error_lines(log) == "two | three | four"


def test_versions_of_the_real_tools() -> None:
    for look in (toolchain.find_clang, toolchain.find_cc, toolchain.find_bpftool):
        tool = look()
        if tool is not None:
            assert tool.version and subprocess.run([tool.path, "--version"], check=True, capture_output=True)


def test_source_package_is_the_preferred_or_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "search": "linux-source-6.1 - x\nlinux-source-6.12 - x\n",
        "policy": "x:\n  Candidate: 6.12.9-1\n",
    }
    monkeypatch.setattr(toolchain, "output", lambda command: answers[command[1]])
    assert kernel_source.source_package() == ("linux-source-6.12", "6.12.9-1")
    answers["search"] = "linux-source-5.15.0 - x\nlinux-source-6.8.0 - x\n"
    assert kernel_source.source_package()[0] == "linux-source-6.8.0"
    answers["search"] = ""
    with pytest.raises(Unavailable, match="apt-get update"):
        kernel_source.source_package()


def test_built_libbpf_is_used_where_the_systems_is_missing(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KFLEX_LIBBPF", raising=False)
    monkeypatch.setattr(libbpf, "system_version", lambda *_: None)
    libbpf.activate()
    assert "KFLEX_LIBBPF" not in os.environ

    def make(out: Path) -> None:
        (out / "lib").mkdir()
        (out / "lib" / "libbpf.so.1").write_text("library")

    place, _ = cache.obtain("libbpf", "key", make)
    libbpf.activate()
    assert os.environ.pop("KFLEX_LIBBPF") == str(place / "lib" / "libbpf.so.1")
    monkeypatch.setattr(libbpf, "system_version", lambda *_: (1, 1))
    libbpf.activate()
    assert "KFLEX_LIBBPF" not in os.environ
