"""The kernels of a system: what is there, whose it is, which one runs, and which one is booted next."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from kflex_repro.errors import KflexError
from kflex_repro.kernel import grub, source
from kflex_repro.kernel.place import Layout, Root, layout
from kflex_repro.kernel.record import INSTALLED, Store

OURS = "kflex-repro"
_OWNED = re.compile(rb"^(?:/usr)?/(?:boot/vmlinuz-|lib/modules/)([^/\n]+)(/)?", re.M)
_ENTRIES = "/boot/loader/entries"


@dataclass(frozen=True)
class Kernel:
    """``image`` and ``initrd`` are paths inside the system, "" where there is none; sizes are bytes.

    ``origin``: ``kflex-repro``, a package's name, or "" for unknown. ``state``: of our record, else "".
    """

    release: str
    image: str
    initrd: str
    image_size: int
    initrd_size: int
    modules_size: int
    origin: str
    state: str
    in_menu: bool
    running: bool
    default: bool
    next: bool

    @property
    def bootable(self) -> bool:
        """Whether the parts that a boot needs are there."""
        return bool(self.image) and self.state in ("", INSTALLED)


@dataclass(frozen=True)
class EntryFile:
    """A boot loader entry: its file's name, id, and fields (the last of each name)."""

    name: str
    fields: dict[str, str]

    @property
    def id(self) -> str:
        return re.sub(r"(\+\d+(-\d+)?)?\.conf$", "", self.name)


def entry_files(root: Root) -> list[EntryFile]:
    """What /boot/loader/entries lists."""
    found = []
    for name in root.names(_ENTRIES):
        if name.endswith(".conf") and not name.startswith("."):
            lines = (line.split(None, 1) for line in root.text(f"{_ENTRIES}/{name}").splitlines())
            fields = {line[0]: line[1].strip() for line in lines if len(line) == 2 and line[0][0] != "#"}
            found.append(EntryFile(name, fields))
    return found


def owners(root: Root) -> dict[str, str]:
    """The package of each release that dpkg or rpm brought."""
    found: dict[str, str] = {}
    info = "/var/lib/dpkg/info"
    for name in root.names(info):
        if not name.endswith(".list") or not name.startswith("linux"):
            continue
        try:
            data = root.real(f"{info}/{name}").read_bytes()
        except OSError:
            continue
        for release, _below in set(_OWNED.findall(data)):
            package = name.removesuffix(".list").partition(":")[0]
            # Headers have a link in the modules' directory, too: the package with the image is named.
            if release.decode() not in found or b"/boot/vmlinuz-" + release in data:
                found[release.decode()] = package
    rpm = root.program("rpm") if root.runs else None
    if rpm:
        for release in root.names("/lib/modules"):
            try:
                said = root.run([rpm, "-qf", "--qf", "%{NAME}\\n", f"/lib/modules/{release}"])
            except KflexError:
                continue
            found[release] = said.split()[0] if said.split() else "rpm"
    return found


def _size(root: Root, path: str) -> int:
    try:
        return root.real(path).stat().st_size
    except OSError:
        return 0


def _initrd(root: Root, release: str, found: list[EntryFile]) -> str:
    for item in found:
        name = item.fields.get("initrd", "").split()
        if name and item.fields.get("version") == release and (path := on_boot(root, name[0])):
            return path
    for pattern in ("initrd.img-{}", "initramfs-{}.img", "initrd-{}"):
        if root.exists(path := f"/boot/{pattern.format(release)}"):
            return path
    return ""


def on_boot(root: Root, path: str) -> str:
    """A path of a boot loader, which counts from /boot where that is a file system; "" for none."""
    clean = f"/{path.lstrip('/')}"
    return next((name for name in (f"/boot{clean}", clean) if root.exists(name)), "")


