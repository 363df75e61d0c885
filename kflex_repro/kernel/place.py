"""Where a system keeps kernels: its root, which may be a tree of another one, its layout, its tools.

Nothing in a tree leads out of it: links are followed as the tree's own system would follow them.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kflex_repro.errors import KflexError

_BINARIES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin")
_ENVIRONMENT = {"PATH": ":".join(_BINARIES), "LC_ALL": "C", "HOME": "/root", "TERM": "dumb"}
_LINKS = 40
# In a mount namespace of their own, which goes with the program. Without it, what goes to /dev/null would be
# a file of the tree, and what comes from there an error.
_DEVICES = """
[ -c "$1/null" ] || {
    mount -t tmpfs -o mode=755 dev "$1"
    for name in null zero full random urandom; do : >"$1/$name"; mount --bind "/dev/$name" "$1/$name"; done
    ln -s /proc/self/fd "$1/fd"
}
mount -t proc proc "$2"
shift 2
exec "$@"
"""
_TOOL_S = 900.0


@dataclass(frozen=True)
class Root:
    """A system's root directory; ``/`` is the running one."""

    path: Path

    @property
    def is_host(self) -> bool:
        """Whether it is this machine's own, by whatever name."""
        return self.path.samefile("/")

    def real(self, name: str, follow: bool = True) -> Path:
        """The path outside for an absolute one inside; links count from the root, and none leads out of it.

        ``follow=False`` leaves the last component as it is. KflexError for a loop.
        """
        todo = [part for part in PurePosixPath(name).parts if part != "/"][::-1]
        here: list[str] = []
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                here = here[:-1]
                continue
            place = self.path.joinpath(*here, part)
            if (todo or follow) and place.is_symlink():
                links += 1
                if links > _LINKS:
                    raise KflexError("a loop of symbolic links", str(self.path.joinpath(*here, part)))
                target = PurePosixPath(place.readlink())
                if target.is_absolute():
                    here = []
                todo += [step for step in target.parts if step != "/"][::-1]
                continue
            here.append(part)
        return self.path.joinpath(*here)

    def exists(self, name: str) -> bool:
        """Whether the system has this file, directory or link."""
        return os.path.lexists(self.real(name, follow=False))

    def text(self, name: str) -> str:
        """A file's text; empty where it cannot be read."""
        try:
            return self.real(name).read_text(errors="replace")
        except OSError:
            return ""

    def names(self, name: str) -> list[str]:
        """What a directory holds, sorted; nothing where it is none."""
        try:
            return sorted(os.listdir(self.real(name)))  # noqa: PTH208  (names, not paths)
        except OSError:
            return []

    def program(self, *names: str) -> str | None:
        """The first of these programs that the system has, as a path inside."""
        for name in names:
            for directory in _BINARIES:
                path = f"{directory}/{name}"
                if os.access(self.real(path), os.X_OK) and stat.S_ISREG(self.real(path).stat().st_mode):
                    return path
        return None

    @property
    def runs(self) -> bool:
        """Whether its programs can be started: its own system, or a chroot by root."""
        return self.is_host or os.geteuid() == 0

    def run(self, command: Sequence[str]) -> str:
        """Run one of its programs in it, and only in it. KflexError with the last line it said."""
        argv = [*self._into(), *command]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_ENVIRONMENT,
                check=False,
                timeout=_TOOL_S,
                # It holds the lock (record.Store), too: if we are killed, until it ends.
                close_fds=False,
                cwd="/",
            )
        except subprocess.TimeoutExpired:
            raise KflexError(f"{command[0]} did not end in {_TOOL_S:.0f} s", str(self.path)) from None
        except OSError as error:
            raise KflexError(f"cannot run {command[0]}, {error.strerror}", str(self.path)) from None
        output = done.stdout.decode(errors="replace")
        if done.returncode:
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "it said nothing")
            hint = "" if self.is_host else "--defer leaves the tree's programs to be run later"
            where = " ".join(command) + ("" if self.is_host else f" in {self.path}")
            raise KflexError(f"{command[0]} failed with {done.returncode}, {last.strip()}", where, hint)
        return output

    def _into(self) -> list[str]:
        """What starts a program in the system; a bare tree gets /proc and a few devices, none of a disk."""
        if self.is_host:
            return []
        enter = [_tool("chroot"), str(self.path)]
        if self.exists("/dev/null") and self.exists("/proc/self"):
            return enter
        places = [str(self.real(name)) for name in ("/dev", "/proc")]
        return [
            *(_tool("unshare"), "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"),
            *("sh", "-ec", _DEVICES, "sh", *places, *enter),
        ]

    def shown(self, command: Sequence[str]) -> str:
        """A command as a person would type it."""
        return " ".join(command) if self.is_host else f"chroot {self.path} {' '.join(command)}"


