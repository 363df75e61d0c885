"""For the tests that build the small tree: a copy of it, and the command line as a process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.build import toolchain
from kflex_repro.patching import recipe
from tests.conftest import unavailable

TREE = Path(__file__).parent / "tree"
TOP = Path(__file__).resolve().parents[2]
# As the tree is: looking for the recipes' places takes libclang seconds.
PLAIN = tuple(word for name in recipe.names() if name != "heap-size" for word in ("--no-recipe", name))


def copy_tree(to: Path) -> Path:
    """A tree of the test's own, without what an earlier build may have left in it."""
    shutil.copytree(TREE, to, ignore=shutil.ignore_patterns(".build", "*.bpf.o", "*.skel.h", "ffkx"))
    return to


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def require_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Need the programs of a build, all of the distribution's; any clang will do for the small tree."""
    for name in ("cmake", "ninja", "make", "pkg-config", "c++", "dpkg-query"):
        if shutil.which(name) is None:
            unavailable(f"{name} is not installed")
    clang = toolchain.find_clang()
    if clang is None or toolchain.find_bpftool() is None:
        unavailable("clang or bpftool is not installed")
    monkeypatch.setenv("KFLEX_CLANG", clang.path)


def fingerprint(root: Path) -> dict[str, tuple[int, str]]:
    """Mode and content of every file below a directory."""
    return {
        path.relative_to(root).as_posix(): (
            path.stat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "kflex_repro", *map(str, words)]


def kflex(*words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line; a terminal's width must not matter."""
    return subprocess.run(
        command(*words),
        check=False,
        capture_output=True,
        text=True,
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        timeout=300,
        env={**os.environ, **(env or {})},
    )


def build(tree: Path, *more: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Build a tree; the report of it."""
    done = kflex("build", "--artifact", "--source", tree, "--json", *more, env=env)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def states(report: Mapping[str, Any]) -> dict[str, str]:
    """What happened to each step."""
    return {step["name"]: step["state"] for step in report["steps"]}


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal (progress lines aside)."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("kflex-repro: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]
