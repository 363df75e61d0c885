"""libbpf from the distribution's kernel source package: fetched and built in the cache, not installed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kflex_repro.build import cache, kernel_source, packages, toolchain
from kflex_repro.build.packages import Report
from kflex_repro.errors import KflexError, Unavailable

MINIMUM = (1, 1)
_KIND = "libbpf"
_TRACED_KIND = "libbpf-traced"
_TRACE_RECIPE = "libbpf-trace"
_PARTS = ("tools/lib", "tools/include", "tools/scripts", "tools/build", "tools/arch", "scripts/bpf_doc.py")


def system_version(name: str = "libbpf.so.1") -> tuple[int, int] | None:
    """(major, minor) of a libbpf that can be loaded; None where there is none."""
    try:
        library = ctypes.CDLL(name)
        return library.libbpf_major_version(), library.libbpf_minor_version()
    except (OSError, AttributeError):
        return None


def newest_built() -> Path | None:
    """The directory (lib/, include/) of the libbpf built here last; None where none was."""
    built = [path for path in (cache.root() / _KIND).glob("[!.]*") if cache.intact(path)]
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def activate() -> None:
    """Make this process load the newest libbpf built here, where the system's is missing or too old.

    Does nothing where KFLEX_LIBBPF is set or the system's will do.
    """
    if "KFLEX_LIBBPF" in os.environ or (system_version() or (0, 0)) >= MINIMUM:
        return
    if built := newest_built():
        os.environ["KFLEX_LIBBPF"] = str(built / "lib" / "libbpf.so.1")


@contextlib.contextmanager
def sources(
    name: str, version: str, runner: toolchain.Runner, report: Report = lambda _line: None
) -> Iterator[Path]:
    """A copy, to build in and to change, of what libbpf is built from: the top of a kernel tree.

    Downloaded (150 MB) and unpacked (12 s) once; what stays of it in the cache is 6 MB besides the download.
    """
    key = cache.digest([name, version, *_PARTS])

    def unpack(out: Path) -> None:
        log = toolchain.log_path("libbpf-sources", key)
        package = packages.fetch(name, version, runner, log, report)
        report("unpacking tools/lib/bpf")
        wanted = [f"*/{part}" for part in _PARTS]
        kernel_source.unpack(package, name, out / "linux", runner, log, wanted)

    place, _ = cache.obtain("sources", key, unpack)
    with tempfile.TemporaryDirectory(prefix=".libbpf-", dir=cache.root()) as work:
        tree = Path(work) / "linux"
        shutil.copytree(place / "linux", tree, symlinks=True)
        yield tree


def _compiler() -> toolchain.Tool:
    compiler = toolchain.cc()
    for header, package in (("libelf.h", "libelf-dev"), ("zlib.h", "zlib1g-dev")):
        if not (Path("/usr/include") / header).exists():
            raise Unavailable(f"{header} is not installed", "", f"apt install {package}")
    return compiler


def _make(tree: Path, compiler: toolchain.Tool, jobs: int | None, *arguments: str | Path) -> list[str | Path]:
    parallel = f"-j{jobs or os.cpu_count() or 1}"
    return ["make", "-C", tree / "tools/lib/bpf", parallel, f"CC={compiler.path}", *arguments]


def from_source(
    runner: toolchain.Runner,
    force: bool = False,
    jobs: int | None = None,
    report: Report = lambda _line: None,
) -> tuple[Path, bool]:
    """Build libbpf: (a directory with lib/libbpf.so.1 and include/bpf/, whether it was built now).

    Needs about 200 MB in the cache and, in passing, 250 MB there.
    """
    name, version = kernel_source.source_package()
    compiler = _compiler()
    key = cache.digest([name, version, compiler.banner])

    def build(out: Path) -> None:
        log = toolchain.log_path("libbpf", key)
        with sources(name, version, runner, report) as tree:
            report("compiling libbpf")
            stage = tree.parent / "stage"
            settings = ("prefix=/", f"DESTDIR={stage}", "install", "install_headers")
            runner.run("libbpf", _make(tree, compiler, jobs, *settings), log)
            headers = next((path.parent for path in stage.rglob("bpf_helpers.h")), None)
            if headers is None:
                raise toolchain.BuildError("libbpf", "make install left no headers", log)
            _keep_library(stage, out, log)
            shutil.copytree(headers, out / "include" / "bpf")

    return cache.obtain(_KIND, key, build, force)


def traced(
    runner: toolchain.Runner,
    force: bool = False,
    jobs: int | None = None,
    report: Report = lambda _line: None,
) -> tuple[Path, bool]:
    """Build the libbpf that writes what it asks of the kernel to KFLEX_TRACE: (directory, whether built now).

    The directory has lib/libbpf.so.1: put lib/ on LD_LIBRARY_PATH, name the file in LD_PRELOAD
    (any program) or in KFLEX_LIBBPF (this one).
    """
    # Not at the top: recipes come from where build.objects finds the sources, and that imports this module.
    from kflex_repro.patching import apply, recipe
    from kflex_repro.patching.tree import Tree

    name, version = kernel_source.source_package()
    compiler = _compiler()
    instructions = recipe.load(_TRACE_RECIPE)
    texts = [f"{_TRACE_RECIPE}.toml", *(step.source for step in instructions.steps if step.source)]
    contents = [(recipe.directory() / text).read_bytes() for text in texts]
    key = cache.digest([name, version, compiler.banner, *contents])

    def build(out: Path) -> None:
        log = toolchain.log_path("libbpf-traced", key)
        with sources(name, version, runner, report) as tree:
            opened = Tree.open(tree)
            apply.apply(apply.plan(instructions, opened), opened)
            report("compiling the traced libbpf")
            made = tree.parent / "made"
            made.mkdir()
            # The shared library alone: half the time.
            target = made / "libbpf.so"
            runner.run("libbpf", _make(tree, compiler, jobs, f"OUTPUT={made}/", target), log)
            _keep_library(made, out, log)

    return cache.obtain(_TRACED_KIND, key, build, force)


def _keep_library(made: Path, out: Path, log: Path) -> None:
    """The one shared library under ``made``, if it can be loaded, as ``out``/lib/libbpf.so.1."""
    libraries = [path for path in made.rglob("libbpf.so.*") if not path.is_symlink()]
    if len(libraries) != 1:
        raise toolchain.BuildError("libbpf", "make left no library", log)
    (out / "lib").mkdir()
    shutil.copyfile(libraries[0], out / "lib" / "libbpf.so.1")
    found = system_version(str(out / "lib" / "libbpf.so.1"))
    if found is None or found < MINIMUM:
        raise KflexError(f"the libbpf of this kernel source is too old: {found}", str(log))
