"""Layouts from BTF: C structs as ctypes classes, enums as dictionaries, so that no layout is written twice.

Read from an object file's .BTF section, a raw BTF file (/sys/kernel/btf/vmlinux) or bytes. All classes are
packed with explicit padding, so offsets are exactly the compiler's; ``ctypes.sizeof`` is checked against BTF.

8-bit integers become c_uint8 or c_int8, never c_char: ``bytes(s.key)`` gives all bytes, also behind a NUL.
Pointers become c_uint64.
"""

from __future__ import annotations

import ctypes as c
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kflex_repro.errors import KflexError

(
    _INT,
    _PTR,
    _ARRAY,
    _STRUCT,
    _UNION,
    _ENUM,
    _FWD,
    _TYPEDEF,
    _VOLATILE,
    _CONST,
    _RESTRICT,
    _FUNC,
    _FUNC_PROTO,
    _VAR,
    _DATASEC,
    _FLOAT,
    _DECL_TAG,
    _TYPE_TAG,
    _ENUM64,
) = range(1, 20)
_TRANSPARENT = frozenset({_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG})
_MAGIC = 0xEB9F
# Chains of typedefs and qualifiers are short; a longer one is a circle in damaged data.
_DEPTH = 64

_UNSIGNED = {1: c.c_uint8, 2: c.c_uint16, 4: c.c_uint32, 8: c.c_uint64, 16: c.c_uint64 * 2}
_SIGNED = {1: c.c_int8, 2: c.c_int16, 4: c.c_int32, 8: c.c_int64, 16: c.c_int64 * 2}
_FLOATS = {4: c.c_float, 8: c.c_double}


@dataclass(frozen=True)
class Variable:
    """A global variable in a data section: bytes from the section's start, size in bytes, type id."""

    offset: int
    size: int
    signed: bool
    type_id: int


@dataclass(frozen=True)
class _Type:
    kind: int
    flag: bool
    name: str
    size_or_type: int
    # Of structs and unions: (name, type id, offset in bits, bit-field bits); of enums: (name, value);
    # of sections: (type id, offset, size); of arrays: element type id, count; of integers: encoding, bits.
    members: tuple[Any, ...]


