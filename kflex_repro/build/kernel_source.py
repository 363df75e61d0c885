"""Kernel trees: the distribution's source package, or a directory of the user's, which is only read."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import cache, packages, toolchain
from kflex_repro.build.packages import Report
from kflex_repro.errors import KflexError, Unavailable

# The long-term kernel that we know; where the distribution has another, its newest.
PREFERRED = "linux-source-6.12"
# What Kconfig reads: 44 MB of the 1.5 GB, so that a configuration can be made and checked in a moment.
_CONFIGURABLE = ("*/Kconfig*", "*/scripts", "*/Makefile*", "*/Kbuild*", "*.config")
_MARKS = ("Makefile", "Kbuild", "Kconfig", "scripts/kconfig")


@dataclass(frozen=True)
class Arch:
    """An architecture to build for: ``name`` as uname says it, ``source`` its directory under arch/."""

    name: str
    source: str
    target: str
    prefix: str
    package: str

    @property
    def image(self) -> str:
        """Where make leaves the image, in the object tree."""
        return f"arch/{self.source}/boot/{self.target}"

    @property
    def cross(self) -> str:
        """The prefix of the compilers; "" where the machine's own will do."""
        return "" if platform.machine() == self.name else self.prefix

    @property
    def variables(self) -> tuple[str, ...]:
        """What every make in the tree is given."""
        return (f"ARCH={self.source}", f"CROSS_COMPILE={self.cross}")


_ARCHES = (
    Arch("x86_64", "x86", "bzImage", "x86_64-linux-gnu-", "gcc-x86-64-linux-gnu"),
    Arch("riscv64", "riscv", "Image", "riscv64-linux-gnu-", "gcc-riscv64-linux-gnu"),
)
ARCHES = tuple(one.name for one in _ARCHES)


def arch(name: str | None = None) -> Arch:
    """The architecture of that name, or this machine's; KflexError where we know none."""
    wanted = name or platform.machine()
    for one in _ARCHES:
        if one.name == wanted:
            return one
    raise KflexError("no kernels for this architecture", wanted, f"--arch {' or '.join(ARCHES)}")


@dataclass(frozen=True)
class Tree:
    """A kernel's source. ``key`` stands for its content, ``root`` is enough of it to configure it.

    ``whole(place, log)`` gives all of it: of a package, unpacked at ``place``.
    """

    origin: str
    version: str
    key: str
    root: Path
    whole: Callable[[toolchain.Runner, Path, Path], Path]
    packed: bool


def source_package() -> tuple[str, str]:
    """(name, version) of the kernel source package to use: 6.12's, else the newest the distribution has."""
    names = toolchain.output(["apt-cache", "search", "--names-only", r"^linux-source-[0-9]+\.[0-9.]+$"])
    found = [line.split()[0] for line in names.splitlines() if line.strip()]
    if not found:
        raise Unavailable("no linux-source package is known to apt", "", "run apt-get update first")
    newest = max(found, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    name = PREFERRED if PREFERRED in found else newest
    return name, packages.demand(name)


def unpack(
    package: Path, name: str, out: Path, runner: toolchain.Runner, log: Path, wanted: Sequence[str] = ()
) -> None:
    """The kernel's sources in a package, or the ``wanted`` patterns of them, into ``out``, made here."""
    # The package holds one compressed tar of the whole kernel: only what is wanted is written out.
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=cache.root()) as work:
        runner.run("the package", ["dpkg-deb", "-x", package, work], log)
        archives = list((Path(work) / "usr" / "src").glob(f"{name}*.tar.*"))
        if not archives:
            raise toolchain.BuildError("the kernel source", "the package holds no source archive", log)
        out.mkdir()
        command: list[str | Path] = ["tar", "-x", "-f", archives[0], "-C", out, "--strip-components=1"]
        if wanted:
            command += ["--wildcards", *wanted]
        runner.run("the kernel source", command, log)


