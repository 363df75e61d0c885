"""What the KFlex artifact needs to be built, by the names of Debian's and Ubuntu's packages.

Libraries are those that the tree's CMake files ask for. Each thing is looked for where it will be used: a
header by the compiler that will include it, a library by pkg-config, a program by running it. A package that
dpkg calls installed but that does not serve is said so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import toolchain
from kflex_repro.build.artifact_source import Source
from kflex_repro.errors import KflexError, Unavailable

# "LLVM > 18" in the artifact's notes.
CLANG_MINIMUM = (19,)
# The first that knows C++23.
CMAKE_MINIMUM = (3, 20)
_CXX_MINIMUM = 17
_SECONDS = 60


@dataclass(frozen=True)
class Found:
    """One dependency: ``value`` is what was found ("" when it is missing), ``note`` a warning about it."""

    name: str
    packages: tuple[str, ...]
    purpose: str
    value: str
    installed: bool
    note: str = ""

    @property
    def missing(self) -> bool:
        return not self.value


@dataclass(frozen=True)
class Tools:
    """The programs a build runs."""

    clang: toolchain.Tool
    bpftool: toolchain.Tool
    cmake: toolchain.Tool
    ninja: toolchain.Tool
    cxx: toolchain.Tool
    cc: toolchain.Tool
    make: str

    @property
    def banners(self) -> tuple[str, ...]:
        """What identifies the tools in a key."""
        return tuple(tool.banner for tool in (self.clang, self.bpftool, self.cmake, self.cxx, self.cc))


@dataclass(frozen=True)
class Need:
    """What to look for: ``probe`` gives (what was found or "", a warning)."""

    name: str
    packages: Callable[[], tuple[str, ...]]
    purpose: str
    probe: Callable[[], tuple[str, str]]
    asked_by: str = ""  # a word of the tree's CMake files; "" is always needed


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def clang() -> toolchain.Tool | None:
    """The clang for the BPF objects: KFLEX_CLANG whatever it is, else the newest that is new enough."""
    if os.environ.get("KFLEX_CLANG"):
        return toolchain.find_clang()
    return toolchain.newest_clang(CLANG_MINIMUM)


def bpftool(of_tree: Path | None) -> toolchain.Tool | None:
    """KFLEX_BPFTOOL, else the tree's own if it runs here, else the system's."""
    if of_tree and not os.environ.get("KFLEX_BPFTOOL") and (own := toolchain.probe("bpftool", str(of_tree))):
        return own
    return toolchain.find_bpftool()


def _cxx() -> toolchain.Tool | None:
    chosen = os.environ.get("CXX")
    path = shutil.which(chosen or "c++")
    return toolchain.probe("c++", path) if path else None


def tool(name: str, minimum: tuple[int, ...] = ()) -> toolchain.Tool | None:
    """A program on PATH, if it works and is new enough."""
    path = shutil.which(name)
    found = toolchain.probe(name, path) if path else None
    return found if found and found.version >= minimum else None


def shown(find: Callable[[], toolchain.Tool | None]) -> Callable[[], tuple[str, str]]:
    """A need's probe of a tool."""

    def probe() -> tuple[str, str]:
        found = find()
        return (f"{found.text} ({found.path})", "") if found else ("", "")

    return probe


def _clang_probe() -> tuple[str, str]:
    tool = clang()
    if tool is None:
        return "", ""
    old = "" if tool.version >= CLANG_MINIMUM else "older than 19, taken because KFLEX_CLANG says so"
    return f"{tool.text} ({tool.path})", old


def _header(*headers: str) -> Callable[[], tuple[str, str]]:
    """Whether the C++ compiler that will be used finds these headers."""

    def probe() -> tuple[str, str]:
        compiler = _cxx()
        if compiler is None:
            return "", "cannot be looked for without a C++ compiler"
        text = "".join(f"#include <{header}>\n" for header in headers)
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "probe.cc"
            source.write_text(text)
            done = _run([compiler.path, f"-std=c++{_CXX_MINIMUM}", "-M", str(source)])
        if done is None or done.returncode != 0:
            return "", ""
        made = next((word for word in done.stdout.split() if word.endswith(headers[0])), headers[0])
        return made, ""

    return probe


def _library(name: str) -> Callable[[], tuple[str, str]]:
    """Whether pkg-config, as CMake asks it, knows a library."""

    def probe() -> tuple[str, str]:
        done = _run(["pkg-config", "--modversion", name])
        if done is None:
            return "", "cannot be looked for without pkg-config"
        return (done.stdout.strip(), "") if done.returncode == 0 else ("", "")

    return probe


def _both(*probes: Callable[[], tuple[str, str]]) -> Callable[[], tuple[str, str]]:
    def probe() -> tuple[str, str]:
        values = [found() for found in probes]
        bad = next((value for value in values if not value[0]), None)
        return bad or values[0]

    return probe


def _standard(asked: str) -> Callable[[], tuple[str, str]]:
    """Whether the C++ compiler knows the standard that the tree sets."""
    found = re.search(r"cmake_cxx_standard\s+(\d+)", asked)
    flag = f"-std=c++{found.group(1) if found else _CXX_MINIMUM}"

    def probe() -> tuple[str, str]:
        tool = _cxx()
        if tool is None:
            return "", ""
        done = _run([tool.path, flag, "-fsyntax-only", "-x", "c++", "/dev/null"])
        if done is None or done.returncode != 0:
            return "", f"{tool.text} ({tool.path}) does not know {flag}"
        return f"{tool.text} ({tool.path})", ""

    return probe


