"""What can happen in a log: map creations, mmaps and searches, other failures, facts about the machine."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

Form = Literal["trace", "strace", "libbpf", "kernel", "text"]

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_FIXED_NOREPLACE = 0x100000
# The value of a limit that is none.
UNLIMITED = -1


@dataclass(frozen=True)
class MapCreate:
    """One map creation; None is what the log does not say. ``errno`` 0 is success."""

    name: str
    errno: int
    type: int | None = None
    type_name: str = ""
    value_size: int | None = None
    entries: int | None = None
    flags: int | None = None
    bytes: int | None = None
    pid: int = 0
    line: int = 0
    form: Form = "text"


class Mmap(NamedTuple):
    """One mmap call, a search's try or not; ``length`` and ``flags`` None where the log does not say.

    A tuple, because a log can have millions of them.
    """

    map: str
    errno: int
    length: int | None = None
    hint: int = 0
    flags: int | None = None
    fd: int = -1
    address: int | None = None
    pid: int = 0
    tid: int = 0
    line: int = 0
    form: Form = "text"


@dataclass(frozen=True)
class Search:
    """Consecutive mmaps of one length by one thread: where it looked, and what it got.

    ``tries`` 0: the log has only the search's end. ``step`` is signed, bytes; ``line`` that of the first try.
    """

    map: str
    errno: int
    length: int | None = None
    first: int = 0
    last: int = 0
    step: int = 0
    tries: int = 0
    flags: int | None = None
    fd: int = -1
    address: int | None = None
    pid: int = 0
    line: int = 0
    form: Form = "text"


@dataclass(frozen=True)
class Failure:
    """Any other failed call or message that matters; ``size`` in bytes where it names one."""

    call: str
    errno: int
    detail: str
    size: int | None = None
    pid: int = 0
    line: int = 0
    form: Form = "text"


@dataclass(frozen=True)
class Fact:
    """Something the log says about its machine: ``ram_total``, ``kernel``, ``rlimit_as``, …"""

    key: str
    value: int | str
    text: str
    line: int = 0


@dataclass(frozen=True)
class Definition:
    """A map's attribute as libbpf's debug output prints it."""

    map: str
    attribute: str
    value: int


@dataclass(frozen=True)
class Unmap:
    """A successful munmap; ``Failure`` of it is of no interest."""

    pid: int


Event = MapCreate | Mmap | Failure | Fact | Definition | Unmap


def map_bytes(entries: int, value_size: int) -> int:
    """The bytes of an array-like map: values rounded up to 8, the whole to pages."""
    return -(-entries * ((value_size + 7) & ~7) // 4096) * 4096


def describe(event: MapCreate | Search | Failure) -> str:
    """The event in a few words, with its line."""
    error = errno_name(event.errno)
    where = f"line {event.line}: " if event.line else ""
    if isinstance(event, MapCreate):
        name = f" '{event.name}'" if event.name else ""
        asked = f" of {size_text(event.bytes)}" if event.bytes is not None else ""
        numbers = (
            f" ({event.entries} x {event.value_size} bytes)" if event.entries and event.value_size else ""
        )
        kind = f"type {event.type_name or event.type}" if event.type_name or event.type is not None else ""
        return f"{where}creating map{name}{asked}{numbers}{', ' + kind if kind else ''}: {error}"
    if isinstance(event, Search):
        name = f" map '{event.map}'" if event.map else ""
        length = f" {size_text(event.length)}" if event.length is not None else ""
        if event.tries > 1:
            looked = f", {event.tries} tries from {event.first:#x} to {event.last:#x}"
        elif event.tries:
            looked = f" at {event.first:#x}" if event.first else ", address left to the kernel"
        else:
            looked = ""
        return f"{where}mmap of{name}{length}{looked}: {error}"
    return f"{where}{event.call}: {error if event.errno else ''} {event.detail}".replace(":  ", ": ").strip()


def errno_name(code: int) -> str:
    """``ENOMEM (Cannot allocate memory)``."""
    return f"{errno.errorcode.get(code, f'errno {code}')} ({os.strerror(code)})"


def size_text(size: int | None) -> str:
    """Bytes for people: ``4 GiB``, ``256 MiB``, ``23.5 GiB``."""
    if size is None:
        return "unknown size"
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            # 1024 GiB is said as 1 TiB, 262144 GiB as 256 TiB: the unit that gives the shortest number.
            return f"{size / unit:.1f} {name}".replace(".0 ", " ")
    return f"{size} B"
