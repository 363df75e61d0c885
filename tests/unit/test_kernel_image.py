"""What is to be installed is looked at first: image, release, architecture, modules that belong together."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.kernel import image, source
from kflex_repro.kernel.place import Root
from tests.unit.kernel_trees import NEW, bzimage, entry, modules, riscv_image, write


@pytest.mark.parametrize(
    ("data", "arch"),
    [
        (bzimage(NEW), "x86_64"),
        (bzimage(NEW, bits=32), "i686"),
        (riscv_image(NEW), "riscv64"),
        (gzip.compress(riscv_image(NEW)), "riscv64"),
    ],
)
def test_an_image_says_what_it_is(tmp_path: Path, data: bytes, arch: str) -> None:
    read = image.read(write(tmp_path / "image", data))
    assert (read.arch, read.release, read.size) == (arch, NEW, len(data))


def _elf() -> bytes:
    return b"\x7fELF" + bytes(14) + struct.pack("<H", 62) + bytes(1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a kernel image: 0 bytes"),
        (b"#!/bin/sh\n" * 200, "no header of a bzImage"),
        (_elf(), "an ELF vmlinux for x86_64"),
        (bzimage(NEW)[:20_000], "cut short: 20000 bytes of 40000"),
        (gzip.compress(riscv_image(NEW))[:100], "gzip stream does not unpack"),
        (bzimage("../../etc"), "not one that files can be named after"),
        (bzimage("6.1."), "not one that files can be named after"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(KflexError, match=message):
        image.read(write(tmp_path / "image", data))


def test_the_system_says_its_architecture_by_its_programs(tmp_path: Path) -> None:
    assert image.machine(Root(tmp_path)) is None
    write(tmp_path / "usr/bin/dash", b"\x7fELF" + bytes(14) + struct.pack("<H", 243), 0o755)
    (tmp_path / "bin").symlink_to("/usr/bin")
    (tmp_path / "usr/bin/sh").symlink_to("dash")
    assert image.machine(Root(tmp_path)) == "riscv64"


def test_an_entry_of_the_cache_an_unpacked_package_and_an_image_with_modules(tmp_path: Path) -> None:
    made = source.find(entry(tmp_path / "entry"))
    assert made.release == NEW and made.modules and made.config and made.system_map
    assert made.modules_size(4096) >= 8192

    package = tmp_path / "package"
    write(package / f"boot/vmlinuz-{NEW}", bzimage(NEW))
    modules(package, NEW)
    assert source.find(package).modules == package / "lib/modules" / NEW

    alone = write(tmp_path / "bzImage", bzimage(NEW))
    assert source.find(alone).modules is None
    assert source.find(alone, package).modules == package / "lib/modules" / NEW
    assert source.find(alone, package / "lib/modules" / NEW).release == NEW


def _unbuilt(place: Path) -> tuple[Path, Path | None]:
    write(place / "Makefile", "")
    write(place / "Kconfig", "")
    return place, None


def _unbuilt_module(place: Path) -> tuple[Path, Path | None]:
    _unbuilt(place)
    write(place / "arch/x86/boot/bzImage", bzimage(NEW))
    write(place / "include/config/kernel.release", NEW)
    write(place / "modules.order", "net/kflex.o\n")
    return place, None


def _two(place: Path) -> tuple[Path, Path | None]:
    write(place / f"boot/vmlinuz-{NEW}", bzimage(NEW))
    write(place / "boot/vmlinuz-6.1.0", bzimage("6.1.0"))
    return place, None


def _other_release(place: Path) -> tuple[Path, Path | None]:
    write(entry(place) / "release", "6.12.9-other\n")
    return place, None


def _other_modules(place: Path) -> tuple[Path, Path | None]:
    modules(place, "6.1.0")
    return write(place / "bzImage", bzimage(NEW)), place


def _binary_release(place: Path) -> tuple[Path, Path | None]:
    write(entry(place) / "release", b"\xff\xfe")
    return place, None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: (place, None), "no kernel there"),
        (lambda place: (place / "x", None), "no such file or directory"),
        (lambda place: (place, place), "brings its own modules"),
        (_unbuilt, "the kernel tree is not built"),
        (_unbuilt_module, r"a module of the build tree is not there .*kflex.ko"),
        (_two, "more than one kernel: vmlinuz-6.1.0, vmlinuz-6.12.9-kflex"),
        (_other_release, "the modules are of 6.12.9-kflex, the kernel is 6.12.9-other"),
        (_other_modules, "the modules are of 6.1.0, the kernel is 6.12.9-kflex"),
        (_binary_release, "cannot read the kernel's release"),
    ],
)
def test_what_does_not_fit_together_is_one_line(tmp_path: Path, make: object, message: str) -> None:
    assert callable(make)
    where, below = make(tmp_path)
    with pytest.raises(KflexError, match=message):
        source.find(where, below)
