"""A disk with a vfat /boot, kernels put there by `kernel install`: firmware and boot loaders boot them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from kflex_repro.kernel import cli
from kflex_repro.vm import busybox, kernels
from tests.conftest import require
from tests.unit.kernel_trees import write
from tests.vm import disk

# Firmware, grub and kernel take 9 s of a core under TCG.
_BOOT_S = 240.0
_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off init=/init"
_APPLETS = (
    "sort cat ls rm mv cp mkdir echo sed awk grep egrep fgrep head tail cut tr uname id chmod umask dirname"
    " basename test [ stat mktemp printf expr true false which env readlink uniq wc find touch sync"
)
# Stands for grub-probe, which looks for the disk under a mounted tree: this tree's disk is not made yet.
_GRUB_PROBE = f"""#!/bin/sh
case "$*" in
    *--target=device*/boot*) echo /dev/nvme0n1p1 ;;
    *--target=device*) echo /dev/nvme0n1p2 ;;
    *nvme0n1p1*--target=fs_uuid*) echo {disk.ESP_ID} ;;
    *--target=fs_uuid*) echo {disk.ROOT_UUID} ;;
    *--target=partuuid*) echo {disk.SIGNATURE:08x}-02 ;;
    *nvme0n1p1*--target=fs*) echo fat ;;
    *--target=fs*) echo ext2 ;;
    *--target=partmap*) echo msdos ;;
    *--target=compatibility_hint*) echo hd0,msdos1 ;;
esac
"""
# The new system's first program: what it runs, and whether its modules work (the vfat ones are no part of
# the image).
_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
echo
echo "BOOTED $($b uname -r)"
for name in vfat nls_cp437 nls_ascii; do $b modprobe $name || echo "NO $name"; done
$b mount -t vfat -o ro /dev/nvme0n1p1 /boot && echo "MOUNTED $(cd /boot && echo vmlinuz-*)"
$b poweroff -f
"""


def _with_libraries(root: Path, program: str) -> None:
    for name in (Path(program), *disk.libraries(Path(program))):
        target = root / name.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)


def _system(root: Path) -> Path:
    """A Debian with grub's own grub-mkconfig, an init, and no kernel."""
    (root / "bin").mkdir(parents=True)
    shutil.copy(busybox.path(), root / "bin/busybox")
    for name in _APPLETS.split():
        (root / "bin" / name).symlink_to("busybox")
    for name in ("boot", "dev", "proc", "sys", "tmp"):
        (root / name).mkdir()
    write(root / "init", _INIT, 0o755)
    write(root / "etc/debian_version", "12.0\n")
    write(root / "etc/os-release", 'ID=debian\nNAME="Debian GNU/Linux"\n')
    settings = 'GRUB_DISTRIBUTOR=Debian\nGRUB_TIMEOUT=0\nGRUB_TERMINAL=console\nGRUB_CMDLINE_LINUX="%s"\n'
    write(root / "etc/default/grub", settings % _ARGUMENTS)
    for name in ("00_header", "10_linux"):
        write(root / "etc/grub.d" / name, Path("/etc/grub.d", name).read_bytes(), 0o755)
    shutil.copytree("/usr/share/grub", root / "usr/share/grub", ignore=lambda *_: ["unicode.pf2"])
    # dpkg compares versions for grub-mkconfig; busybox's shell would take its own dpkg, which cannot.
    for name in ("usr/bin/grub-mkrelpath", "usr/bin/grub-script-check", "usr/bin/dpkg", "bin/dash"):
        _with_libraries(root, f"/{name}")
    (root / "bin/sh").symlink_to("dash")
    write(root / "usr/sbin/grub-mkconfig", Path("/usr/sbin/grub-mkconfig").read_bytes(), 0o755)
    write(root / "usr/sbin/grub-probe", _GRUB_PROBE, 0o755)
    return root


def _kernel(*arguments: object) -> str:
    done = CliRunner().invoke(cli.group, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def _said(console: str, word: str) -> list[str]:
    return re.findall(rf"^{word} (.*?)\r?$", console, re.M)


@contextlib.contextmanager
def _own_boot(root: Path) -> Iterator[Path]:
    """A /boot that is a file system of its own, as the programs in the tree must see it."""
    boot = root / "boot"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m,mode=755", "tmpfs", boot], check=True)
    try:
        yield boot
    finally:
        subprocess.run(["umount", boot], check=True)


def _boots(image: Path, release: str, kernels_there: str) -> None:
    console = disk.boot(image, _BOOT_S)
    assert _said(console, "BOOTED") == [release], console[-3000:]
    assert _said(console, "MOUNTED") == [kernels_there] and not _said(console, "NO"), console[-3000:]


@pytest.mark.bpf
def test_installed_kernels_boot_by_grub_and_a_boot_for_once_is_one(tmp_path: Path) -> None:
    require("root")  # a chroot, and a mount for /boot
    disk.require_programs()
    new, old = (kernels.find(series) for series in ("6.12", "6.1"))
    root, esp = _system(tmp_path / "root"), tmp_path / "esp"
    with _own_boot(root) as boot:
        (boot / "grub").mkdir()
        for kernel in (new, old):
            _kernel("install", kernel.image.parent.parent, "--root", root)
        _kernel("boot-once", old.release, "--root", root)
        listed = json.loads(_kernel("list", "--root", root, "--json"))
        assert [item["release"] for item in listed if item["next"]] == [old.release]
        assert [item["release"] for item in listed if item["default"]] == [new.release]
        shutil.copytree(boot, esp)
    image = tmp_path / "disk"
    disk.make(image, esp, root)
    shutil.rmtree(root)
    names = " ".join(sorted(f"vmlinuz-{kernel.release}" for kernel in (old, new)))
    _boots(image, old.release, names)
    _boots(image, new.release, names)
    image.unlink()


@pytest.mark.bpf
def test_an_installed_kernel_boots_by_its_entry(tmp_path: Path) -> None:
    require("root")  # a mount for /boot
    disk.require_programs()
    kernel = kernels.find("6.12")
    root, esp = _system(tmp_path / "root"), tmp_path / "esp"
    write(root / "etc/os-release", 'ID=fedora\nNAME="Fedora Linux"\n')
    (root / "etc/debian_version").unlink()
    write(root / "etc/kernel/cmdline", f"root=/dev/nvme0n1p2 rw {_ARGUMENTS}\n")
    with _own_boot(root) as boot:
        (boot / "loader/entries").mkdir(parents=True)
        _kernel("install", kernel.image, "--modules", kernel.modules, "--root", root)
        write(boot / "loader/loader.conf", "timeout 0\n")
        shutil.copytree(boot, esp)
    image = tmp_path / "disk"
    disk.make(image, esp, root)
    shutil.rmtree(root)
    _boots(image, kernel.release, f"vmlinuz-{kernel.release}")
    image.unlink()
