"""What an installation does, before anything is done: files, commands, space, and every reason not to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kflex_repro.diagnose.events import size_text
from kflex_repro.errors import KflexError
from kflex_repro.kernel import image, inventory
from kflex_repro.kernel.place import Layout, Root, block, file_system, free, layout, require_boot
from kflex_repro.kernel.record import Store
from kflex_repro.kernel.source import Source

_ENTRIES = "/boot/loader/entries"
# Where the system has no initramfs yet to judge by; dracut's and initramfs-tools' are 20 to 60 MB.
_INITRAMFS = 64 << 20
_SLACK = 1 << 20


@dataclass(frozen=True)
class Copy:
    """A file for /boot; size in bytes."""

    source: Path
    target: str
    size: int


@dataclass(frozen=True)
class Space:
    """What a file system must hold, and what it has, in bytes."""

    place: str
    needed: int
    free: int
    parts: tuple[tuple[str, int], ...]

    @property
    def is_enough(self) -> bool:
        return self.needed <= self.free


@dataclass(frozen=True)
class Plan:
    """``initramfs``, ``menu``: commands of the system (None: not run). ``entry``: a boot entry's path, text.

    ``left``: what has to be run by hand, one line each. ``notes``: what one should know.
    """

    root: Root
    layout: Layout
    source: Source
    copies: tuple[Copy, ...]
    modules: str | None
    modules_size: int
    depmod: str | None
    initramfs: tuple[str, ...] | None
    entry: tuple[str, str] | None
    menu: tuple[str, ...] | None
    space: tuple[Space, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def release(self) -> str:
        return self.source.release


def initramfs_command(root: Root, place: Layout, release: str) -> tuple[str, ...] | None:
    """The command that makes a kernel's initramfs, by what the system has."""
    update, dracut = root.program("update-initramfs"), root.program("dracut")
    if update and (place.name == "debian" or not dracut):
        return (update, "-c", "-k", release)
    if dracut:
        # In a tree, the hardware to be found is that of this machine, not of the tree's.
        generic = () if root.is_host else ("--no-hostonly",)
        return (dracut, "--force", *generic, place.initrd_path(release), release)
    return None


def menu_command(root: Root, place: Layout) -> tuple[str, ...] | None:
    """The program that makes grub's configuration; None where the system has none, or needs none."""
    if place.entries or place.config is None:
        return None
    program = root.program(place.mkconfig, "grub-mkconfig", "grub2-mkconfig")
    return (program,) if program else None


def refuse_existing(root: Root, release: str, targets: Iterable[str]) -> None:
    """KflexError where a kernel is a package's, or one of its files is there."""
    owner = inventory.owners(root).get(release)
    if owner:
        raise KflexError(
            f"{release} belongs to the package {owner}",
            str(root.path),
            "build yours with another name: CONFIG_LOCALVERSION",
        )
    for target in targets:
        if not root.exists(target):
            continue
        path = PurePosixPath(target)
        names = root.names(str(path.parent))
        other = [name for name in names if name != path.name and name.casefold() == path.name.casefold()]
        if path.name not in names and other:
            raise KflexError(
                f"{other[0]} is there, and this file system does not tell it from {path.name}",
                str(root.real(str(path.parent))),
                "build yours with another name: CONFIG_LOCALVERSION",
            )
        raise KflexError(
            f"{target} is there already, and not of an installation of ours",
            str(root.path),
            "move it away, or build yours with another name: CONFIG_LOCALVERSION",
        )


def _command_line(root: Root) -> str:
    """The command line for a boot loader entry: what the system says, or what its other kernels get."""
    said = root.text("/etc/kernel/cmdline") or root.text("/usr/lib/kernel/cmdline")
    if said:
        return " ".join(said.split())
    found = sorted(
        inventory.entry_files(root), key=lambda item: inventory.version_key(item.name), reverse=True
    )
    for item in found:
        if "rescue" not in item.name and item.fields.get("options"):
            return item.fields["options"]
    if root.is_host:
        words = Path("/proc/cmdline").read_text().split()
        return " ".join(word for word in words if not word.startswith(("BOOT_IMAGE=", "initrd=")))
    raise KflexError(
        "no other entry says how this system finds its root",
        str(root.real(_ENTRIES)),
        "write the kernel's command line to etc/kernel/cmdline of the tree",
    )


def _entry(root: Root, place: Layout, release: str, has_initrd: bool) -> tuple[str, str] | None:
    if not place.entries:
        return None
    machine = root.text("/etc/machine-id").strip() or "kflex-repro"
    name = next(
        (
            line.partition("=")[2].strip().strip('"')
            for line in root.text("/etc/os-release").splitlines()
            if line.startswith("NAME=")
        ),
        "Linux",
    )
    lines = [
        f"title {name} ({release}) by kflex-repro",
        f"version {release}",
        f"linux {inventory.boot_name(root, place.image_path(release))}",
    ]
    if has_initrd:
        lines.append(f"initrd {inventory.boot_name(root, place.initrd_path(release))}")
    lines.append(f"options {_command_line(root)}")
    if place.config:
        lines += ["grub_users $grub_users", "grub_arg --unrestricted", "grub_class kernel"]
    return f"{_ENTRIES}/{machine}-{release}.conf", "\n".join(lines) + "\n"


