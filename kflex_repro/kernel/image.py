"""What a kernel image says about itself: its architecture, and where it does, its release."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.kernel.place import Root

# e_machine of ELF, and the machine of PE/COFF, as `uname -m` calls them.
_ELF = {3: "i686", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64", 258: "loongarch64"}
_PE = {0x8664: "x86_64", 0xAA64: "aarch64", 0x5064: "riscv64", 0x6264: "loongarch64", 0x14C: "i686"}
_HEAD = 1 << 16
# A vfat drops a dot at the end; 64 is the kernel's own limit.
RELEASE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._+~-]{0,62}[A-Za-z0-9_+~-])?")


@dataclass(frozen=True)
class Image:
    """``arch`` as `uname -m` has it; ``release`` is None where the image does not show it."""

    path: Path
    arch: str
    release: str | None
    size: int


def _none(path: Path, what: str, fix: str = "") -> KflexError:
    return KflexError(what, str(path), fix or "give the bzImage (x86) or Image of a kernel build")


def _x86(path: Path, head: bytes) -> tuple[str, str | None]:
    protocol, flags = struct.unpack_from("<H", head, 0x206)[0], struct.unpack_from("<H", head, 0x236)[0]
    if protocol < 0x20C:
        raise _none(path, f"a bzImage of boot protocol {protocol >> 8}.{protocol & 255:02}", "2.12 is needed")
    start = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
    text = head[start : start + 256].split(b"\0")[0].decode("ascii", "replace") if start > 0x200 else ""
    return ("x86_64" if flags & 1 else "i686"), text.split()[0] if text.split() else None


def _linux_release(data: bytes) -> str | None:
    match = re.search(rb"Linux version ([!-~]{1,64}) \(", data)
    return match.group(1).decode() if match else None


def read(path: Path) -> Image:
    """Look at an image's header. KflexError where it is none that a boot loader takes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        fix = "sudo, or a copy that you can read" if isinstance(error, PermissionError) else ""
        raise _none(path, f"cannot read the kernel image, {error.strerror}", fix) from None
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(path.read_bytes())) as packed:
                inner = packed.read()
        except (OSError, EOFError, zlib.error):
            raise _none(path, "the image is damaged: its gzip stream does not unpack") from None
        arch, release = _plain(path, inner)
    else:
        arch, release = _plain(path, head)
        if head[0x202:0x206] != b"HdrS" and release is None and size < (256 << 20):
            release = _linux_release(path.read_bytes())
    if release is not None and not RELEASE.fullmatch(release):
        raise _none(path, f"the image's release {release[:70]!r} is not one that files can be named after")
    if head[0x202:0x206] == b"HdrS":
        # setup_sects and syssize: what a copy that was cut short does not have.
        said = (head[0x1F1] + 1) * 512 + struct.unpack_from("<I", head, 0x1F4)[0] * 16
        if size < said:
            raise _none(path, f"the image is cut short: {size} bytes of {said}", "copy or build it again")
    return Image(path, arch, release, size)


def _plain(path: Path, data: bytes) -> tuple[str, str | None]:
    if len(data) < 0x260:
        raise _none(path, f"not a kernel image: {len(data)} bytes")
    if data[0x202:0x206] == b"HdrS" and data[0x1FE:0x200] == b"\x55\xaa":
        return _x86(path, data)
    if data[0x38:0x3C] == b"ARM\x64":
        return "aarch64", _linux_release(data)
    if data[0x38:0x3C] == b"RSC\x05" or data[0x30:0x35] == b"RISCV":
        return "riscv64", _linux_release(data)
    if data[:4] == b"\x7fELF":
        arch = _ELF.get(struct.unpack_from("<H", data, 18)[0], "an unknown architecture")
        raise _none(path, f"an ELF vmlinux for {arch}: boot loaders do not take it")
    if data[:2] == b"MZ":
        (offset,) = struct.unpack_from("<I", data, 0x3C)
        if data[offset : offset + 4] == b"PE\0\0":
            return _PE.get(struct.unpack_from("<H", data, offset + 4)[0], "unknown"), _linux_release(data)
    raise _none(path, "not a kernel image: no header of a bzImage, Image or EFI stub")


def machine(root: Root) -> str | None:
    """The architecture of a system by its programs; None for a tree without any. For ``/``, the kernel's."""
    if root.is_host:
        return os.uname().machine
    for name in ("/bin/sh", "/usr/bin/env", "/bin/busybox", "/sbin/init", "/usr/lib/systemd/systemd"):
        try:
            with root.real(name).open("rb") as stream:
                head = stream.read(20)
        except OSError:
            continue
        if head[:4] == b"\x7fELF":
            return _ELF.get(struct.unpack_from("<H", head, 18)[0])
    return None
