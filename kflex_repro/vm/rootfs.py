"""A guest's root file system from this host's files, made without root: for where the guest cannot be given
the host's own root (virtiofs wants root).

Three ext4 images in the cache, stacked by overlayfs in the guest. They change at different paces: the
packages that the toolkit runs on; the Python that runs us, where it is no package, and its libraries; our
sources and what was built from them. An edit writes a few MB. Paths are the host's. Documentation and
translations are left out; so is, of packages and /etc, whatever not every user may read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import cache, toolchain
from kflex_repro.build.libbpf import newest_built
from kflex_repro.build.objects import source_root
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.vm import ext4

# "packages", bytes done, bytes in all.
Progress = Callable[[str, int, int], None]

# Part of every key: raise it when a change here makes old images wrong.
_FORMAT = "1"
_KIND = "rootfs-{}"
# Images of each kind that are kept: the ones used last.
_KEPT = {"packages": 2, "python": 3, "work": 6}

# What the toolkit and its tests run, besides what Debian calls essential. What is not installed is done
# without, as on the host.
_PACKAGES = (
    "bpftool",
    "bpftrace",
    "clang",
    "e2fsprogs",
    "gcc",
    "iproute2",
    "kmod",
    "libbpf-dev",
    "libbpf1",
    "libc6-dev",
    "linux-perf",
    "linux-tools-common",
    "linux-tools-generic",
    "make",
    "mount",
    "nftables",
    "passwd",
    "procps",
    "python3",
    "redis-server",
    "redis-tools",
    "strace",
    "tzdata",
    "util-linux",
    "xz-utils",
)
# Not of packages, but what programs look for.
_ETC = (
    "/etc/group",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
)
_MOUNT_POINTS = ("/dev", "/mnt", "/proc", "/root", "/run", "/sys", "/tmp", "/var/tmp")
_ALTERNATIVES = "/etc/alternatives"
_LEFT_OUT = re.compile(
    r"/usr/share/(doc|doc-base|man|info|locale|i18n|icons|pixmaps|lintian|bug|bash-completion|zsh|vim|menu|"
    r"applications|perf-core/tests)/|/usr/lib/python3[.\d]*/(test|idlelib|turtledemo)/|/usr/lib/modules/"
)
# Of a Python that is no package: its own tests, what it was built with, and others' packages.
_PYTHON_LEFT_OUT = re.compile(
    r"/lib/python3\.\d+/(test|idlelib|turtledemo|tkinter|lib-dynload/_tkinter\.[^/]*|lib2to3/tests|ensurepip|"
    r"config-[^/]*|site-packages)$|/share$"
)
# Checks of the sources, not of the kernel, and the installer.
_HOST_ONLY = re.compile(
    r"/site-packages/(pip|ruff|mypy|mypyc|[0-9a-f]{20}__mypyc\.[^/]*|mypy-[^/]*)$|/bin/ruff$"
)
_LARGE = 64 << 20


@dataclass(frozen=True)
class _Package:
    name: str
    qualified: str
    version: str
    essential: bool
    needs: tuple[tuple[str, ...], ...]
    provides: tuple[str, ...]


def _names(field: str) -> tuple[str, ...]:
    """``a:any (>= 1) | b`` -> a, b"""
    return tuple(name for one in field.split("|") if (name := re.split(r"[\s(:]", one.strip())[0]))


@functools.cache
def _installed() -> dict[str, _Package]:
    """The installed packages, by name; Unavailable where the distribution has other ones than Debian's."""
    if shutil.which("dpkg-query") is None:
        raise Unavailable(
            "a root file system for the guest is made from Debian's or Ubuntu's packages, which are not here",
            "",
            "run as root: the guest is then given this host's own root (--root virtiofs)",
        )
    fields = "${Package} ${binary:Package} ${Version} ${db:Status-Status} ${Essential}"
    text = toolchain.output(
        ["dpkg-query", "-W", f"-f={fields}\\t${{Pre-Depends}}, ${{Depends}}\\t${{Provides}}\\n"]
    )
    found: dict[str, _Package] = {}
    for line in text.splitlines():
        head, needs, provides = line.split("\t")
        name, qualified, version, status, essential = (*head.split(" "), "")[:5]
        # Of two architectures the host's own has the plain name.
        if status == "installed" and (name not in found or qualified == name):
            groups = tuple(names for group in needs.split(",") if (names := _names(group)))
            offered = tuple(name for one in provides.split(",") for name in _names(one))
            found[name] = _Package(name, qualified, version, essential == "yes", groups, offered)
    return found