def load(path: Path) -> Btf:
    """The BTF of an ELF object or of a raw BTF file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise KflexError(f"cannot read: {error.strerror}", str(path)) from None
    if data[:4] == b"\x7fELF":
        data = _elf_section(data, path)
    return Btf(data, str(path))


def _elf_section(data: bytes, path: Path) -> bytes:
    import io

    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(data)).get_section_by_name(".BTF")
        if section is not None:
            return bytes(section.data())
    except (
        ELFError,
        ArithmeticError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise KflexError(f"damaged ELF file: {error}", str(path), "run `kflex-repro build --force`") from None
    raise KflexError("the object has no BTF", str(path), "compile it with -g")


class Btf:
    """Parsed BTF. Names that occur several times mean their first definition."""

    def __init__(self, data: bytes, where: str = "BTF") -> None:
        self.where = where
        self._classes: dict[int, Any] = {}
        try:
            self._types = _parse(data)
        except (struct.error, IndexError, ValueError) as error:
            raise KflexError(f"damaged BTF: {error}", where, "run `kflex-repro build --force`") from None
        self._by_name: dict[tuple[str, int], int] = {}
        for number, entry in enumerate(self._types):
            if entry.name:
                self._by_name.setdefault((entry.name, entry.kind), number)

    def _named(self, name: str, *kinds: int) -> int:
        for kind in kinds:
            if (number := self._by_name.get((name, kind))) is not None:
                return number
        raise KflexError(
            f"no type {name} in the BTF", self.where, "the compiler keeps only types that the program uses"
        )

    def __contains__(self, name: str) -> bool:
        return any((name, kind) in self._by_name for kind in range(1, 20))

    def struct(self, name: str) -> type[c.Structure]:
        """The ctypes class of ``struct name`` (or of a typedef to a struct)."""
        made = self._checked(self._named(name, _STRUCT, _TYPEDEF))
        if not (isinstance(made, type) and issubclass(made, c.Structure)):
            raise KflexError(f"{name} is not a struct", self.where)
        return made

    def union(self, name: str) -> type[c.Union]:
        """The ctypes class of ``union name``."""
        made: type[c.Union] = self._checked(self._named(name, _UNION))
        return made

    def enum(self, name: str) -> dict[str, int]:
        """The constants of ``enum name``."""
        return dict(self._types[self._named(name, _ENUM, _ENUM64)].members)

    def typedefs(self, prefix: str) -> list[str]:
        """Names of typedefs that begin with ``prefix``."""
        return [name for name, kind in self._by_name if kind == _TYPEDEF and name.startswith(prefix)]

    def constants(self) -> dict[str, int]:
        """The constants of all enums, the unnamed ones too."""
        found: dict[str, int] = {}
        for entry in self._types:
            if entry.kind in (_ENUM, _ENUM64):
                found.update(entry.members)
        return found

    def declares(self, name: str) -> bool:
        """Whether there is a function or variable of this name: what a program's extern can be bound to."""
        return (name, _FUNC) in self._by_name or (name, _VAR) in self._by_name

    def variables(self, section: str) -> dict[str, Variable]:
        """The variables of a data section (``.rodata``). Offsets need an object that libbpf has opened."""
        found = {}
        for type_id, offset, size in self._types[self._named(section, _DATASEC)].members:
            variable = self._types[type_id]
            base = self._types[self._strip(variable.size_or_type)]
            signed = (base.kind == _INT and bool(base.members[0] & 1)) or (base.kind == _ENUM and base.flag)
            found[variable.name] = Variable(offset, size, signed, variable.size_or_type)
        return found

    def maps(self) -> dict[str, dict[str, int]]:
        """The maps that an object defines: by name, the numbers in its definition (type, max_entries)."""
        section = self._by_name.get((".maps", _DATASEC))
        try:
            members = self._types[section].members if section is not None else ()
            variables = [self._types[number] for number, _, _ in members]
            return {variable.name: self._numbers(variable.size_or_type) for variable in variables}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise KflexError(f"damaged BTF: {error}", self.where, "compile the object again") from None

    def _numbers(self, number: int) -> dict[str, int]:
        """Members of a map's definition that point to an array: a number is said as a bound."""
        found = {}
        for name, member, _, _ in self._types[self._strip(number)].members:
            pointer = self._types[self._strip(member)]
            if pointer.kind == _PTR:
                array = self._types[self._strip(pointer.size_or_type)]
                if array.kind == _ARRAY:
                    found[name] = array.members[1]
        return found

    # --- types to classes ----------------------------------------------------------------------------------

    def _checked(self, number: int) -> Any:
        try:
            return self._class(number)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            MemoryError,
            RecursionError,
        ) as error:
            raise KflexError(
                f"damaged BTF: {type(error).__name__} {error}", self.where, "run `kflex-repro build --force`"
            ) from None

    def _strip(self, number: int) -> int:
        for _ in range(_DEPTH):
            if self._types[number].kind not in _TRANSPARENT:
                return number
            number = self._types[number].size_or_type
        raise ValueError("endless chain of typedefs")

    def _class(self, number: int) -> Any:
        number = self._strip(number)
        if number not in self._classes:
            # A struct can only contain itself through a pointer, not followed here: cycles are damage.
            self._classes[number] = self._make(number)
        return self._classes[number]

    def _make(self, number: int) -> Any:
        entry = self._types[number]
        size = entry.size_or_type
        if entry.kind == _INT:
            encoding, bits = entry.members
            if bits != size * 8:
                raise KflexError(f"bit-field type {entry.name} is not supported", self.where)
            if encoding & 4:
                return c.c_bool
            return (_SIGNED if encoding & 1 else _UNSIGNED)[size]
        if entry.kind in (_ENUM, _ENUM64):
            return (_SIGNED if entry.flag else _UNSIGNED)[size]
        if entry.kind == _FLOAT:
            return _FLOATS[size]
        if entry.kind == _PTR:
            return c.c_uint64
        if entry.kind == _ARRAY:
            element, count = entry.members
            return self._class(element) * count
        if entry.kind in (_STRUCT, _UNION):
            return self._aggregate(entry)
        raise KflexError(
            f"a type of BTF kind {entry.kind} ({entry.name or 'unnamed'}) has no layout", self.where
        )

    def _aggregate(self, entry: _Type) -> Any:
        label = entry.name or "unnamed"
        is_union = entry.kind == _UNION
        fields: list[tuple[str, Any]] = []
        anonymous: list[str] = []
        expected: list[tuple[str, int]] = []
        end = 0

        def pad(until: int) -> None:
            nonlocal end
            if until > end:
                fields.append((f"_pad{end}", c.c_uint8 * (until - end)))
                end = until

        for member, type_id, bit_offset, bits in entry.members:
            if bits or bit_offset % 8:
                raise KflexError(f"bit-field {label}.{member} is not supported", self.where)
            made = self._class(type_id)
            name = member
            if not name:
                name = f"_anonymous{len(fields)}"
                anonymous.append(name)
            if not is_union:
                pad(bit_offset // 8)
                end = bit_offset // 8 + c.sizeof(made)
            expected.append((name, bit_offset // 8))
            fields.append((name, made))
        if is_union:
            fields.append(("_size", c.c_uint8 * entry.size_or_type))
        else:
            pad(entry.size_or_type)
        body: dict[str, Any] = {"_pack_": 1, "_layout_": "ms", "_anonymous_": anonymous, "_fields_": fields}
        made_class = type(label, (c.Union if is_union else c.Structure,), body)
        if c.sizeof(made_class) != entry.size_or_type or any(
            getattr(made_class, name).offset != offset for name, offset in expected
        ):
            raise KflexError(
                f"{label} is laid out as {c.sizeof(made_class)} bytes, BTF says {entry.size_or_type}",
                self.where,
            )
        return made_class


def _parse(data: bytes) -> list[_Type]:
    magic, version, _flags, header, type_at, type_size, string_at, string_size = struct.unpack_from(
        "<HBBIIIII", data
    )
    if sys.byteorder != "little" or magic != _MAGIC or version != 1:
        raise ValueError("not little-endian BTF version 1")
    strings = data[header + string_at : header + string_at + string_size]
    types = [_Type(0, False, "void", 0, ())]

    def text(offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    at, stop = header + type_at, header + type_at + type_size
    if stop > len(data):
        raise ValueError("truncated")
    while at < stop:
        name, info, size_or_type = struct.unpack_from("<III", data, at)
        at += 12
        kind, count, flag = info >> 24 & 31, info & 0xFFFF, bool(info >> 31)
        members: list[Any] = []
        if kind == _INT:
            (word,) = struct.unpack_from("<I", data, at)
            at += 4
            members = [word >> 24 & 15, word & 255]
        elif kind == _ARRAY:
            element, _index, length = struct.unpack_from("<III", data, at)
            at += 12
            members = [element, length]
        elif kind in (_STRUCT, _UNION):
            for _ in range(count):
                member, type_id, offset = struct.unpack_from("<III", data, at)
                at += 12
                bits = offset >> 24 if flag else 0
                members.append((text(member), type_id, offset & 0xFFFFFF if flag else offset, bits))
        elif kind == _ENUM:
            for _ in range(count):
                member, value = struct.unpack_from("<Ii", data, at)
                at += 8
                members.append((text(member), value))
            # Clang before 16 does not say which enums are signed; in standard C their constants are ints.
            flag = flag or any(value < 0 for _, value in members)
        elif kind == _ENUM64:
            for _ in range(count):
                member, low, high = struct.unpack_from("<III", data, at)
                at += 12
                value = high << 32 | low
                members.append((text(member), value - (1 << 64) if flag and value >> 63 else value))
        elif kind == _DATASEC:
            for _ in range(count):
                members.append(struct.unpack_from("<III", data, at))
                at += 12
        elif kind == _FUNC_PROTO:
            at += 8 * count
        elif kind in (_VAR, _DECL_TAG):
            at += 4
        elif not 0 < kind <= _ENUM64:
            raise ValueError(f"unknown kind {kind}")
        types.append(_Type(kind, flag, text(name), size_or_type, tuple(members)))
    return types
