"""What a guest boots into: an initramfs of busybox, the script init.sh, the modules it needs; and its disks.

Per-run parts are memory files and unnamed files: nothing of them can be left behind.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kflex_repro.build import cache
from kflex_repro.errors import KflexError
from kflex_repro.vm import busybox, ext4
from kflex_repro.vm.kernels import Kernel

_KIND = "vm-boot"
_MODULES_KIND = "vm-modules"
_FORMAT = "2"
# What init.sh loads before it can mount anything; those that a kernel has built in are not there as files.
_EARLY = ("nvme", "ext4", "virtio_pci", "virtiofs", "overlay")
_MKE2FS = ("-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-O", "^has_journal")


def _early_modules(modules: Path) -> list[Path]:
    """The files of the early modules, each after those it depends on."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        needs[name] = rest.split()
    names = {re.sub(r"\.ko.*", "", Path(name).name).replace("-", "_"): name for name in needs}
    found: dict[str, None] = {}

    def add(name: str) -> None:
        for one in needs[name]:
            if one not in found:
                add(one)
        found.setdefault(name)

    for early in _EARLY:
        if early in names:
            add(names[early])
    return [modules / name for name in found]


def _newc(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """An archive of names, each with a mode and a content (Documentation/driver-api/early-userspace/
    buffer-format.rst). Written here, as what makes it from files would leave them behind if it were killed.
    """
    archive = bytearray()
    for inode, (name, (mode, data)) in enumerate({**files, "TRAILER!!!": (0, b"")}.items(), 1):
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % one for one in fields) + path
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def boot_archive(kernel: Kernel) -> Path:
    """The part of the initramfs that is the same for all runs of a kernel, in the cache."""
    box, script = Path(busybox.path()), Path(__file__).parent / "init.sh"
    modules = _early_modules(kernel.modules) if kernel.modules else []
    key = cache.digest([_FORMAT, cache.file_digest(box), script.read_bytes(), *map(str, modules)])

    def make(out: Path) -> None:
        names = ("bin", "dev", "proc", "sys", "modules", "new", "low")
        files = dict.fromkeys(names, (stat.S_IFDIR | 0o755, b""))
        files["bin/busybox"] = (stat.S_IFREG | 0o755, box.read_bytes())
        files["bin/sh"] = (stat.S_IFLNK | 0o777, b"busybox")
        files["init"] = (stat.S_IFREG | 0o755, script.read_bytes())
        for at, module in enumerate(modules):
            files[f"modules/{at:02}-{module.name}"] = (stat.S_IFREG | 0o644, module.read_bytes())
        (out / "boot.cpio").write_bytes(_newc(files))

    place, _ = cache.obtain(_KIND, key, make)
    return place / "boot.cpio"


def initramfs(kernel: Kernel, files: Mapping[str, str]) -> int:
    """The whole initramfs of a run, as a memory file: ``files`` (names to texts) lie in its /job."""
    base = boot_archive(kernel)
    job = {f"job/{name}": (stat.S_IFREG | 0o644, text.encode()) for name, text in files.items()}
    fd = os.memfd_create("kflex-initramfs")
    with os.fdopen(os.dup(fd), "wb") as stream:
        stream.write(base.read_bytes())
        stream.write(_newc({"job": (stat.S_IFDIR | 0o755, b""), **job}))
    return fd


def modules_disk(kernel: Kernel) -> Path | None:
    """An ext4 image of the kernel's modules, in the cache; None for a kernel without."""
    modules = kernel.modules
    if modules is None:
        return None
    size = sum(path.stat().st_size for path in modules.rglob("*") if path.is_file() and not path.is_symlink())

    def make(out: Path) -> None:
        file_system(out / "modules.img", size * 5 // 4 + (32 << 20), modules)

    place, _ = cache.obtain(_MODULES_KIND, cache.digest([_FORMAT, kernel.key]), make)
    return place / "modules.img"


def file_system(path: Path, size: int, tree: Path | None = None) -> None:
    """Make an ext4 file system of ``size`` bytes (sparse) in a file, with a copy of ``tree``."""
    content = ["-d", str(tree)] if tree else []
    _mke2fs([*_MKE2FS, *content, str(path), f"{size >> 10}k"], ())


def _mke2fs(arguments: list[str], fds: tuple[int, ...]) -> None:
    done = subprocess.run(
        [ext4.program("mke2fs"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        reason = " | ".join(done.stderr.strip().splitlines()[-2:])
        raise KflexError("mke2fs cannot make the guest's disk", reason, "is the cache's disk full?")


def unnamed(size: int) -> int:
    """A sparse file of ``size`` bytes without a name, beside the cache: gone with its last descriptor."""
    try:
        fd = os.open(cache.root(), os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        # Not every file system has O_TMPFILE.
        fd, name = tempfile.mkstemp(dir=cache.root(), prefix=".vm-")
        Path(name).unlink()
    os.truncate(fd, size)
    return fd


def scratch(size: int) -> int:
    """A writable ext4 disk, without a name."""
    fd = unnamed(size)
    _mke2fs([*_MKE2FS, f"/proc/self/fd/{fd}", f"{size >> 10}k"], (fd,))
    return fd