def boot_selectors(root: Root, place: Layout) -> tuple[str, str]:
    """(default, next) as the boot loader has them; an empty next is none."""
    variables = grub.variables(root, place.environment) if place.config else {}
    if place.config and not place.entries:
        return grub.default(root.text(place.config), variables), variables.get("next_entry", "")
    if place.config:
        return variables.get("saved_entry", "") or "0", variables.get("next_entry", "")
    for line in root.text("/boot/loader/loader.conf").splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == "default":
            return words[1].removesuffix(".conf"), ""
    return "0", ""


def _release_of(root: Root, place: Layout, selector: str, found: list[EntryFile]) -> str:
    if not selector:
        return ""
    if place.entries:
        named = [
            item for item in found if selector.removesuffix(".conf") in (item.id, item.fields.get("title"))
        ]
        if not named and selector.isdigit() and int(selector) < len(found):
            # blscfg shows the newest first.
            named = [sorted(found, key=lambda item: version_key(item.name), reverse=True)[int(selector)]]
        return named[0].fields.get("version", "") if named else ""
    try:
        entry = grub.resolve(root.text(place.config or ""), selector)
    except KflexError:
        return ""
    return entry.image.removeprefix("vmlinuz-") if entry else ""


def version_key(name: str) -> list[tuple[int, int, str]]:
    """Orders releases as people do: 6.9 before 6.12."""
    return [
        (1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.findall(r"\d+|[^\d.+_-]+", name)
    ]


def _in_menu(root: Root, place: Layout, found: list[EntryFile]) -> set[str]:
    listed = {item.fields.get("version", "") for item in found}
    if place.config and not place.entries:
        try:
            entries = grub.flat(grub.menu(root.text(place.config)))
            listed = {entry.image.removeprefix("vmlinuz-") for entry in entries if entry.image}
        except KflexError:
            listed = set()
    return listed


def kernels(root: Root) -> list[Kernel]:
    """All of a system's kernels, the newest first."""
    place = layout(root)
    found = entry_files(root)
    records = {record.release: record for record in Store(root).all()}
    owner = owners(root)
    images = {
        name.removeprefix("vmlinuz-"): f"/boot/{name}"
        for name in root.names("/boot")
        if name.startswith("vmlinuz-") and not name.endswith((".old", ".bak", ".dpkg-bak", ".dpkg-new"))
    }
    for item in found:
        release, image = item.fields.get("version", ""), item.fields.get("linux", "")
        if release and image and release not in images and (path := on_boot(root, image)):
            images[release] = path
    modules = {name for name in root.names("/lib/modules") if not name.startswith(".")}
    listed = _in_menu(root, place, found)
    default, following = boot_selectors(root, place)
    default_release = _release_of(root, place, default, found)
    next_release = _release_of(root, place, following, found) or default_release
    running = os.uname().release if root.is_host else ""
    made = []
    for release in sorted({*images, *modules, *records}, key=version_key, reverse=True):
        initrd = _initrd(root, release, found)
        record = records.get(release)
        directory = root.real(f"/lib/modules/{release}")
        made.append(
            Kernel(
                release=release,
                image=images.get(release, ""),
                initrd=initrd,
                image_size=_size(root, images[release]) if release in images else 0,
                initrd_size=_size(root, initrd) if initrd else 0,
                modules_size=sum(size for _p, size in source.module_files(directory))
                if directory.is_dir()
                else 0,
                origin=OURS if record else owner.get(release, ""),
                state=record.state if record else "",
                in_menu=release in listed,
                running=release == running,
                default=release == default_release,
                next=release == next_release,
            )
        )
    return made


def boot_name(root: Root, path: str) -> str:
    """The path a boot loader uses for a file of /boot: from the top of the file system that holds it."""
    boot, top = root.real("/boot"), root.path
    own = boot.stat().st_dev != top.stat().st_dev or os.path.ismount(boot)
    return str(PurePosixPath("/") / PurePosixPath(path).relative_to("/boot")) if own else path
