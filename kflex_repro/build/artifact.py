"""The KFlex artifact, built from its user's tree: a patched copy, its libbpf, its BPF objects, its program.

Each step is an entry of the cache, keyed by the content it depends on: what is there and unchanged is not
made again, a build that was killed goes on with the step it was in, and the user's tree is only read. The
steps are those of the tree's own CMake and Makefiles, taken apart so that each can be kept.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import artifact_source, cache, toolchain
from kflex_repro.build.artifact_source import Source
from kflex_repro.build.dependencies import Tools
from kflex_repro.errors import KflexError

TREE, LIBBPF, OBJECTS, PROGRAM = STEPS = ("tree", "libbpf", "objects", "program")
TITLES = {
    TREE: "a copy of the tree, with the recipes",
    LIBBPF: "KFlex's libbpf",
    OBJECTS: "the BPF objects and their skeletons",
    PROGRAM: "the user-space program",
}
PROGRAM_NAME = "ffkx"
# Part of every key: raise it when a change here makes old entries wrong.
_FORMAT = "1"
# CMake target -> where CMake leaves it below its build directory.
_TARGETS = {PROGRAM_NAME: "src/ffkx"}
_WHOLE_TARGETS = {**_TARGETS, "ffkx-test": "tests/ffkx-test", "ffkx-bench": "bench/ffkx-bench"}

# step name, "start" | "built" | "cached", seconds
Report = Callable[[str, str, float], None]


@dataclass(frozen=True)
class Changes:
    """What is done to the copy: ``key`` identifies it, ``apply`` does it to the tree at a path."""

    key: tuple[str, ...]
    apply: Callable[[Path], None]


NO_CHANGES = Changes((), lambda _root: None)


@dataclass(frozen=True)
class Step:
    """One step: its entry, "built" now or "cached" (of a plan also "to do"), and the log of its making."""

    name: str
    key: str
    path: Path
    state: str
    seconds: float = 0.0
    log: Path | None = None


@dataclass(frozen=True)
class Artifact:
    """What was built, or of a plan: would be."""

    source: Path
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The step of this name."""
        return next(step for step in self.steps if step.name == name)

    @property
    def complete(self) -> bool:
        """Whether every step's entry is there."""
        return all(step.state != "to do" for step in self.steps)

    @property
    def tree(self) -> Path:
        """The patched copy."""
        return self.step(TREE).path / "tree"

    @property
    def objects(self) -> tuple[Path, ...]:
        """The compiled BPF objects."""
        return tuple(sorted(self.step(OBJECTS).path.glob("*.bpf.o")))

    @property
    def program(self) -> Path:
        """The artifact's executable."""
        return self.step(PROGRAM).path / PROGRAM_NAME


def _tree_key(source: Source, changes: Changes) -> str:
    return cache.digest([_FORMAT, TREE, *artifact_source.content(source.root), *changes.key])


def _keys(tree: Path, tools: Tools, whole: bool) -> dict[str, str]:
    """The keys of the steps after the first, from the content of the patched copy."""
    common = [_FORMAT, *tools.banners]
    libbpf = cache.digest([LIBBPF, *common, *artifact_source.content(tree, "libbpf")])
    # libbpf's headers are the objects' too; its sources are not.
    headers = [
        part
        for name in artifact_source.files(tree)
        if name.startswith("libbpf/") and name.endswith(".h")
        for part in (name, cache.file_digest(tree / name))
    ]
    tool = cache.file_digest(Path(tools.bpftool.path))
    objects = cache.digest([OBJECTS, *common, tool, *headers, *artifact_source.content(tree, "bpf")])
    everything = artifact_source.content(tree)
    program = cache.digest([PROGRAM, *common, str(whole), libbpf, objects, *everything])
    return {LIBBPF: libbpf, OBJECTS: objects, PROGRAM: program}


def _place(step: str, key: str) -> Path:
    return cache.root() / f"artifact-{step}" / key


def plan(source: Source, tools: Tools, changes: Changes = NO_CHANGES, whole: bool = True) -> Artifact:
    """What ``build`` would do, step by step; makes nothing that stays."""
    tree_key = _tree_key(source, changes)
    with tempfile.TemporaryDirectory(prefix="kflex-plan-") as scratch:
        tree = Path(scratch) / "tree"
        artifact_source.copy(source.root, tree)
        changes.apply(tree)
        keys = {TREE: tree_key, **_keys(tree, tools, whole)}
    steps = []
    for name in STEPS:
        place = _place(name, keys[name])
        steps.append(Step(name, keys[name], place, "cached" if cache.intact(place) else "to do"))
    return Artifact(source.root, tuple(steps))


