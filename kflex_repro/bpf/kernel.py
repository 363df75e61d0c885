"""What the running kernel knows by name: map types, and the functions that programs call (kfuncs).

By name, because numbers lie: KFlex's heap took the number after the arena's, which is another type in newer
kernels.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.bpf import btf
from kflex_repro.errors import KflexError, Unavailable

KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")
_KALLSYMS = Path("/proc/kallsyms")
HEAP_TYPE = "BPF_MAP_TYPE_HEAP"


@dataclass(frozen=True)
class Lacking:
    """A function or variable of the kernel that ``objects`` need and that it does not have."""

    name: str
    objects: tuple[str, ...]


@functools.cache
def _types(path: Path) -> btf.Btf:
    """The running kernel's BTF. Unavailable where it has none."""
    if not path.exists():
        raise Unavailable("the kernel has no BTF", str(path), "boot a kernel with CONFIG_DEBUG_INFO_BTF=y")
    return btf.load(path)


def map_type(name: str) -> int | None:
    """The number of a map type (``BPF_MAP_TYPE_ARENA``) in the running kernel; None where it has none."""
    # Reading the whole BTF takes a second; a name that is nowhere in it needs none of that.
    with contextlib.suppress(OSError):
        if f"\0{name}\0".encode() not in KERNEL_BTF.read_bytes():
            return None
    return _types(KERNEL_BTF).enum("bpf_map_type").get(name)


def externs(path: Path) -> set[str]:
    """The kernel's functions and variables that an object cannot do without (weak ones are not meant)."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    try:
        table = ELFFile(io.BytesIO(path.read_bytes())).get_section_by_name(".symtab")
        symbols = list(table.iter_symbols()) if isinstance(table, SymbolTableSection) else []
    except OSError as error:
        raise KflexError(f"cannot read: {error.strerror}", str(path)) from None
    except (ELFError, ValueError) as error:
        raise KflexError(f"not a usable object file: {error}", str(path), "build it again") from None
    return {
        symbol.name
        for symbol in symbols
        if symbol.name and symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
    }


def lacking(objects: Iterable[Path]) -> list[Lacking]:
    """What the objects call in the kernel, and this kernel does not have."""
    wanted: dict[str, list[str]] = {}
    for file in sorted(objects):
        for name in externs(file):
            wanted.setdefault(name, []).append(file.name)
    unbound = {name for name in wanted if not _types(KERNEL_BTF).declares(name)}
    # Symbols without a type are bound by kallsyms.
    if unbound:
        with _KALLSYMS.open() as stream:
            unbound.difference_update(line.split()[2] for line in stream if line.count(" ") >= 2)
    return [Lacking(name, tuple(wanted[name])) for name in sorted(unbound)]