def _initramfs_size(root: Root) -> int:
    sizes = [
        root.real(f"/boot/{name}").stat().st_size
        for name in root.names("/boot")
        if name.startswith(("initrd", "initramfs")) and root.real(f"/boot/{name}").is_file()
    ]
    return max(sizes, default=_INITRAMFS)


def _space(root: Root, boot: list[tuple[str, int]], modules: int) -> tuple[Space, ...]:
    boot_place, modules_place = root.real("/boot"), root.real("/lib/modules")
    unit = block(boot_place)
    boot = [(name, -(-size // unit) * unit) for name, size in boot]
    # depmod's tables are a few per cent of the modules.
    parts = [("modules", modules + modules // 20 + _SLACK)] if modules else []
    exists = next(path for path in (modules_place, *modules_place.parents) if path.exists())
    if not parts or exists.stat().st_dev == boot_place.stat().st_dev:
        groups = [("/boot", boot_place, boot + parts)]
    else:
        groups = [("/boot", boot_place, boot), ("/lib/modules", modules_place, parts)]
    return tuple(
        Space(name, sum(size for _n, size in group), free(path), tuple(group)) for name, path, group in groups
    )


def require_space(space: Iterable[Space]) -> None:
    """KflexError with the figures where a file system is too small."""
    for item in space:
        if not item.is_enough:
            parts = ", ".join(f"{name} {size_text(size)}" for name, size in item.parts if size)
            raise KflexError(
                f"{size_text(item.needed)} are needed on {item.place}, {size_text(item.free)} are free",
                parts,
                "remove a kernel (`kflex-repro kernel list`), or make room",
            )


def _architecture(root: Root, source: Source, notes: list[str]) -> None:
    machine = image.machine(root)
    if machine is None:
        notes.append(
            f"no program in {root.path} says its architecture; the kernel is for {source.image.arch}"
        )
    elif machine != source.image.arch:
        raise KflexError(
            f"the kernel is for {source.image.arch}, the system for {machine}",
            str(source.image.path),
            f"build one for {machine}",
        )


def make(root: Root, source: Source, defer: bool = False) -> Plan:
    """The plan for one kernel. KflexError for every reason not to install it; nothing is changed."""
    require_boot(root)
    place, release = layout(root), source.release
    record = Store(root).get(release)
    if record is not None and record.state == "installed":
        raise KflexError(
            f"{release} is installed already, from {record.source}",
            str(root.path),
            f"`kflex-repro kernel remove {release}` first, or build yours with another CONFIG_LOCALVERSION",
        )
    notes: list[str] = []
    left: list[str] = []
    _architecture(root, source, notes)
    copies = tuple(
        Copy(path, target, path.stat().st_size)
        for path, target in (
            (source.system_map, f"/boot/System.map-{release}"),
            (source.config, f"/boot/config-{release}"),
            (source.image.path, place.image_path(release)),
        )
        if path is not None
    )
    modules = f"/lib/modules/{release}"
    has_modules = bool(source.modules or source.build)
    if not has_modules:
        notes.append("no modules are installed: none came with it")
    runs = root.runs and not defer

    def runnable(command: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if command is None or runs:
            return command
        left.append(root.shown(command))
        return None

    wanted = initramfs_command(root, place, release)
    initramfs = runnable(wanted)
    if wanted is None:
        need = "update-initramfs (initramfs-tools)" if place.name == "debian" else "dracut"
        notes.append(f"no initramfs is made: {need} is not there; the kernel must find its root by itself")
    initrd = place.initrd_path(release)
    entry = _entry(root, place, release, wanted is not None)
    made = [copy.target for copy in copies]
    made += [entry[0]] if entry else []
    # An interrupted installation is undone first: what it left is not in the way.
    left_over = {item.path for item in record.made} if record else set()
    refuse_existing(root, release, [name for name in (*made, initrd, modules) if name not in left_over])
    menu = None
    if entry is None and place.config:
        command = menu_command(root, place)
        if command is None:
            left.append(
                f"make {place.config} anew: {place.mkconfig} is not there (package grub-common, grub2-tools)"
            )
        else:
            menu = runnable((*command, "-o", place.config))
    elif entry is None:
        left.append("make a boot entry for it: there is neither grub nor /boot/loader/entries")
    depmod = shutil.which("depmod", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if has_modules and depmod is None:
        left.append(root.shown(("depmod", release)) + " (package kmod)")
    kind = file_system(root.real("/boot"))[0]
    if kind in ("vfat", "msdos", "exfat"):
        notes.append(f"/boot is {kind}: no links, owners or modes there, and none are made")
    size = source.modules_size(block(root.real("/lib/modules"))) if has_modules else 0
    boot = [(PurePosixPath(copy.target).name, copy.size) for copy in copies]
    if wanted:
        boot.append((f"{PurePosixPath(initrd).name} (estimated)", _initramfs_size(root)))
    if place.config and not entry and root.exists(place.config):
        boot.append(("grub.cfg", 2 * root.real(place.config).stat().st_size))
    return Plan(
        root,
        place,
        source,
        copies,
        modules if has_modules else None,
        size,
        depmod if has_modules else None,
        initramfs,
        entry,
        menu,
        _space(root, boot, size),
        tuple(left),
        tuple(notes),
    )
