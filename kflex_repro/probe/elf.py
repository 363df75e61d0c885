"""The functions of a program or library: from its symbol tables, with where they are in the file.

Debian strips redis-server, but it exports its functions (``.dynsym``), so they have names all the same. A
``.debug`` file of a -dbgsym package adds the static ones.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kflex_repro.errors import KflexError

_DEBUG = Path("usr/lib/debug/.build-id")


@dataclass(frozen=True)
class Function:
    """``offset`` is in the file, ``address`` what the ELF file calls it; ``aliases`` its other names."""

    name: str
    offset: int
    address: int
    size: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Binary:
    """An ELF file's executable segments as (address, file offset, bytes), and its functions by offset."""

    path: Path
    functions: tuple[Function, ...]
    segments: tuple[tuple[int, int, int], ...]
    build_id: str = ""
    _offsets: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def at(self, offset: int) -> Function | None:
        """The function that a file offset lies in."""
        index = bisect.bisect_right(self._offsets, offset) - 1
        if index < 0:
            return None
        found = self.functions[index]
        # Assembly has symbols without a size: they reach to the next one.
        return found if not found.size or offset < found.offset + found.size else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    import struct

    from elftools.common.exceptions import ELFError
    from elftools.construct import ConstructError
    from elftools.elf.elffile import ELFFile

    try:
        with path.open("rb") as stream:
            yield stream, ELFFile(stream)
    except OSError as error:
        raise KflexError(f"cannot read: {error.strerror}", str(path)) from None
    except (ELFError, ConstructError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise KflexError(f"not a usable ELF file: {error}", str(path)) from None


def _symbols(elf: Any) -> Iterator[tuple[str, int, int]]:
    """(name, address, size) of each function that is defined here."""
    from elftools.elf.sections import SymbolTableSection

    for section in elf.iter_sections():
        if isinstance(section, SymbolTableSection):
            for symbol in section.iter_symbols():
                entry = symbol.entry
                if (
                    entry["st_info"]["type"] == "STT_FUNC"
                    and entry["st_shndx"] != "SHN_UNDEF"
                    and symbol.name
                ):
                    yield symbol.name, entry["st_value"], entry["st_size"]


def _build_id(elf: Any) -> str:
    section = elf.get_section_by_name(".note.gnu.build-id")
    if section is None:
        return ""
    return next((note["n_desc"] for note in section.iter_notes() if note["n_type"] == "NT_GNU_BUILD_ID"), "")


def read(path: Path, root: Path = Path("/")) -> Binary:
    """The functions of ``path``, with its debug symbols if installed under ``root``; KflexError if no ELF."""
    with _opened(path) as (_, elf):
        segments = tuple(
            (segment["p_vaddr"], segment["p_offset"], segment["p_filesz"])
            for segment in elf.iter_segments("PT_LOAD")
            if segment["p_flags"] & 1
        )
        known = list(_symbols(elf))
        build_id = _build_id(elf)
    debug = root / _DEBUG / build_id[:2] / f"{build_id[2:]}.debug"
    if build_id and debug.is_file():
        with _opened(debug) as (_, elf):
            known += _symbols(elf)
    functions = _merged(known, segments)
    return Binary(path, functions, segments, build_id, tuple(one.offset for one in functions))


def _merged(
    known: list[tuple[str, int, int]], segments: tuple[tuple[int, int, int], ...]
) -> tuple[Function, ...]:
    """One function for each address; its name is the first in the alphabet without leading underscores."""
    names: dict[int, set[str]] = {}
    sizes: dict[int, int] = {}
    for name, address, size in known:
        names.setdefault(address, set()).add(name)
        sizes[address] = max(size, sizes.get(address, 0))
    found = []
    for address, called in names.items():
        for start, offset, size in segments:
            if start <= address < start + size:
                first, *others = sorted(called, key=lambda name: (name.startswith("_"), name))
                at = address - start + offset
                found.append(Function(first, at, address, sizes[address], tuple(others)))
    return tuple(sorted(found, key=lambda one: one.offset))