def _clang_packages() -> tuple[str, ...]:
    listed = toolchain.output(["apt-cache", "search", "--names-only", r"^clang-[0-9]+$"])
    numbers = [int(line.split()[0].removeprefix("clang-")) for line in listed.splitlines() if line.strip()]
    enough = [number for number in numbers if (number,) >= CLANG_MINIMUM]
    return (f"clang-{min(enough) if enough else CLANG_MINIMUM[0]}",)


def _needs(bpftool_of_tree: Path | None, asked: str) -> tuple[Need, ...]:
    def package(*names: str) -> Callable[[], tuple[str, ...]]:
        return lambda: names

    def of_bpftool() -> tuple[str, ...]:
        return (
            ("bpftool",)
            if toolchain.output(["apt-cache", "madison", "bpftool"])
            else ("linux-tools-generic",)
        )

    return (
        Need("C compiler", package("gcc"), "libbpf", shown(toolchain.find_cc)),
        Need("C++ compiler", package("g++"), "the program", _standard(asked)),
        Need("clang, newer than 18", _clang_packages, "the BPF objects", _clang_probe),
        Need("bpftool", of_bpftool, "skeletons", shown(lambda: bpftool(bpftool_of_tree))),
        Need("make", package("make"), "libbpf, the BPF objects", shown(lambda: tool("make"))),
        Need("cmake", package("cmake"), "the program", shown(lambda: tool("cmake", CMAKE_MINIMUM))),
        Need("ninja", package("ninja-build"), "the program", shown(lambda: tool("ninja"))),
        Need("pkg-config", package("pkg-config"), "finding libraries", shown(lambda: tool("pkg-config"))),
        Need("libelf", package("libelf-dev"), "libbpf", _both(_library("libelf"), _header("libelf.h"))),
        Need("zlib", package("zlib1g-dev"), "libbpf", _both(_library("zlib"), _header("zlib.h"))),
        Need(
            "abseil",
            package("libabsl-dev"),
            "the program",
            _header("absl/flags/flag.h", "absl/status/statusor.h", "absl/container/flat_hash_map.h"),
            "absl",
        ),
        Need(
            "jemalloc",
            package("libjemalloc-dev"),
            "the heap's allocator",
            _both(_library("jemalloc"), _header("jemalloc/jemalloc.h")),
            "jemalloc",
        ),
        Need(
            "benchmark",
            package("libbenchmark-dev"),
            "ffkx-bench",
            _header("benchmark/benchmark.h"),
            "find_package(benchmark",
        ),
        Need(
            "googletest", package("libgtest-dev"), "ffkx-test", _header("gtest/gtest.h"), "find_package(gtest"
        ),
    )


def _installed(packages: Iterable[str]) -> bool:
    done = _run(["dpkg-query", "-W", "-f=${db:Status-Status}\n", *packages])
    return done is not None and done.returncode == 0 and set(done.stdout.split()) == {"installed"}


def look(source: Source, whole: bool = True) -> tuple[Found, ...]:
    """Look for everything; ``whole`` also for what only the artifact's tests and benchmarks need."""
    asked = source.cmake(whole)
    return examine(need for need in _needs(source.bpftool, asked) if need.asked_by in asked)


def examine(needs: Iterable[Need]) -> tuple[Found, ...]:
    """Look for each of them."""
    found = []
    for need in needs:
        value, note = need.probe()
        packages = () if value else need.packages()
        there = bool(value) or _installed(packages)
        if not value and there and not note:
            note = "its package is installed, but it does not work"
        found.append(Found(need.name, packages, need.purpose, value, there, note))
    return tuple(found)


def apt_command(found: Iterable[Found]) -> str:
    """The one command that installs what is missing; "" when nothing is."""
    packages = dict.fromkeys(name for one in found if one.missing for name in one.packages)
    again = "--reinstall " if any(one.missing and one.installed for one in found) else ""
    return f"apt install {again}{' '.join(packages)}" if packages else ""


def demand(found: Iterable[Found]) -> None:
    """Unavailable, naming all that is missing and the command that installs it."""
    found = tuple(found)
    lacking = [one for one in found if one.missing]
    if lacking:
        names = ", ".join(one.name + (f" ({one.note})" if one.note else "") for one in lacking)
        raise Unavailable(f"not installed: {names}", "", apt_command(found))


def tools(source: Source) -> Tools:
    """The programs to build with. KflexError where one is gone since ``look()``."""

    def want(tool: toolchain.Tool | None, name: str) -> toolchain.Tool:
        if tool is None:
            raise KflexError(f"no working {name} found")
        return tool

    return Tools(
        clang=want(clang(), "clang"),
        bpftool=want(bpftool(source.bpftool), "bpftool"),
        cmake=want(tool("cmake", CMAKE_MINIMUM), "cmake"),
        ninja=want(tool("ninja"), "ninja"),
        cxx=want(_cxx(), "C++ compiler"),
        cc=toolchain.cc(),
        make=want(tool("make"), "make").path,
    )
