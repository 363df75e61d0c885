"""One boot of another kernel, and then the usual one again."""

from __future__ import annotations

from dataclasses import dataclass

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.kernel import grub, inventory
from kflex_repro.kernel.place import Layout, Root, file_system, layout
from kflex_repro.kernel.record import Store

# grub reads these, but cannot write its variables there: the choice would not be taken back.
_READ_ONLY = ("btrfs", "zfs", "f2fs")
_READ_ONLY_SOURCES = ("/dev/mapper/", "/dev/dm-", "/dev/md")


@dataclass(frozen=True)
class Choice:
    """``command`` is run (systemd-boot); else next_entry becomes ``selector`` in ``environment``."""

    release: str
    selector: str
    environment: str
    command: tuple[str, ...] | None


def _is_a_machines(root: Root) -> bool:
    """Whether the tree is on the disk that is to be booted; one in a directory will be copied somewhere."""
    return root.is_host or root.path.is_mount() or root.real("/boot").is_mount()


def _require_writable(root: Root, place: Layout) -> None:
    if not _is_a_machines(root):
        return
    kind, device = file_system(root.real(place.environment))
    if kind in _READ_ONLY or device.startswith(_READ_ONLY_SOURCES):
        raise KflexError(
            f"grub cannot write on {kind} on {device}: every boot would be of this kernel, not one",
            str(root.real(place.environment)),
            "choose it in grub's menu",
        )


def choose(root: Root, release: str) -> Choice:
    """How the next boot is made this kernel's. KflexError where it cannot be, or would not be just one."""
    place = layout(root)
    kernel = next((item for item in inventory.kernels(root) if item.release == release), None)
    if kernel is None or not kernel.bootable:
        raise KflexError(
            f"there is no kernel {release} to boot",
            str(root.path),
            "`kflex-repro kernel list` shows what is there",
        )
    entry = next(
        (item for item in inventory.entry_files(root) if item.fields.get("version") == release), None
    )
    if place.config is None:
        if entry is None:
            raise KflexError(f"{release} has no boot entry", str(root.real("/boot/loader/entries")))
        bootctl = root.program("bootctl")
        if not root.is_host or bootctl is None:
            raise Unavailable(
                "systemd-boot keeps the choice in the firmware",
                str(root.path),
                f"run on that machine: bootctl set-oneshot {entry.name}",
            )
        return Choice(release, entry.name, "", (bootctl, "set-oneshot", entry.name))
    text = root.text(place.config)
    mkconfig = f"{place.mkconfig} -o {place.config}"
    if not grub.takes_next_entry(text):
        raise KflexError(
            "grub's configuration does not look at next_entry",
            str(root.real(place.config)),
            f"set GRUB_DEFAULT=saved in /etc/default/grub and run {mkconfig}",
        )
    _require_writable(root, place)
    if place.entries:
        if entry is None:
            raise KflexError(f"{release} has no boot entry", str(root.real("/boot/loader/entries")))
        return Choice(release, entry.id, place.environment, None)
    found = grub.find(text, f"vmlinuz-{release}")
    if found is None:
        raise KflexError(f"{release} is not in grub's menu", str(root.real(place.config)), f"run {mkconfig}")
    return Choice(release, found.selector, place.environment, None)


def set_next(root: Root, choice: Choice) -> None:
    """Make it so."""
    with Store(root).locked():
        if choice.command:
            root.run(choice.command)
        else:
            grub.set_variable(root, choice.environment, "next_entry", choice.selector)


def clear(root: Root) -> bool:
    """Take the choice back; whether there was one."""
    place = layout(root)
    if place.config is None:
        bootctl = root.program("bootctl") if root.is_host else None
        if bootctl is None:
            raise Unavailable("systemd-boot keeps the choice in the firmware", str(root.path))
        root.run((bootctl, "set-oneshot", ""))
        return True
    if not grub.variables(root, place.environment).get("next_entry"):
        return False
    with Store(root).locked():
        grub.set_variable(root, place.environment, "next_entry", None)
    return True
