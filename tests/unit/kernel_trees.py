"""Small systems to install kernels into, small kernels to install, and what is looked at."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from kflex_repro.kernel import grub, install, inventory, plan, source
from kflex_repro.kernel.place import open_root
from kflex_repro.vm import busybox
from tests.cut_short import cut_at

Snapshot = dict[str, object]

OLD = "6.1.0-40-amd64"
NEW = "6.12.9-kflex"
MACHINE = "0123456789abcdef0123456789abcdef"


def bzimage(release: str, bits: int = 64, size: int = 40_000) -> bytes:
    """A file with a bzImage's header: 4 setup sectors, then nothing that runs."""
    data = bytearray(size - size % 16)
    data[0x1F1] = 3
    struct.pack_into("<I", data, 0x1F4, (len(data) - 4 * 512) // 16)
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x206, 0x20F)
    struct.pack_into("<H", data, 0x20E, 0x600 - 0x200)
    struct.pack_into("<H", data, 0x236, 1 if bits == 64 else 0)
    text = f"{release} (builder@host) #1 SMP\0".encode()
    data[0x600 : 0x600 + len(text)] = text
    return bytes(data)


def riscv_image(release: str) -> bytes:
    """A file with a RISC-V Image's header and a kernel's banner."""
    data = bytearray(8192)
    data[0x30:0x35] = b"RISCV"
    data[0x38:0x3C] = b"RSC\x05"
    banner = f"Linux version {release} (builder@host) #1\0".encode()
    data[4096 : 4096 + len(banner)] = banner
    return bytes(data)


