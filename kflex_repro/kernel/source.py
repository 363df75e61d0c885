"""What is to be installed: a build tree, a built kernel's directory, an unpacked package, or an image."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.kernel import image
from kflex_repro.kernel.image import Image

# Where a build leaves what a boot loader takes, for the architectures that have one name for it.
_BUILT = (
    "arch/x86/boot/bzImage",
    "arch/riscv/boot/Image",
    "arch/riscv/boot/Image.gz",
    "arch/arm64/boot/Image",
    "arch/arm64/boot/Image.gz",
    "arch/loongarch/boot/vmlinuz.efi",
)
# Links into a build tree that the installed system need not have.
LINKS = ("build", "source")


@dataclass(frozen=True)
class Source:
    """``modules`` is the directory named after the release; ``build`` the tree that makes it."""

    origin: Path
    release: str
    image: Image
    system_map: Path | None
    config: Path | None
    modules: Path | None
    build: Path | None

    def modules_size(self, block: int) -> int:
        """Bytes that the modules take at most on a file system with these blocks."""
        files = module_files(self.modules) if self.modules else ordered(self.build) if self.build else ()
        return sum(-(-size // block) * block for _path, size in files)


def module_files(directory: Path) -> Iterator[tuple[Path, int]]:
    """Files and directories below, with their size in bytes."""
    for place, directories, names in os.walk(directory):
        for name in (*names, *directories):
            path = Path(place, name)
            info = path.lstat()
            yield path, info.st_size if stat.S_ISREG(info.st_mode) else 4096


def ordered(tree: Path) -> Iterator[tuple[Path, int]]:
    """The modules that a build tree has, unstripped; KflexError where one was not built."""
    order = tree / "modules.order"
    for line in order.read_text().splitlines() if order.is_file() else ():
        path = tree / (line.removesuffix(".o") + ".ko" if line.endswith(".o") else line)
        if not path.is_file():
            raise KflexError("a module of the build tree is not there", str(path), "run make modules in it")
        yield path, path.stat().st_size


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KflexError("cannot read the kernel's release", str(path), str(error)) from None


def _modules_below(directory: Path, release: str | None) -> Path | None:
    """The modules in what --modules or a package gives; KflexError where they are of another kernel."""
    below = directory / "lib/modules"
    if not below.is_dir():
        below = directory / "usr/lib/modules"
    if below.is_dir():
        found = sorted(path for path in below.iterdir() if path.is_dir())
        named = [path for path in found if release is None or path.name == release]
        if found and not named:
            raise KflexError(
                f"the modules are of {', '.join(path.name for path in found)}, the kernel is {release}",
                str(below),
            )
        return named[0] if len(named) == 1 else None
    return directory if (directory / "modules.order").exists() or (directory / "kernel").is_dir() else None


def _tree(path: Path) -> Source | None:
    if not (path / "Makefile").is_file() or not (
        (path / "include/config").is_dir() or (path / "Kconfig").is_file()
    ):
        return None
    built = _first(*(path / name for name in _BUILT))
    said = path / "include/config/kernel.release"
    if built is None or not said.is_file():
        raise KflexError(
            "the kernel tree is not built", str(path), "`kflex-repro build --kernel --source` builds it"
        )
    release = _text(said)
    has_modules = any(True for _ in ordered(path))
    return Source(
        path,
        release,
        image.read(built),
        _first(path / "System.map"),
        _first(path / ".config"),
        None,
        path if has_modules else None,
    )


def _directory(path: Path) -> Source | None:
    if (path / "image").is_file():
        release = _text(path / "release") if (path / "release").is_file() else None
        read = image.read(path / "image")
        return Source(
            path,
            release or read.release or "",
            read,
            _first(path / "System.map"),
            _first(path / "config"),
            _modules_below(path / "modules", release or read.release),
            None,
        )
    boot = path / "boot"
    kernels = sorted(boot.glob("vmlinuz-*"))
    if len(kernels) > 1:
        raise KflexError(
            f"more than one kernel: {', '.join(item.name for item in kernels)}", str(boot), "give one of them"
        )
    if not kernels:
        return None
    release = kernels[0].name.removeprefix("vmlinuz-")
    return Source(
        path,
        release,
        image.read(kernels[0]),
        _first(boot / f"System.map-{release}"),
        _first(boot / f"config-{release}"),
        _modules_below(path, release),
        None,
    )


def _image(path: Path, modules: Path | None) -> Source:
    read = image.read(path)
    release = read.release
    if modules is not None:
        below = _modules_below(modules, release)
        if below is None:
            raise KflexError("no kernel modules there", str(modules), "a directory with lib/modules/RELEASE")
        if release is None:
            release = below.resolve().name
        return Source(path, release, read, None, _first(below / "config"), below, None)
    return Source(path, release or "", read, None, None, None, None)


def find(path: Path, modules: Path | None = None) -> Source:
    """Look at SRC (and --modules). KflexError where it is nothing to install, or its parts do not agree."""
    if not path.exists():
        raise KflexError("there is no such file or directory", str(path), "give a build tree, or a bzImage")
    path = path.resolve()
    if path.is_dir():
        if modules is not None:
            raise KflexError("a directory brings its own modules", str(path), "leave --modules out")
        found = _tree(path) or _directory(path)
        if found is None:
            raise KflexError(
                "no kernel there",
                str(path),
                "give a built tree, an entry of `build --kernel`, or an unpacked package",
            )
    else:
        found = _image(path, modules)
    if not found.release:
        raise KflexError("the image does not say its release", str(path), "give --modules, or the build tree")
    if not image.RELEASE.fullmatch(found.release):
        raise KflexError(f"{found.release[:70]!r} is not a release that files can be named after", str(path))
    if found.image.release not in (None, found.release):
        raise KflexError(
            f"the image is {found.image.release}, the directory says {found.release}",
            str(path),
            "build them together",
        )
    if found.modules is not None and found.modules.resolve().name != found.release:
        raise KflexError(f"the modules are of {found.modules.name}, the kernel is {found.release}", str(path))
    return found
