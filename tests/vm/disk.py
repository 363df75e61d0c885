"""A machine's disk made from a tree, without a mount: an EFI partition with a boot loader, and a root."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

from kflex_repro.vm import ext4, qemu
from tests.conftest import unavailable

ESP_ID = "1D1E-5AB1"
ROOT_UUID = "5f0c1b66-6c8e-4a0e-9d5c-6d1f5b8a7e01"
SIGNATURE = 0x6B666C78
_MIB = 1 << 20
_ESP_MIB = 128
_FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
_GRUB = Path("/usr/lib/grub/x86_64-efi")
_SYSTEMD_BOOT = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
_GRUB_MODULES = (
    "part_msdos fat ext2 normal configfile linux search search_fs_uuid search_fs_file search_label"
    " loadenv test echo serial terminal gzio xzio minicmd all_video gfxterm font true regexp keystatus"
)
_EARLY = "search --no-floppy --set=root --file /grub/grub.cfg\nset prefix=($root)/grub\nnormal\n"


def require_programs() -> None:
    """Need what makes the disk and boots it: packages of `scripts/setup --tests`."""
    for path, package in (
        (_FIRMWARE, "ovmf"),
        (_GRUB, "grub-efi-amd64-bin"),
        (_SYSTEMD_BOOT, "systemd-boot-efi"),
        (Path("/usr/bin/mcopy"), "mtools"),
        (Path("/usr/sbin/mkfs.vfat"), "dosfstools"),
    ):
        if not path.exists():
            unavailable(f"{path} is not there: package {package}")


def libraries(program: Path) -> list[Path]:
    """The shared libraries, and the loader, that a program is started with."""
    said = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in re.findall(r"(/\S+) \(0x", said)]


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def _partition(kind: int, start: int, count: int) -> bytes:
    return struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start // 512, count // 512)


def _loader(boot: Path) -> None:
    """Put a boot loader where the firmware looks: grub, or where there is none of its files, systemd-boot."""
    loader = boot / "EFI/BOOT/BOOTX64.EFI"
    loader.parent.mkdir(parents=True)
    if not (boot / "grub").exists():
        shutil.copy(_SYSTEMD_BOOT, loader)
        return
    early = boot.parent / "early.cfg"
    early.write_text(_EARLY)
    image = ("grub-mkimage", "-O", "x86_64-efi", "-d", _GRUB, "-o", loader, "-c", early, "-p", "/grub")
    _run(*image, *_GRUB_MODULES.split())


def make(disk: Path, boot: Path, root: Path) -> None:
    """Write a disk: ``boot`` on a vfat, with a boot loader for the firmware, and ``root`` on an ext4."""
    _loader(boot)
    size = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file())
    root_mib = (size * 5 // 4 >> 20) + 48
    esp, rest = _ESP_MIB * _MIB, root_mib * _MIB
    table = bytearray(512)
    struct.pack_into("<I", table, 440, SIGNATURE)
    table[446:478] = _partition(0xEF, _MIB, esp) + _partition(0x83, _MIB + esp, rest)
    table[510:] = b"\x55\xaa"
    fat = disk.with_suffix(".fat")
    with fat.open("wb") as stream:
        stream.truncate(esp)
    _run("mkfs.vfat", "-F", "32", "-i", ESP_ID.replace("-", ""), fat)
    _run("mcopy", "-i", fat, "-s", *sorted(boot.iterdir()), "::/")
    with disk.open("wb") as stream, fat.open("rb") as partition:
        stream.write(table)
        stream.truncate(_MIB + esp + rest)
        stream.seek(_MIB)
        while block := partition.read(_MIB):
            stream.write(block)
    fat.unlink()
    offset = f"offset={_MIB + esp},lazy_itable_init=1"
    mke2fs = (ext4.program("mke2fs"), "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-U", ROOT_UUID)
    _run(*mke2fs, "-d", root, "-E", offset, disk, f"{root_mib}M")


def boot(disk: Path, timeout: float) -> str:
    """Boot a disk by the firmware and its boot loader until the guest powers off; what it said."""
    command = [
        qemu.program().path,
        *("-M", "q35", "-accel", "tcg,thread=single", "-cpu", "max", "-m", "768M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-drive", f"if=pflash,format=raw,readonly=on,file={_FIRMWARE}"),
        *("-drive", f"if=pflash,format=raw,snapshot=on,file={_VARIABLES}"),
        *("-drive", f"file={disk},format=raw,if=none,id=disk", "-device", "nvme,drive=disk,serial=disk"),
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        raise AssertionError(f"the guest did not power off in {timeout:.0f} s:\n{said[-3000:]}") from None
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace")