def _tool(name: str) -> str:
    return shutil.which(name, path=_ENVIRONMENT["PATH"]) or name


def open_root(path: Path) -> Root:
    """The system at ``path``. KflexError where there is none."""
    if not path.is_dir():
        raise KflexError("there is no such directory", str(path), "--root names the root of a system's tree")
    root = Root(path.resolve())
    if not root.real("/boot").is_dir():
        raise KflexError("there is no boot directory", str(root.real("/boot")), "is it mounted?")
    return root


def require_boot(root: Root) -> None:
    """KflexError where /boot is a file system that is not mounted: what is written would be hidden later."""
    lines = (line.split() for line in root.text("/etc/fstab").splitlines())
    listed = any(len(line) > 1 and line[0][0] != "#" and line[1] == "/boot" for line in lines)
    if root.is_host and listed and not root.real("/boot").is_mount():
        raise KflexError("/etc/fstab has a file system for /boot, and it is not mounted", "", "mount /boot")


# -- layouts


@dataclass(frozen=True)
class Layout:
    """How a distribution names the files and makes its menu.

    ``entries``: boot entries are files in /boot/loader/entries; else grub's configuration lists them.
    ``config`` is that configuration (None: there is no grub), ``environment`` grub's variables.
    """

    name: str
    initrd: str
    entries: bool
    config: str | None
    environment: str
    mkconfig: str

    def image_path(self, release: str) -> str:
        return f"/boot/vmlinuz-{release}"

    def initrd_path(self, release: str) -> str:
        return f"/boot/{self.initrd.format(release)}"


def _identity(root: Root) -> set[str]:
    words: set[str] = set()
    for line in (root.text("/etc/os-release") or root.text("/usr/lib/os-release")).splitlines():
        name, _, value = line.partition("=")
        if name in ("ID", "ID_LIKE"):
            words.update(value.strip().strip("\"'").lower().split())
    return words


def _config(root: Root, family: str) -> str | None:
    """grub's main configuration; on EFI it may be on the EFI partition."""
    places = ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"]
    if family != "debian":
        places.reverse()
        efi = "/boot/efi/EFI"
        # A machine that was started without EFI does not read what may be there.
        names = [] if root.is_host and not Path("/sys/firmware/efi").exists() else root.names(efi)
        places = [
            f"{efi}/{name}/grub.cfg" for name in names if name.lower() not in ("boot", "microsoft")
        ] + places
    for path in places:
        # A short file on the EFI partition only leads on to the real one.
        if root.exists(path) and ("/EFI/" not in path or "menuentry" in root.text(path)):
            return path
    for directory in ("grub", "grub2"):
        if root.real(f"/boot/{directory}").is_dir():
            return f"/boot/{directory}/grub.cfg"
    return None


def layout(root: Root) -> Layout:
    """What the tree looks like, by what is in it; its name is only asked where that decides nothing."""
    words = _identity(root)
    names = root.names("/boot")
    if root.exists("/etc/debian_version") or words & {"debian", "ubuntu"}:
        family = "debian"
    elif words & {"openeuler"}:
        family = "openeuler"
    elif words & {"fedora", "rhel", "centos"}:
        family = "fedora"
    elif any(name.startswith("initrd.img-") for name in names):
        family = "debian"
    elif any(name.startswith("initramfs-") for name in names) or root.program("dracut"):
        family = "fedora"
    else:
        family = "debian"
    config = _config(root, family)
    has_entries = root.real("/boot/loader/entries").is_dir()
    grub2 = config is not None and "/grub/" not in config
    return Layout(
        name=family,
        initrd="initrd.img-{}" if family == "debian" else "initramfs-{}.img",
        entries="blscfg" in root.text(config) if config else has_entries,
        config=config,
        environment=(str(PurePosixPath(config).parent) if config else "/boot/grub") + "/grubenv",
        mkconfig="grub2-mkconfig" if grub2 or family != "debian" else "grub-mkconfig",
    )


def file_system(path: Path) -> tuple[str, str]:
    """(type, source) of the mounted file system that holds a path; ("", "") where mountinfo has none."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "", ""
    found = ("", "")
    for line in lines:
        left, _, right = line.partition(" - ")
        major, _, minor = left.split()[2].partition(":")
        if os.makedev(int(major), int(minor)) == device:
            found = (right.split()[0], right.split()[1])
    return found


def free(path: Path) -> int:
    """Bytes that may still be written where ``path`` is or will be."""
    while not path.exists():
        path = path.parent
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def block(path: Path) -> int:
    """The unit, in bytes, in which the file system of ``path`` gives space to files."""
    while not path.exists():
        path = path.parent
    return max(os.statvfs(path).f_bsize, 512)
