"""A KFlex source tree as its user has it: is it one, what is not there, and what in it the build depends on.

Nothing here writes into it.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import cache
from kflex_repro.errors import KflexError

HEAP_HEADER = "bpf/include/ffkx_heap.bpf.h"
MAIN = "src/Main.cpp"
# What makes a directory KFlex's tree and no other one's.
_MARKS = (HEAP_HEADER, MAIN, "CMakeLists.txt", "bpf/Makefile")
_KERNEL = "linux"
_KERNEL_URL = "https://github.com/rs3lab/KFlex-linux"
_KERNEL_MARKS = ("kernel/bpf/heap.c", "Kbuild")
# Parts of the tree the build needs, and that a clone can lack: (file, part to bring back, what it is for).
_PARTS = (
    ("libbpf/src/Makefile", "libbpf", "KFlex's own libbpf, which knows the heap"),
    ("libbpf/src/libbpf.c", "libbpf", "KFlex's own libbpf, which knows the heap"),
    # Its Makefile would write one of the running kernel, which does not know the heap.
    ("bpf/vmlinux.h", "bpf/vmlinux.h", "the types of KFlex's kernel"),
)
# Not copied: history, the kernel (1.5 GB, not part of this build), states and outputs of earlier builds.
_STATE = ".kflex-repro"
_LEFT_OUT = frozenset({".git", ".build", _STATE, _KERNEL})
_OUTPUTS = frozenset({"ffkx", "ffkx-test", "ffkx-bench", "compile_commands.json"})
_OUTPUT_SUFFIXES = (".bpf.o", ".skel.h")


@dataclass(frozen=True)
class Lacking:
    """A part of the tree that is not there: what it is for, and the one command that brings it."""

    path: str
    purpose: str
    fix: str
    required: bool


@dataclass(frozen=True)
class Source:
    """A KFlex source tree."""

    root: Path
    lacking: tuple[Lacking, ...]

    @property
    def bpftool(self) -> Path | None:
        """The bpftool that lies in the tree, if it can be run."""
        path = self.root / "bpftool"
        return path if path.is_file() and os.access(path, os.X_OK) else None

    def cmake(self, whole: bool = True) -> str:
        """What its CMake files say, in lower case, without comments; ``whole``: also the tests' ones."""
        parts = (".", "src", *(("tests", "bench") if whole else ()))
        text = ""
        for part in parts:
            with contextlib.suppress(OSError):
                text += (self.root / part / "CMakeLists.txt").read_text(errors="replace") + "\n"
        return re.sub(r"#.*", "", text).lower()


def find(directory: Path | None) -> Source:
    """The tree at ``directory``. KflexError says in one line why it is none, or which part to fetch."""
    if directory is None:
        raise KflexError("no KFlex source tree was given", "", "--source DIR, where DIR is a clone of KFlex")
    root = directory.expanduser().resolve()
    if not root.exists():
        raise KflexError("no such directory", str(directory), "--source wants the directory of a KFlex clone")
    if not root.is_dir():
        raise KflexError("not a directory", str(directory), "--source wants the directory of a KFlex clone")
    absent = [mark for mark in _MARKS if not (root / mark).is_file()]
    if absent:
        raise KflexError(f"not a KFlex source tree: no {', '.join(absent)}", str(directory), _hint(root))
    return Source(root, (*_submodules(root), *_parts(root)))


def kernel(directory: Path | None) -> Path:
    """The tree of KFlex's kernel: in the KFlex tree at ``directory``, or that directory itself.

    KflexError says what to get, and where it goes.
    """
    if directory and all((directory.expanduser() / mark).exists() for mark in _KERNEL_MARKS):
        return directory.expanduser().resolve()
    root = find(directory).root
    place = root / _KERNEL
    if (place / "Makefile").is_file():
        return place
    fetch = f"git clone --depth 1 {_KERNEL_URL} {place}"
    if any(part.path == _KERNEL for part in _submodules(root)) and (root / ".git").exists():
        fetch = f"git -C {root} submodule update --init --depth 1 {_KERNEL}"
    raise KflexError("KFlex's kernel is not there", str(place), fetch)


def _is_tree(path: Path) -> bool:
    return all((path / mark).is_file() for mark in _MARKS)


def _hint(root: Path) -> str:
    if all((root / mark).exists() for mark in _KERNEL_MARKS):
        return "this is KFlex's kernel; --source wants the tree with bpf/ and src/"
    above = next((path for path in root.parents if _is_tree(path)), None)
    if above:
        return f"--source {above}"
    try:
        below = next((path for path in sorted(root.iterdir()) if path.is_dir() and _is_tree(path)), None)
    except OSError:
        below = None
    return f"--source {below}" if below else "--source wants the top directory of a KFlex clone"


def _submodules(root: Path) -> list[Lacking]:
    """Empty submodules, as .gitmodules names them."""
    try:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.read_string((root / ".gitmodules").read_text(errors="replace"))
    except (OSError, configparser.Error):
        return []
    found = []
    for section in parser.sections():
        path = parser.get(section, "path", fallback="")
        if not path or any((root / path).glob("*")):
            continue
        kernel = path == _KERNEL
        fix = f"git -C {root} submodule update --init --depth 1 {path}"
        purpose = "KFlex's kernel: to run, not to build" if kernel else "a submodule"
        found.append(Lacking(path, purpose, fix, not kernel))
    return found


def _parts(root: Path) -> list[Lacking]:
    found: dict[str, Lacking] = {}
    for file, part, purpose in _PARTS:
        if not (root / file).is_file():
            fix = f"git -C {root} checkout HEAD -- {part}"
            found.setdefault(part, Lacking(file, purpose, fix, True))
    return list(found.values())


def _wanted(relative: Path) -> bool:
    if relative.parts[0] in _LEFT_OUT or (len(relative.parts) == 1 and relative.name in _OUTPUTS):
        return False
    return not relative.name.endswith(_OUTPUT_SUFFIXES)


def files(root: Path) -> dict[str, Path]:
    """The files a build depends on, by relative name; links to files are followed, other things are left."""
    found: dict[str, Path] = {}
    for directory, names, leaves in os.walk(root):
        here = Path(directory)
        names[:] = sorted(name for name in names if _wanted((here / name).relative_to(root)))
        for leaf in sorted(leaves):
            path = here / leaf
            relative = path.relative_to(root)
            if _wanted(relative) and path.is_file():
                found[relative.as_posix()] = path
    return found


def content(root: Path, *under: str) -> list[str]:
    """Names, modes and hashes of the files below ``under`` (all, if none is given): parts of a key."""
    parts: list[str] = []
    for name, path in files(root).items():
        if under and not any(name == part or name.startswith(f"{part}/") for part in under):
            continue
        try:
            executable = bool(path.stat().st_mode & stat.S_IXUSR)
            parts += [name, "x" if executable else "-", cache.file_digest(path)]
        except OSError as error:
            raise KflexError(f"cannot read: {error.strerror}", str(path), "look at its permissions") from None
    return parts


def copy(root: Path, out: Path) -> None:
    """A copy of the tree's files, writable by us whatever their mode; times are kept for make.

    What our recipes keep in the tree comes along: the copy must know which it has.
    """
    if (root / _STATE).is_dir():
        shutil.copytree(root / _STATE, out / _STATE, copy_function=shutil.copyfile)
    for name, path in files(root).items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            data, status = path.read_bytes(), path.stat()
        except OSError as error:
            raise KflexError(f"cannot read: {error.strerror}", str(path), "look at its permissions") from None
        target.write_bytes(data)
        target.chmod(0o755 if status.st_mode & stat.S_IXUSR else 0o644)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