def distribution(runner: toolchain.Runner, report: Report = lambda _line: None) -> Tree:
    """The tree of the distribution's source package; what configures it is unpacked into the cache."""
    name, version = source_package()
    key = cache.digest([name, version])

    def part(out: Path) -> None:
        log = toolchain.log_path("kernel-sources", key)
        package = packages.fetch(name, version, runner, log, report)
        report("unpacking what configures the kernel")
        unpack(package, name, out / "linux", runner, log, _CONFIGURABLE)

    def whole(runner: toolchain.Runner, place: Path, log: Path) -> Path:
        package = packages.fetch(name, version, runner, log, report)
        report(f"unpacking {name}")
        unpack(package, name, place, runner, log)
        return place

    place, _ = cache.obtain("sources", cache.digest([key, *_CONFIGURABLE]), part)
    root = place / "linux"
    return Tree(f"{name} {version}", version_of(root), key, root, whole, True)


def directory(path: Path, report: Report = lambda _line: None) -> Tree:
    """The tree at ``path``. KflexError says in one line why it is none, or why it cannot be built from."""
    root = path.expanduser().resolve()
    if not root.is_dir():
        what = "not a directory" if root.exists() else "no such directory"
        raise KflexError(what, str(path), "--source wants the top directory of a kernel tree")
    absent = [mark for mark in _MARKS if not (root / mark).exists()]
    if absent:
        above = next((up for up in root.parents if all((up / mark).exists() for mark in _MARKS)), None)
        fix = f"--source {above}" if above else "--source wants the top directory of a kernel tree"
        raise KflexError(f"not a kernel tree: no {', '.join(absent)}", str(path), fix)
    version = version_of(root)
    # As its own Makefile sees it: what an earlier build left in the tree would be taken for ours.
    left = next((root / name for name in (".config", "include/config") if (root / name).exists()), None)
    left = left or next(root.glob("arch/*/include/generated"), None)
    if left:
        fix = f"make -C {root} mrproper (it deletes its .config and what was built)"
        raise KflexError(f"the tree was built in: {left.relative_to(root)} is there", str(root), fix)
    report(f"reading {root}")
    return Tree(str(root), version, _content(root), root, lambda _runner, _place, _log: root, False)


def version_of(root: Path) -> str:
    """The version as the tree's Makefile has it, e.g. 6.12.117; KflexError where it has none."""
    try:
        text = (root / "Makefile").read_text(errors="replace")[:4096]
    except OSError as error:
        raise KflexError(
            f"cannot read: {error.strerror}", str(root / "Makefile"), "is it a kernel?"
        ) from None
    parts = dict(re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION)[ \t]*=[ \t]*(\S*)", text, re.M))
    if not parts.get("VERSION") or not parts.get("PATCHLEVEL"):
        raise KflexError(
            "not a kernel tree: its Makefile has no VERSION", str(root), "--source wants a kernel tree"
        )
    numbers = [parts[name] for name in ("VERSION", "PATCHLEVEL", "SUBLEVEL") if parts.get(name)]
    return ".".join(numbers) + parts.get("EXTRAVERSION", "")


def _content(root: Path) -> str:
    """A key of all names, modes and contents, as 1.5 GB in 90,000 files are read in seconds."""
    paths: list[Path] = []
    for where, names, leaves in os.walk(root):
        names[:] = sorted(name for name in names if name != ".git")
        paths += [Path(where) / leaf for leaf in sorted(leaves) if leaf != ".git"]

    def of(path: Path) -> str:
        try:
            if path.is_symlink():
                return f"-> {path.readlink()}"
            return f"{os.access(path, os.X_OK)} {cache.file_digest(path)}"
        except OSError as error:
            raise KflexError(f"cannot read: {error.strerror}", str(path), "look at its permissions") from None

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        parts = pool.map(of, paths, chunksize=64)
        relative = (str(path.relative_to(root)) for path in paths)
        return cache.digest(part for pair in zip(relative, parts, strict=True) for part in pair)
