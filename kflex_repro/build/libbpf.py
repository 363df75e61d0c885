"""libbpf from the distribution's kernel source package: fetched and built in the cache, not installed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from kflex_repro.build import cache, toolchain
from kflex_repro.errors import KflexError, Unavailable

# The long-term kernel whose libbpf (1.5) we know; where the distribution has another, its newest.
PREFERRED = "linux-source-6.12"
MINIMUM = (1, 1)
_KIND = "libbpf"
_PARTS = ("tools/lib", "tools/include", "tools/scripts", "tools/build", "tools/arch", "scripts/bpf_doc.py")

Report = Callable[[str], None]


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


def source_package() -> tuple[str, str]:
    """(name, version) of the kernel source package to use: 6.12's, else the newest the distribution has."""
    names = toolchain.output(["apt-cache", "search", "--names-only", r"^linux-source-[0-9]+\.[0-9.]+$"])
    found = [line.split()[0] for line in names.splitlines() if line.strip()]
    if not found:
        raise Unavailable("no linux-source package is known to apt", "", "run apt-get update first")
    newest = max(found, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    name = PREFERRED if PREFERRED in found else newest
    policy = toolchain.output(["apt-cache", "policy", name])
    match = re.search(r"Candidate: (\S+)", policy)
    if match is None or match.group(1) == "(none)":
        raise Unavailable(f"apt has no version of {name}", "", "run apt-get update first")
    return name, match.group(1)


def _fetch(name: str, version: str, runner: toolchain.Runner, log: Path, report: Report) -> Path:
    """The package file, downloaded once; a damaged one is fetched again."""
    place, _ = cache.obtain(
        "downloads",
        cache.digest([name, version]),
        lambda out: _download(out, name, version, runner, log, report),
    )
    return next(place.glob("*.deb"))


def _download(
    out: Path, name: str, version: str, runner: toolchain.Runner, log: Path, report: Report
) -> None:
    report(f"downloading {name} {version} (about 150 MB)")
    runner.run(
        "the download of the kernel source", ["apt-get", "download", f"{name}={version}"], log, cwd=out
    )
    if not list(out.glob("*.deb")):
        raise toolchain.BuildError("the download of the kernel source", "apt-get left no package file", log)


def _unpack(package: Path, name: str, out: Path, runner: toolchain.Runner, log: Path, report: Report) -> None:
    report("unpacking tools/lib/bpf")
    # The package holds one compressed tar of the whole kernel: only the parts libbpf needs are written out.
    runner.run("the package", ["dpkg-deb", "-x", package, out / "package"], log)
    archives = list((out / "package" / "usr" / "src").glob(f"{name}*.tar.*"))
    if not archives:
        raise toolchain.BuildError("the kernel source", "the package holds no source archive", log)
    (out / "linux").mkdir()
    wanted = [f"*/{part}" for part in _PARTS]
    command: list[str | Path] = ["tar", "-x", "-f", archives[0], "-C", out / "linux", "--strip-components=1"]
    runner.run("the kernel source", [*command, "--wildcards", *wanted], log)
    shutil.rmtree(out / "package")


def from_source(
    runner: toolchain.Runner,
    force: bool = False,
    jobs: int | None = None,
    report: Report = lambda _line: None,
) -> tuple[Path, bool]:
    """Build libbpf: (a directory with lib/libbpf.so.1 and include/bpf/, whether it was built now).

    Needs about 200 MB in the cache and, in passing, 250 MB in the temporary directory.
    """
    name, version = source_package()
    compiler = toolchain.cc()
    for header, package in (("libelf.h", "libelf-dev"), ("zlib.h", "zlib1g-dev")):
        if not (Path("/usr/include") / header).exists():
            raise Unavailable(f"{header} is not installed", "", f"apt install {package}")
    key = cache.digest([name, version, compiler.banner])

    def build(out: Path) -> None:
        log = toolchain.log_path("libbpf", key)
        package = _fetch(name, version, runner, log, report)
        with tempfile.TemporaryDirectory(prefix=".libbpf-", dir=cache.root()) as work:
            tree, stage = Path(work), Path(work) / "stage"
            _unpack(package, name, tree, runner, log, report)
            report("compiling libbpf")
            make: list[str | Path] = [
                "make",
                "-C",
                tree / "linux/tools/lib/bpf",
                f"-j{jobs or os.cpu_count() or 1}",
            ]
            settings = ["prefix=/", f"DESTDIR={stage}", f"CC={compiler.path}"]
            runner.run("libbpf", [*make, *settings, "install", "install_headers"], log)
            _collect(stage, out, log)

    return cache.obtain(_KIND, key, build, force)


def _collect(stage: Path, out: Path, log: Path) -> None:
    libraries = [path for path in stage.rglob("libbpf.so.*") if not path.is_symlink()]
    headers = next((path.parent for path in stage.rglob("bpf_helpers.h")), None)
    if len(libraries) != 1 or headers is None:
        raise toolchain.BuildError("libbpf", "make install left no library or no headers", log)
    (out / "lib").mkdir()
    shutil.copyfile(libraries[0], out / "lib" / "libbpf.so.1")
    shutil.copytree(headers, out / "include" / "bpf")
    found = system_version(str(out / "lib" / "libbpf.so.1"))
    if found is None or found < MINIMUM:
        raise KflexError(f"the libbpf of this kernel source is too old: {found}", str(log))
