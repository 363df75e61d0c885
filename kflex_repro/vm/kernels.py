"""Kernels to boot: the distribution's, unpacked from their packages into the cache, or the user's own.

Nothing is installed. What is in a bzImage's header: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import cache, packages, toolchain
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.kernel.image import read
from kflex_repro.vm import busybox

STOCK = "stock"
# The long-term series that "stock" is, where the distribution has it; its newest otherwise.
PREFERRED = "6.12"
# In the order of preference: the cloud kernel has what a guest needs built in, and is a third of the size.
_FLAVOURS = ("cloud-amd64", "amd64", "generic")
_SERIES = re.compile(r"\d+\.\d+")
_KIND = "vm-kernel"
_BUILT_KIND = "kernel"
_FORMAT = "1"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted; ``modules`` is its lib/modules/RELEASE, None where it has none."""

    name: str
    release: str
    image: Path
    modules: Path | None
    origin: str

    @property
    def key(self) -> str:
        """What identifies its content."""
        return cache.digest([self.release, cache.file_digest(self.image), str(self.modules or "")])


def release_of(path: Path) -> str:
    """The release that an x86-64 bzImage says it is; KflexError for what is none."""
    found = read(path)
    if found.arch != "x86_64":
        raise KflexError(f"a kernel for {found.arch}, guests are x86-64", str(path), "name an x86-64 bzImage")
    if found.release is None:
        raise KflexError("the kernel image does not say its release", str(path), "name a bzImage")
    return found.release


def find(spec: str = STOCK, report: Report = lambda _line: None) -> Kernel:
    """The kernel of a ``spec``: ``stock``; a series as 6.1; a bzImage; a .deb; a directory.

    A directory is a kernel's build tree, an unpacked package, or what ``build --kernel`` made.
    """
    if platform.machine() != "x86_64":
        raise Unavailable(f"no VM for {platform.machine()} yet", "", "use an x86-64 machine")
    if spec == STOCK:
        return _of_distribution(_stock_series(), report)
    if _SERIES.fullmatch(spec):
        return _of_distribution(spec, report)
    path = Path(spec)
    if path.is_dir():
        return _of_directory(path.resolve(), path.name)
    if not path.exists():
        fix = "stock, a series as 6.12, or the path of a bzImage, a package or a build tree"
        raise KflexError("no such kernel", spec, fix)
    if path.suffix == ".deb":
        place = _unpacked([path.resolve()], path.stem)
        return _of_directory(place, path.stem, f"{path.name}")
    return Kernel(path.name, release_of(path), path.resolve(), None, str(path))


def at_hand() -> tuple[str, ...]:
    """Specs of all kernels that can be had here: the distribution's series, then those built."""
    built = sorted((cache.root() / _BUILT_KIND).glob("[!.]*"), key=lambda path: path.stat().st_mtime)
    return (*sorted(_series(), key=_numbers), *(str(path) for path in built if cache.intact(path)))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


@functools.cache
def _offered() -> tuple[str, ...]:
    """Packages of kernel images and modules that apt knows; asked once, as it takes half a second."""
    out = toolchain.output(["apt-cache", "search", "--names-only", r"^linux-(image|modules)-[0-9]"])
    return tuple(line.split()[0] for line in out.splitlines() if line.strip())


def _packages() -> list[str]:
    """Kernel image packages of the best flavour that apt knows."""
    names = _offered()
    for flavour in _FLAVOURS:
        # Not the meta-packages: they have a series, but no release.
        shape = re.compile(rf"linux-image-\d+\.\d+\.\d\S*-{flavour}")
        if found := [name for name in names if shape.fullmatch(name)]:
            return sorted(found, key=_numbers)
    raise Unavailable("no kernel package is known to apt", "", "run apt-get update first")


def _series() -> set[str]:
    return {match.group(1) for name in _packages() if (match := re.match(r"linux-image-(\d+\.\d+)\.", name))}


def _stock_series() -> str:
    series = _series()
    return PREFERRED if PREFERRED in series else max(series, key=_numbers)


def _of_distribution(series: str, report: Report) -> Kernel:
    """The newest kernel of a series, with its modules (Ubuntu has them in a package of their own)."""
    found = [name for name in _packages() if name.startswith(f"linux-image-{series}.")]
    if not found:
        known = ", ".join(sorted(_series(), key=_numbers))
        raise Unavailable(
            f"the distribution has no kernel {series}", f"it has: {known}", "choose one of them"
        )
    image = found[-1]
    names = [image]
    modules = image.replace("linux-image-", "linux-modules-")
    if modules in _offered():
        names.append(modules)
    runner = toolchain.Runner()
    try:
        log = toolchain.log_path("vm-kernel", cache.digest([image]))
        files = [packages.fetch(name, packages.demand(name), runner, log, report) for name in names]
        place = _unpacked(files, image)
    except BaseException:
        runner.stop()
        raise
    return _of_directory(place, series, image)


def _unpacked(files: list[Path], name: str) -> Path:
    """The boot/ and lib/modules/ of packages, modules decompressed and indexed, as a cache entry."""
    key = cache.digest([_FORMAT, *(cache.file_digest(file) for file in files)])
    log = toolchain.log_path("vm-kernel-unpack", key)

    def unpack(out: Path) -> None:
        runner = toolchain.Runner()
        for file in files:
            runner.run(f"the package {name}", ["dpkg-deb", "-x", file, out], log)
        if not (out / "lib").exists() and (out / "usr" / "lib" / "modules").is_dir():
            (out / "usr" / "lib").rename(out / "lib")
        for place in (out / "lib" / "modules").glob("*"):
            _plain(place, runner, log)
            index(out, place.name)

    place, _ = cache.obtain(_KIND, key, unpack)
    return place


def _plain(modules: Path, runner: toolchain.Runner, log: Path) -> None:
    """Decompress modules: what loads them in the guest, busybox, then needs no more than read them."""
    for suffix, command in (
        (".xz", ["xz", "-d"]),
        (".zst", ["zstd", "-d", "-q", "--rm"]),
        (".gz", ["gzip", "-d"]),
    ):
        files = sorted(modules.rglob(f"*.ko{suffix}"))
        for at in range(0, len(files), 256):
            runner.run("the kernel's modules", [*command, *files[at : at + 256]], log)


def index(root: Path, release: str) -> None:
    """Write modules.dep and its companions, as depmod does."""
    with contextlib.suppress(OSError):
        done = subprocess.run(
            [busybox.path(), "depmod", "-b", str(root), release], check=False, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
    raise KflexError("the kernel's modules cannot be indexed", str(root), "apt install busybox-static")


def _of_directory(path: Path, name: str, origin: str = "") -> Kernel:
    """A kernel in a directory of one of the three shapes."""
    for pattern in ("image", "arch/x86/boot/bzImage", "boot/vmlinuz-*", "vmlinuz-*", "bzImage"):
        if found := sorted(path.glob(pattern)):
            image = found[-1]
            break
    else:
        fix = "a build tree, an unpacked package, or what kflex-repro build --kernel made"
        raise KflexError("no kernel image in the directory", str(path), fix)
    release = release_of(image)
    for place in ("modules/lib/modules", "lib/modules", "usr/lib/modules"):
        if (path / place / release / "modules.dep").exists():
            return Kernel(name, release, image, path / place / release, origin or str(path))
    return Kernel(name, release, image, None, origin or str(path))