def write(path: Path, data: str | bytes, mode: int = 0o644) -> Path:
    """A file, with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(mode)
    return path


def modules(place: Path, release: str) -> Path:
    """lib/modules/RELEASE below a place, with a module and the links that a build leaves."""
    directory = place / "lib/modules" / release
    write(directory / "kernel/net/kflex.ko", b"\x7fELF" + release.encode() + bytes(6000))
    write(directory / "modules.order", "kernel/net/kflex.ko\n")
    write(directory / "modules.builtin", "kernel/fs/ext4/ext4.ko\n")
    (directory / "build").symlink_to("/home/builder/linux")
    return directory


def entry(place: Path, release: str = NEW, image: bytes | None = None) -> Path:
    """What `build --kernel` leaves."""
    write(place / "image", image or bzimage(release))
    write(place / "release", release + "\n")
    write(place / "config", "CONFIG_MODULES=y\n")
    write(place / "System.map", "ffffffff81000000 T _text\n")
    modules(place / "modules", release)
    return place


def _menu_entry(release: str, kind: str, boot: str) -> str:
    title = f"Debian GNU/Linux, with Linux {release}" + (" (recovery mode)" if kind == "recovery" else "")
    return (
        f"menuentry '{title}' --class debian --class os $menuentry_id_option"
        f" 'gnulinux-{release}-{kind}-UUID' {{\n"
        "\tif [ x$grub_platform = xxen ]; then insmod xzio; fi\n"
        f"\techo\t'Loading Linux {release} ...'  # it's {{ here\n"
        f"\tlinux\t{boot}/vmlinuz-{release} root=UUID=1234 ro {'single' if kind == 'recovery' else 'quiet'}\n"
        f"\tinitrd\t{boot}/initrd.img-{release}\n"
        "}\n"
    )


def grub_config(releases: list[str], boot: str = "", default: str = "0", once: bool = True) -> str:
    """A menu as grub-mkconfig makes it for these, the newest first."""
    top = _menu_entry(releases[0], "simple", boot).replace(f"-{releases[0]}-simple", "-simple")
    inside = "".join(
        _menu_entry(release, kind, boot) for release in releases for kind in ("advanced", "recovery")
    )
    inside = "".join(f"\t{line}\n" for line in inside.splitlines())
    load = "if [ -s $prefix/grubenv ]; then\n  set have_grubenv=true\n  load_env\nfi\n"
    next_one = (
        'if [ "${next_entry}" ] ; then\n   set default="${next_entry}"\n   set next_entry=\n'
        "   save_env next_entry\n   set boot_once=true\nelse\n"
    )
    choice = f'   set default="{default}"\n'
    return (
        (load + next_one + choice + "fi\n" if once else choice)
        + "### BEGIN /etc/grub.d/10_linux ###\n"
        + top
        + "submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-UUID' {\n"
        + inside
        + "}\n### END /etc/grub.d/10_linux ###\n"
        + "menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {\n\tfwsetup\n}\n"
    )


# Stands for grub-mkconfig: lists the kernels of /boot, in place as the real one does.
_MKCONFIG = r"""#!/bin/sh
[ ! -e /fail ] || { echo "grub-probe: error: cannot find a device for /." >&2; exit 1; }
[ "$1" = -o ] || exit 2
{
    cat /usr/share/head.cfg
    for image in $(ls -r /boot/vmlinuz-*); do
        release=${image#/boot/vmlinuz-}
        echo "menuentry 'Linux $release' \$menuentry_id_option 'gnulinux-$release-advanced-UUID' {"
        echo "	linux /vmlinuz-$release root=/dev/vda2"
        echo "}"
    done
} >"$2.new"
cat "$2.new" >"$2"
rm -f "$2.new"
"""
_UPDATE_INITRAMFS = r"""#!/bin/sh
[ "$1 $2" = "-c -k" ] || exit 2
[ -d "/lib/modules/$3" ] || { echo "no modules for $3" >&2; exit 1; }
echo "initramfs of $3" >"/boot/initrd.img-$3.new"
mv "/boot/initrd.img-$3.new" "/boot/initrd.img-$3"
mkdir -p /var/lib/initramfs-tools
echo sum >"/var/lib/initramfs-tools/$3"
"""
_DRACUT = r"""#!/bin/sh
[ "$1 $2" = "--force --no-hostonly" ] || exit 2
echo "initramfs of $4" >"$3"
"""


def _kernel(root: Path, release: str, initrd: str) -> None:
    write(root / f"boot/vmlinuz-{release}", bzimage(release))
    write(root / f"boot/config-{release}", "CONFIG_MODULES=y\n")
    write(root / f"boot/System.map-{release}", "ffffffff81000000 T _text\n")
    write(root / "boot" / initrd.format(release), b"initramfs" * 1000)
    modules(root, release)


def _programs(root: Path, programs: dict[str, str]) -> None:
    for name in ("bin", "dev", "proc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox.path(), root / "bin/busybox")
    for name in ("sh", "cat", "ls", "mv", "rm", "mkdir", "echo"):
        (root / "bin" / name).symlink_to("busybox")
    for name, text in programs.items():
        write(root / "usr/sbin" / name, text, 0o755)


def debian(root: Path, tools: bool = False) -> Path:
    """Debian: one kernel of a package, grub. With ``tools`` the tree has programs that can be run in it."""
    write(root / "etc/debian_version", "12.1\n")
    write(root / "etc/os-release", 'ID=debian\nNAME="Debian GNU/Linux"\n')
    _kernel(root, OLD, "initrd.img-{}")
    write(root / "boot/grub/grub.cfg", grub_config([OLD]), 0o600)
    owned = f"/boot\n/boot/vmlinuz-{OLD}\n/lib/modules/{OLD}\n/lib/modules/{OLD}/kernel/net/kflex.ko\n"
    write(root / f"var/lib/dpkg/info/linux-image-{OLD}.list", owned)
    if tools:
        head = grub_config([OLD]).partition("### BEGIN")[0]
        write(root / "usr/share/head.cfg", head)
        _programs(root, {"grub-mkconfig": _MKCONFIG, "update-initramfs": _UPDATE_INITRAMFS})
    return root


def fedora(root: Path, tools: bool = False) -> Path:
    """Fedora: boot loader entries, grub that reads them."""
    write(root / "etc/os-release", 'ID=fedora\nNAME="Fedora Linux"\n')
    write(root / "etc/machine-id", MACHINE + "\n")
    _kernel(root, OLD, "initramfs-{}.img")
    next_one = grub_config([OLD]).partition("### BEGIN")[0]
    write(root / "boot/grub2/grub.cfg", next_one + "insmod blscfg\nblscfg\n")
    write(
        root / f"boot/loader/entries/{MACHINE}-{OLD}.conf",
        f"title Fedora Linux ({OLD}) 40\nversion {OLD}\nlinux /vmlinuz-{OLD}\ninitrd /initramfs-{OLD}.img\n"
        "options root=UUID=1234 ro rhgb quiet\ngrub_users $grub_users\n",
    )
    if tools:
        _programs(root, {"dracut": _DRACUT})
    return root


def openeuler(root: Path, tools: bool = False) -> Path:
    """openEuler on EFI: dracut's names, and grub's whole configuration on the EFI partition."""
    write(root / "etc/os-release", 'ID="openEuler"\nNAME="openEuler"\n')
    _kernel(root, OLD, "initramfs-{}.img")
    text = grub_config([OLD]).replace("initrd.img-" + OLD, f"initramfs-{OLD}.img")
    write(root / "boot/efi/EFI/openEuler/grub.cfg", text)
    write(root / "boot/efi/EFI/BOOT/BOOTX64.EFI", b"MZ")
    if tools:
        write(root / "usr/share/head.cfg", text.partition("### BEGIN")[0])
        _programs(root, {"grub2-mkconfig": _MKCONFIG, "dracut": _DRACUT})
    return root


def snapshot(root: Path) -> Snapshot:
    """Everything of a system but our own records: contents, link targets, modes."""
    found: Snapshot = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not f"/{name}/".startswith("/var/lib/kflex-repro/") and name not in ("var", "var/lib"):
            content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[name] = (content, path.lstat().st_mode)
    return found


def installed(root: Path, built: Path, defer: bool = False) -> tuple[str, ...]:
    return install.install(plan.make(open_root(root), source.find(built), defer))


_TOUCHES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "shutil.rmtree",
    "subprocess.Popen",
}


def _touches(event: str, args: tuple[object, ...]) -> bool:
    writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return event in _TOUCHES or writes


def killed_at(step: int, change: Callable[[], object], kill: bool = True) -> bool:
    """Run a change in a child that is killed, or interrupted, before its ``step``-th touch of the disk, or
    start of a program; whether it was."""
    return cut_at(step, change, _touches, kill)


def bootable(root: Path) -> bool:
    """Whether the default entry, and every entry of the old kernel, has the files that it names."""
    config = root / "boot/grub/grub.cfg"
    if not config.exists():
        entries = inventory.entry_files(open_root(root))
        return all((root / f"boot/vmlinuz-{item.fields['version']}").exists() for item in entries)
    text = config.read_text()
    chosen = grub.resolve(text, grub.default(text, {}))
    return (
        chosen is not None
        and (root / "boot" / chosen.image).exists()
        and grub.find(text, f"vmlinuz-{OLD}") is not None
        and (root / f"boot/vmlinuz-{OLD}").read_bytes() == bzimage(OLD)
    )
