"""Small real BPF objects, compiled by the tests, and places to attach and pin them that go away again."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kflex_repro.bpf import fs
from tests.conftest import require, unavailable

Compile = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _root() -> None:
    require("root")


@pytest.fixture(scope="session")
def compile_bpf(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """compile_bpf(name, C source) -> object file. Sources get the UAPI headers, not vmlinux.h."""
    clang = shutil.which("clang")
    if clang is None:
        unavailable("clang is not installed")
    out = tmp_path_factory.mktemp("bpf")

    def build(name: str, source: str) -> Path:
        text, made = out / f"{name}.bpf.c", out / f"{name}.bpf.o"
        text.write_text("#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n" + source)
        include = f"-I/usr/include/{platform.machine()}-linux-gnu"
        command = [
            clang,
            "-O2",
            "-g",
            "-target",
            "bpf",
            "-mcpu=v3",
            include,
            "-c",
            str(text),
            "-o",
            str(made),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return made

    return build


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A bpffs of the test's own: this machine's may be missing, and must not change."""
    point = tmp_path / "bpffs"
    point.mkdir()
    fs.mount("bpf", point)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.fixture
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty cgroup v2 of the test's own."""
    root = fs.cgroup2_root()
    if root is None:
        unavailable("no cgroup v2 mount")
    path = root / f"kflex-test-{request.node.name[:40]}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()