def closure(roots: Iterable[str]) -> list[_Package]:
    """The installed ones of ``roots`` and all that they depend on, by name."""
    installed = _installed()
    providers: dict[str, str] = {}
    for package in installed.values():
        for name in package.provides:
            providers.setdefault(name, package.name)
    found: dict[str, _Package] = {}
    pending = list(roots)
    while pending:
        name = pending.pop()
        name = name if name in installed else providers.get(name, "")
        if not name or name in found:
            continue
        found[name] = installed[name]
        for group in installed[name].needs:
            there = (one for one in group if one in installed or one in providers)
            pending += [next(there, "")]
    return sorted(found.values(), key=lambda package: package.name)


def _owners(paths: Iterable[str]) -> dict[str, str]:
    """Which package each path is of; without those that are of none."""
    wanted = {form: path for path in paths for form in _forms(path)}
    if not wanted:
        return {}
    done = subprocess.run(
        ["dpkg-query", "-S", *wanted],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    owners = {}
    for line in done.stdout.splitlines():
        names, _, path = line.rpartition(": ")
        if path in wanted:
            owners[wanted[path]] = re.split(r"[,:]", names)[0]
    return owners


def _forms(path: str) -> tuple[str, ...]:
    """How dpkg may know a path: before /bin and /lib became links into /usr, too."""
    real = os.path.realpath(path)
    merged = real.removeprefix("/usr") if re.match(r"/usr/(s?bin|lib\w*)/", real) else real
    return tuple(dict.fromkeys((path, real, merged)))


def _programs() -> list[str]:
    """The programs that we were told to use or found, and our interpreter."""
    from kflex_repro.redis import server

    tools = (toolchain.find_clang(), toolchain.find_cc(), toolchain.find_bpftool(), toolchain.find_perf())
    found = [tool.path for tool in tools if tool]
    with contextlib.suppress(KflexError):
        found.append(str(server.redis_binary()))
    return [path for one in found if (path := shutil.which(one))]


@dataclass(frozen=True)
class _Base:
    """What the image of the packages is made of."""

    packages: tuple[_Package, ...]
    more: tuple[str, ...]  # programs that are of no package

    @property
    def key(self) -> str:
        own = [f"{package.qualified} {package.version}" for package in self.packages]
        others = [*self.more, *_ETC, _ALTERNATIVES, f"{_ALTERNATIVES}/cc", f"{_ALTERNATIVES}/clang"]
        return cache.digest([_FORMAT, *own, *(_state(path) for path in others)])


def _state(path: str) -> str:
    """By content where it is a file: ldconfig writes the same again and again."""
    try:
        file = Path(path)
        return f"{path} {cache.file_digest(file) if file.is_file() else file.stat().st_mtime_ns}"
    except OSError:
        return f"{path} -"


def _base() -> _Base:
    programs = [*_programs(), os.path.realpath(sys.executable)]
    owners = _owners(programs)
    # python3.11-minimal owns the interpreter, python3.11 has the library.
    owned = {name for one in owners.values() for name in (one, one.removesuffix("-minimal"))}
    essential = {package.name for package in _installed().values() if package.essential}
    more = tuple(path for path in programs[:-1] if path not in owners)
    return _Base(tuple(closure({*_PACKAGES, *essential, *owned})), more)


def _package_files(packages: Sequence[_Package]) -> Iterator[str]:
    text = toolchain.output(["dpkg-query", "-L", *(package.qualified for package in packages)])
    for line in text.splitlines():
        if line.startswith("/"):
            yield line
        elif " to: /" in line:  # a diversion
            yield line.partition(" to: ")[2]


def _base_tree(base: _Base) -> ext4.Tree:
    tree = ext4.Tree(public=True)
    for path in (*_package_files(base.packages), *_MOUNT_POINTS):
        if path != "/." and not _LEFT_OUT.match(f"{path}/"):
            tree.add(path)
    for path in _ETC:
        tree.add(path, follow=True)
    # What is compiled already need not be under emulation.
    for directory in {path.rpartition("/")[0] for path in tree.files() if path.endswith(".py")}:
        if Path(f"{directory}/__pycache__").is_dir():
            tree.add_tree(f"{directory}/__pycache__")
    _add_alternatives(tree)
    for path in base.more:
        tree.add(path, follow=True)
    _add_libraries(tree, base.more)
    return tree


def _add_alternatives(tree: ext4.Tree) -> None:
    """The links that choose among packages (cc, awk …), where they lead to something that is there."""
    for directory in ("/usr/bin", "/usr/sbin", "/usr/lib"):
        with os.scandir(directory) as entries:
            links = [one.path for one in entries if one.is_symlink()]
        for path in links:
            if (
                str(Path(path).readlink()).startswith(_ALTERNATIVES)
                and os.path.realpath(path) in tree.entries
            ):
                tree.add(path, follow=True)


@functools.cache
def _known_libraries() -> dict[str, str]:
    """Where the dynamic linker finds each library."""
    program = shutil.which("ldconfig", path="/usr/sbin:/sbin:/usr/local/sbin")
    text = toolchain.output([program, "-p"]) if program else ""
    found: dict[str, str] = {}
    for name, path in re.findall(r"^\t(\S+) \(libc6,(?:x86-64|AArch64)[^)]*\) => (\S+)$", text, re.M):
        found.setdefault(name, path)
    return found


def _needed(path: str) -> list[str]:
    """The libraries that a program or a library names; none where it is something else."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    try:
        with Path(path).open("rb") as stream:
            if stream.read(4) != b"\x7fELF":
                return []
            dynamic = ELFFile(stream).get_section_by_name(".dynamic")
            if not isinstance(dynamic, DynamicSection):
                return []
            return [str(tag.needed) for tag in dynamic.iter_tags("DT_NEEDED")]  # type: ignore[attr-defined]
    except (OSError, ELFError):
        return []


def _add_libraries(tree: ext4.Tree, files: Iterable[str]) -> None:
    """The host's libraries that ``files`` need and the tree does not have."""
    known = _known_libraries()
    there = {path.rpartition("/")[2] for path in tree.entries}
    pending = list(files)
    while pending:
        for name in _needed(pending.pop()):
            if name not in there and name in known:
                there.add(name)
                if tree.add(known[name], follow=True):
                    pending.append(known[name])


# --- Python -----------------------------------------------------------------------------------------------


def _python_tops() -> list[str]:
    """Directories of this Python and of the packages it sees, that are of no Debian package."""
    tops = [sys.prefix] if sys.prefix != sys.base_prefix else []
    real = os.path.realpath(sys.executable)
    if not _owners([real]):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        if sys.base_prefix in ("/usr", "/usr/local"):
            # Others' things are there, too.
            tops += [f"{sys.base_prefix}/lib/{version}"]
        else:
            tops += [sys.base_prefix]
    sites = [*site.getsitepackages(), site.getusersitepackages()]
    seen = {os.path.realpath(path) for path in sys.path}
    tops += [
        path for path in sites if os.path.realpath(path) in seen and path != "/usr/lib/python3/dist-packages"
    ]
    return [top for top in dict.fromkeys(tops) if Path(top).is_dir()]


def _python_tree() -> ext4.Tree:
    tree = ext4.Tree()
    seen = {os.path.realpath(path) for path in sys.path}

    def skip(path: str) -> bool:
        if _HOST_ONLY.search(path):
            return True
        return (
            bool(_PYTHON_LEFT_OUT.search(path)) and path not in seen and not path.startswith(sys.prefix + "/")
        )

    for top in _python_tops():
        tree.add_tree(top, skip)
    tree.add(sys.executable, follow=True)
    return tree


def _python_key(tree: ext4.Tree) -> str:
    """Of the files' sizes and times, without what Python compiles as it goes."""
    states = [
        f"{path} {tree.entries[path].st_size} {tree.entries[path].st_mtime_ns}"
        for path in sorted(tree.files())
        if "/__pycache__/" not in path
    ]
    return cache.digest([_FORMAT, *states])


# --- the sources and what was built -----------------------------------------------------------------------


def _work_tree(entries: Sequence[Path]) -> ext4.Tree:
    tree = ext4.Tree()
    root = str(source_root())
    own = {os.path.realpath(sys.prefix), str(cache.root())}

    def skip(path: str) -> bool:
        directory, _, name = path.rpartition("/")
        if path in own or (name.startswith(".") and name not in (".ci", ".gitignore", ".clang-format")):
            return True
        if directory == root and (name in ("results", "build") or name.endswith(".egg-info")):
            return True
        file = Path(path)
        return file.is_file() and file.stat().st_size > _LARGE

    tree.add_tree(root, skip)
    # This package, where KFLEX_SOURCE names other sources.
    tree.add_tree(str(Path(__file__).resolve().parents[1]), skip)
    if built := newest_built():
        tree.add_tree(str(built))
    if chosen := os.environ.get("KFLEX_LIBBPF"):
        tree.add(chosen, follow=True)
    for path in entries:
        tree.add_tree(str(path)) if path.is_dir() else tree.add(str(path), follow=True)
    return tree


def _work_key(tree: ext4.Tree) -> str:
    parts: list[str | bytes] = [_FORMAT]
    for path in sorted(tree.entries):
        if "/__pycache__" not in path:
            parts.append(f"{path} {tree.entries[path].st_mode:o}")
    for path in sorted(tree.files()):
        if "/__pycache__" not in path:
            parts.append(cache.file_digest(Path(path)))
    return cache.digest(parts)


# --- images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    name: str
    key: str
    tree: Callable[[], ext4.Tree]

    @property
    def kind(self) -> str:
        return _KIND.format(self.name)

    @property
    def there(self) -> bool:
        """Whether it was made; whether it is whole is for the cache to say."""
        return (cache.root() / self.kind / self.key).is_dir()

    def image(self, progress: Progress) -> Path:
        """The image, made now if it is not in the cache."""

        def build(out: Path) -> None:
            tree = self.tree()
            ext4.write(out / f"{self.name}.ext4", tree, lambda done, total: progress(self.name, done, total))

        place, built = cache.obtain(self.kind, self.key, build)
        # The time of use: what was used longest ago goes first.
        os.utime(place)
        if built:
            _prune(place.parent, _KEPT[self.name])
        return place / f"{self.name}.ext4"


def _prune(kind: Path, keep: int) -> None:
    """Remove all but the newest entries. A guest that has one open keeps it until it ends."""
    used = sorted(kind.glob("[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in used[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def quiet(_name: str, _done: int, _total: int) -> None:
    """No progress."""


def images(entries: Sequence[Path] = (), progress: Progress = quiet) -> tuple[Path, ...]:
    """The images for a guest, uppermost first, as overlayfs takes its lower directories.

    ``entries`` are files and directories to take along besides the sources: those of the cache that the guest
    needs, and what a command works on. KflexError in one line where there is no space or no tool.
    """
    base, python, work = _base(), _python_tree(), _work_tree(entries)

    @functools.cache
    def with_libraries() -> ext4.Tree:
        _add_libraries(python, list(python.files()))
        return python

    layers = (
        _Layer("work", _work_key(work), lambda: work),
        _Layer("python", _python_key(python), with_libraries),
        _Layer("packages", base.key, functools.cache(lambda: _base_tree(base))),
    )
    missing = sum(ext4.size(layer.tree()) for layer in layers if not layer.there)
    ext4.check_space(cache.root(), missing, "the guest's root")
    return tuple(layer.image(progress) for layer in layers)
