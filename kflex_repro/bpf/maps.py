"""Maps: of an opened object, of a pin, or made here."""

from __future__ import annotations

import ctypes as c
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kflex_repro.bpf import fs, libbpf
from kflex_repro.bpf.libbpf import check
from kflex_repro.errors import KflexError, os_failure

_ENOENT = 2


class Map:
    """One BPF map.

    A map of an Object exists in the kernel once the object is loaded, and the object owns its descriptor; one
    from ``from_pin`` or ``create`` owns its own (``close()``, or use it as a context manager).
    Keys and values are bytes of exactly ``key_size`` and ``value_size``.
    """

    def __init__(self, *, pointer: int | None = None, fd: int = -1, name: str = "") -> None:
        self._pointer = pointer
        self._fd = fd
        self._info: libbpf.MapInfo | None = None
        self._name = name
        self._pin: Path | None = None

    def __repr__(self) -> str:
        return f"<Map {self.name} {self.type_name} {self.max_entries} x {self.value_size}>"

    # --- where it comes from -------------------------------------------------------------------------------

    @classmethod
    def from_pin(cls, path: Path) -> Map:
        """The map pinned at ``path``."""
        opened = cls(fd=fs.get_pinned(path, "map"))
        opened._pin = path
        return opened

    @classmethod
    def create(
        cls, type: int, key_size: int, value_size: int, max_entries: int, flags: int = 0, name: str = ""
    ) -> Map:
        """A new map in the kernel (no BTF); it lives as long as its descriptor or a pin of it."""
        opts = libbpf.MapCreateOpts(sz=c.sizeof(libbpf.MapCreateOpts), map_flags=flags)
        fd = libbpf.library().bpf_map_create(
            type, name.encode() or None, key_size, value_size, max_entries, c.byref(opts)
        )
        label = f"{name or 'map'}: type {type}, {max_entries} x {value_size} bytes"
        return cls(fd=check(fd, "bpf_map_create", label), name=name)

    def close(self) -> None:
        """Close a descriptor of our own; for a map of an Object, forget it (Object.close() calls this)."""
        if self._pointer is None and self._fd >= 0:
            os.close(self._fd)
        self._pointer, self._fd = None, -1

    def __enter__(self) -> Map:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what it is ----------------------------------------------------------------------------------------

    @property
    def fd(self) -> int:
        """The descriptor; a KflexError before load and after close."""
        if self._fd < 0 and self._pointer:
            self._fd = libbpf.library().bpf_map__fd(self._pointer)
        if self._fd < 0:
            raise KflexError("the map is not in the kernel", self._name, "load the object first")
        return self._fd

    def _read(self, field: str) -> int:
        """A definition's field: of the opened object before load, of the kernel's map after."""
        if self._pointer and libbpf.library().bpf_map__fd(self._pointer) < 0:
            return int(getattr(libbpf.library(), f"bpf_map__{field}")(self._pointer))
        return int(getattr(self.info, field))

    @property
    def info(self) -> libbpf.MapInfo:
        """The kernel's struct bpf_map_info."""
        if self._info is None:
            info = libbpf.MapInfo()
            libbpf.object_info(self.fd, info, self._name or "map")
            self._info = info
        return self._info

    @property
    def name(self) -> str:
        """The name in the object (``.rodata`` and the like without its prefix), else the kernel's."""
        return self._name or str(self.info.name.decode())

    @property
    def type(self) -> int:
        """The map type, see libbpf.MapType."""
        return self._read("type")

    @property
    def type_name(self) -> str:
        """The map type's name, e.g. ``array``."""
        text: bytes | None = libbpf.library().libbpf_bpf_map_type_str(self.type)
        return text.decode() if text else f"type {self.type}"

    @property
    def key_size(self) -> int:
        """Bytes of a key (0 for queues and stacks)."""
        return self._read("key_size")

    @property
    def value_size(self) -> int:
        """Bytes of a value."""
        return self._read("value_size")

    @property
    def max_entries(self) -> int:
        """How many entries fit."""
        return self._read("max_entries")

    @property
    def map_flags(self) -> int:
        """BPF_F_* flags."""
        return self._read("map_flags")

    @property
    def id(self) -> int:
        """The kernel's id of the map."""
        return int(self.info.id)

    # --- before load ---------------------------------------------------------------------------------------

    def _opened(self, call: str) -> int:
        if not self._pointer or libbpf.library().bpf_map__fd(self._pointer) >= 0:
            raise KflexError(f"{call} after the map is in the kernel", self._name, "call it before load()")
        return self._pointer

    def set_max_entries(self, count: int) -> None:
        """Resize before load."""
        pointer = self._opened("set_max_entries")
        check(libbpf.library().bpf_map__set_max_entries(pointer, count), "set_max_entries", self._name)

    def set_value_size(self, size: int) -> None:
        """Change the bytes of a value before load."""
        pointer = self._opened("set_value_size")
        check(libbpf.library().bpf_map__set_value_size(pointer, size), "set_value_size", self._name)

    def set_autocreate(self, create: bool) -> None:
        """Whether load() makes this map at all."""
        pointer = self._opened("set_autocreate")
        check(libbpf.library().bpf_map__set_autocreate(pointer, create), "set_autocreate", self._name)

    def reuse(self, other: Map) -> None:
        """Before load: use ``other``, of the same definition, in place of a new map."""
        pointer = self._opened("reuse")
        check(libbpf.library().bpf_map__reuse_fd(pointer, other.fd), "bpf_map__reuse_fd", self._name)

    # --- entries -------------------------------------------------------------------------------------------

    @property
    def per_cpu(self) -> bool:
        """Whether every possible CPU has its own value."""
        return self.type in libbpf.PER_CPU_TYPES

    @property
    def stride(self) -> int:
        """Bytes from one element to the next, in the mapping of an array and between per-CPU values."""
        return (self.value_size + 7) & ~7

    def _key(self, key: bytes) -> bytes:
        if len(key) != self.key_size:
            raise KflexError(f"a key of {len(key)} bytes, the map has keys of {self.key_size}", self.name)
        return key

    def _value_buffer(self) -> c.Array[c.c_char]:
        size = self.stride * possible_cpus() if self.per_cpu else self.value_size
        return c.create_string_buffer(size)

    def _values(self, buffer: c.Array[c.c_char]) -> bytes | list[bytes]:
        if not self.per_cpu:
            return buffer.raw
        raw, step, size = buffer.raw, self.stride, self.value_size
        return [raw[at : at + size] for at in range(0, len(raw), step)]

    def lookup(self, key: bytes) -> bytes | list[bytes] | None:
        """The value of ``key``, None if there is none; of a per-CPU map one value for each possible CPU."""
        buffer = self._value_buffer()
        result = libbpf.library().bpf_map_lookup_elem(self.fd, self._key(key), buffer)
        if result == -_ENOENT:
            return None
        check(result, "bpf_map_lookup_elem", self.name)
        return self._values(buffer)

    def get(self, key: bytes) -> bytes | None:
        """``lookup`` of a map that is not per-CPU."""
        value = self.lookup(key)
        if isinstance(value, list):
            raise KflexError("a per-CPU map has no single value", self.name, "use lookup()")
        return value

    def update(self, key: bytes, value: bytes | Sequence[bytes], flags: int = 0) -> None:
        """Set the value of ``key``; of a per-CPU map one value for each possible CPU."""
        if isinstance(value, bytes | bytearray | memoryview):
            data = bytes(value)
            expected = self.value_size
            if self.per_cpu:
                raise KflexError("a per-CPU map takes one value for each possible CPU", self.name)
        else:
            data = b"".join(item.ljust(self.stride, b"\0") for item in value)
            expected = self.stride * possible_cpus()
        if len(data) != expected:
            raise KflexError(f"a value of {len(data)} bytes, the map takes {expected}", self.name)
        result = libbpf.library().bpf_map_update_elem(self.fd, self._key(key), data, flags)
        check(result, "bpf_map_update_elem", self.name)

    def delete(self, key: bytes) -> bool:
        """Delete an entry; False if there was none."""
        result = libbpf.library().bpf_map_delete_elem(self.fd, self._key(key))
        if result == -_ENOENT:
            return False
        check(result, "bpf_map_delete_elem", self.name)
        return True

    def push(self, value: bytes) -> None:
        """Append to a queue or stack; ``errno`` of the error is E2BIG when it is full."""
        if len(value) != self.value_size:
            raise KflexError(f"a value of {len(value)} bytes, the map takes {self.value_size}", self.name)
        check(libbpf.library().bpf_map_update_elem(self.fd, None, value, 0), "push", self.name)

    def pop(self) -> bytes | None:
        """Take the next value of a queue or stack, None when it is empty."""
        buffer = c.create_string_buffer(self.value_size)
        result = libbpf.library().bpf_map_lookup_and_delete_elem(self.fd, None, buffer)
        if result == -_ENOENT:
            return None
        check(result, "pop", self.name)
        return buffer.raw

    def keys(self) -> Iterator[bytes]:
        """All keys. With concurrent writers some may be met twice or not at all."""
        size, current = self.key_size, None
        following = c.create_string_buffer(size)
        while True:
            result = libbpf.library().bpf_map_get_next_key(self.fd, current, following)
            if result == -_ENOENT:
                return
            check(result, "bpf_map_get_next_key", self.name)
            current = following.raw
            yield current

    # --- memory --------------------------------------------------------------------------------------------

    def mmap(self, writable: bool = True) -> memoryview:
        """The whole array as memory shared with the kernel, rounded up to pages; element i is at i * stride.

        The mapping lives as long as views of it, also after the map's descriptor is closed.
        """
        if self.type != libbpf.MapType.ARRAY or not self.map_flags & libbpf.BPF_F_MMAPABLE:
            raise KflexError("only an array map with BPF_F_MMAPABLE can be mapped", self.name)
        size = -(-self.stride * self.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            area = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED, prot=protection)
        except OSError as error:
            raise os_failure("mmap of the map", error.errno or 0, f"{self.name}, {size} bytes") from None
        return memoryview(area)

    # --- pins ----------------------------------------------------------------------------------------------

    def pin(self, path: Path) -> None:
        """Pin on bpffs."""
        fs.pin(self.fd, path, f"map {self.name}")
        self._pin = path

    def unpin(self) -> None:
        """Remove the pin made by pin(), or the one it was opened from."""
        if self._pin is not None:
            fs.unpin(self._pin)
            self._pin = None


def possible_cpus() -> int:
    """The CPUs that may ever be there: a per-CPU map has a value for each."""
    return check(libbpf.library().libbpf_num_possible_cpus(), "libbpf_num_possible_cpus")
