"""What a kernel is built with, by the names of Debian's and Ubuntu's packages; and the space it takes."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from kflex_repro.build import cache, toolchain
from kflex_repro.build.dependencies import Found, Need, examine, shown, tool
from kflex_repro.build.kernel_source import Arch
from kflex_repro.errors import KflexError

# Measured on Linux 6.12, x86-64, with DWARF 5: what an object takes in the object tree, its share of the
# linked images included, and what the unpacked source takes.
_BYTES_PER_OBJECT = 750_000
_BYTES_OF_SOURCE = 1_750_000_000
# As much again as the longest single file (vmlinux) takes while it is linked: make must not end in ENOSPC.
_RESERVE = 300_000_000


def compiler(arch: Arch) -> toolchain.Tool | None:
    """The C compiler for the kernel."""
    return tool(f"{arch.cross}gcc") if arch.cross else toolchain.find_cc()


def _package(*names: str) -> Callable[[], tuple[str, ...]]:
    return lambda: names


def _program(name: str, package: str, purpose: str) -> Need:
    return Need(name, _package(package), purpose, shown(lambda: tool(name)))


def _present(name: str) -> Callable[[], tuple[str, str]]:
    def probe() -> tuple[str, str]:
        path = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin")
        return path or "", ""

    return probe


def _header(name: str) -> Callable[[], tuple[str, str]]:
    """Whether the machine's own compiler has a header: the kernel's tools are built with it."""
    places = [Path("/usr/include"), Path("/usr/include") / (sysconfig.get_config_var("MULTIARCH") or ".")]

    def probe() -> tuple[str, str]:
        return next((str(place / name) for place in places if (place / name).exists()), ""), ""

    return probe


def look(packed: bool, arch: Arch, wanted: Mapping[str, str]) -> tuple[Found, ...]:
    """Look for all that a build with the options ``wanted`` needs; ``packed``: its source is in a package."""

    def on(name: str) -> bool:
        return wanted.get(name) in ("y", "m")

    needs = [
        Need("C compiler", _package("gcc"), "Kconfig, the kernel's tools", shown(toolchain.find_cc)),
        _program("make", "make", "everything"),
        _program("flex", "flex", "Kconfig"),
        _program("bison", "bison", "Kconfig"),
        _program("bc", "bc", "the kernel's constants"),
        Need("perl", _package("perl"), "the kernel's scripts", _present("perl")),
    ]
    if arch.cross:
        find = shown(lambda: compiler(arch))
        needs.append(Need(f"{arch.cross}gcc", _package(arch.package), f"a kernel for {arch.name}", find))
    if arch.source == "x86" or on("DEBUG_INFO_BTF"):
        needs.append(Need("libelf", _package("libelf-dev"), "objtool, BTF", _header("libelf.h")))
        needs.append(Need("zlib", _package("zlib1g-dev"), "BTF", _header("zlib.h")))
    if on("DEBUG_INFO_BTF"):
        needs.append(_program("pahole", "dwarves", "BTF"))
    if on("MODULE_SIG") or on("SYSTEM_TRUSTED_KEYRING"):
        needs.append(Need("openssl", _package("libssl-dev"), "signatures", _header("openssl/opensslv.h")))
    if on("MODULES"):
        needs.append(Need("depmod", _package("kmod"), "the modules' index", _present("depmod")))
    for option, name, package in (
        ("KERNEL_XZ", "xz", "xz-utils"),
        ("KERNEL_ZSTD", "zstd", "zstd"),
        ("KERNEL_LZ4", "lz4", "lz4"),
        ("MODULE_COMPRESS_XZ", "xz", "xz-utils"),
        ("MODULE_COMPRESS_ZSTD", "zstd", "zstd"),
    ):
        if on(option) and all(need.name != name for need in needs):
            needs.append(Need(name, _package(package), "compression", _present(name)))
    if packed and all(need.name != "xz" for need in needs):
        needs.append(Need("xz", _package("xz-utils"), "the source package", _present("xz")))
    return examine(needs)


def banners(arch: Arch) -> tuple[str, ...]:
    """What identifies the tools whose versions Kconfig writes down."""
    found = (compiler(arch), toolchain.find_cc(), tool(f"{arch.cross}ld"), tool("pahole"))
    return tuple(one.banner if one else "" for one in found)


def space(objects: int, there: int, unpacked: bool) -> int:
    """Bytes that a build of so many objects takes, ``there`` of them made; its source unpacked or not."""
    source = 0 if unpacked else _BYTES_OF_SOURCE
    return source + max(objects - there, 0) * _BYTES_PER_OBJECT + _RESERVE


def demand_space(needed: int) -> None:
    """KflexError, with the figure, where the cache has not so much space left."""
    free = shutil.disk_usage(cache.root()).free
    if free < needed:
        raise KflexError(
            f"the build needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            str(cache.root()),
            "free some space, or set KFLEX_CACHE to another place",
        )