def build(
    source: Source,
    tools: Tools,
    runner: toolchain.Runner,
    changes: Changes = NO_CHANGES,
    *,
    whole: bool = True,
    jobs: int | None = None,
    force: bool = False,
    report: Report = lambda _step, _state, _seconds: None,
) -> Artifact:
    """Build what is not in the cache yet; ``whole`` also the artifact's tests and benchmarks.

    BuildError for a failed step, with its first error and the place of its log.
    """
    steps: list[Step] = []

    def step(name: str, key: str, make: Callable[[Path, Path], None]) -> Path:
        report(name, "start", 0.0)
        started = time.monotonic()
        log: Path | None = None

        def into(out: Path) -> None:
            nonlocal log
            log = toolchain.log_path(f"artifact-{name}", key)
            make(out, log)

        place, fresh = cache.obtain(f"artifact-{name}", key, into, force)
        seconds = time.monotonic() - started
        state = "built" if fresh else "cached"
        steps.append(Step(name, key, place, state, seconds, log if log and log.exists() else None))
        report(name, state, seconds)
        return place

    def copied(out: Path, _log: Path) -> None:
        artifact_source.copy(source.root, out / "tree")
        changes.apply(out / "tree")

    tree = step(TREE, _tree_key(source, changes), copied) / "tree"
    keys = _keys(tree, tools, whole)
    work = _Work(tree, tools, runner, jobs or os.cpu_count() or 1)
    libbpf = step(LIBBPF, keys[LIBBPF], work.libbpf)
    objects = step(OBJECTS, keys[OBJECTS], work.objects)
    targets = _WHOLE_TARGETS if whole else _TARGETS
    step(PROGRAM, keys[PROGRAM], lambda out, log: work.program(out, log, libbpf, objects, targets))
    return Artifact(source.root, tuple(steps))


@dataclass(frozen=True)
class _Work:
    """The steps' commands. Each works in a copy inside the entry being made, gone when it is done."""

    tree: Path
    tools: Tools
    runner: toolchain.Runner
    jobs: int

    def _run(self, step: str, command: Sequence[str | Path], log: Path, work: Path) -> None:
        try:
            self.runner.run(step, command, log)
        except toolchain.BuildError as error:
            # The copy is gone in a moment: name files as they are named in the tree.
            reason = error.where.replace(f"{work}/", "").replace(f"{work.parent}/", "")
            raise toolchain.BuildError(step, reason, log) from None

    def libbpf(self, out: Path, log: Path) -> None:
        """The static library and its headers, laid out as the tree's CMake lays them out."""
        work = out / "work"
        shutil.copytree(self.tree / "libbpf", work)
        install = out / "libbpf"
        install.mkdir()
        settings = ["BUILD_STATIC_ONLY=1", f"OBJDIR={install}", f"DESTDIR={install}"]
        make: list[str | Path] = [self.tools.make, "-C", work / "src", f"-j{self.jobs}"]
        self._run("KFlex's libbpf", [*make, f"CC={self.tools.cc.path}", *settings, "install"], log, work)
        shutil.rmtree(work)
        headers = install / "usr" / "include" / "bpf" / "libbpf.h"
        if not ((install / "libbpf.a").is_file() and headers.is_file()):
            raise toolchain.BuildError("KFlex's libbpf", "make install left no libbpf.a or no headers", log)

    def objects(self, out: Path, log: Path) -> None:
        """Every object and skeleton the tree's Makefile makes."""
        work = out / "work"
        shutil.copytree(self.tree / "bpf", work / "bpf")
        (work / "libbpf").symlink_to(self.tree / "libbpf")
        make: list[str | Path] = [self.tools.make, "-C", work / "bpf", f"-j{self.jobs}"]
        settings = [f"CLANG={self.tools.clang.path}", f"BPFTOOL={self.tools.bpftool.path}"]
        self._run("the BPF objects", [*make, *settings], log, work)
        made = [path for path in (work / "bpf").iterdir() if path.name.endswith((".bpf.o", ".skel.h"))]
        # The Makefile writes skeletons through a redirection: a failed one leaves an empty file.
        empty = [path.name for path in made if path.stat().st_size == 0]
        if not made or empty:
            raise toolchain.BuildError(
                "the BPF objects", f"empty: {', '.join(empty)}" if empty else "make left none", log
            )
        for path in made:
            shutil.copy2(path, out / path.name)
        shutil.rmtree(work)

    def program(self, out: Path, log: Path, libbpf: Path, objects: Path, targets: dict[str, str]) -> None:
        """The program by the tree's CMake, which finds libbpf and the objects already made."""
        work, made = out / "work", out / "work" / ".build"
        shutil.copytree(self.tree, work)
        for path in objects.iterdir():
            if path.name.endswith((".bpf.o", ".skel.h")):
                shutil.copy2(path, work / "bpf" / path.name)
        shutil.copytree(libbpf / "libbpf", made / "libbpf")
        tools = self.tools
        settings = [f"CLANG={tools.clang.path}", f"BPFTOOL={tools.bpftool.path}"]
        cmake: list[str | Path] = [tools.cmake.path, "-E", "env", *settings, tools.cmake.path]
        others = "ON" if len(targets) > 1 else "OFF"
        configure: list[str | Path] = ["-G", "Ninja", "-S", work, "-B", made]
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={tools.ninja.path}",
            f"-DCMAKE_C_COMPILER={tools.cc.path}",
            f"-DCMAKE_CXX_COMPILER={tools.cxx.path}",
            f"-DFFKX_OPT_BUILD_TESTS={others}",
            f"-DFFKX_OPT_BUILD_BENCH={others}",
        ]
        self._run("the program", [*cmake, *configure], log, work)
        make: list[str | Path] = ["--build", made, "--parallel", str(self.jobs), "--target", *targets]
        self._run("the program", [*cmake, *make], log, work)
        for name, place in targets.items():
            if not (made / place).is_file():
                raise KflexError(f"CMake made no {name}", str(log))
            shutil.copy2(made / place, out / name)
        shutil.rmtree(work)
