"""Events out of the kernel's ring buffer: read without a system call for each, decoded, put into words."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kflex_repro.errors import os_failure
from kflex_repro.probe.latency import PHASES
from kflex_repro.redis.resp import Decoder, ProtocolError

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER = 8
_SHOWN = 64  # bytes of an argument or a reply in a line


@dataclass(frozen=True)
class Event:
    """A request as it was answered, or a message that answers none (``pushed``). Times: ns, CLOCK_MONOTONIC.

    ``request`` and ``reply`` are their first bytes as they were on the wire, as far as they may be seen.
    """

    at: int
    conn: int
    pid: int
    server: int
    command: str
    pushed: bool
    phases: Mapping[str, int]
    argc: int
    bytes_in: int
    bytes_out: int
    request: bytes
    reply: bytes

    @property
    def error(self) -> bool:
        """Whether the reply is an error."""
        return self.reply[:1] in (b"-", b"!")


class Ring:
    """The reader's side of a BPF ring buffer (its layout is that of the kernel's documentation)."""

    def __init__(self, fd: int, size: int) -> None:
        self._size = size
        try:
            self._consumer = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._producer = mmap.mmap(
                fd, mmap.PAGESIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE
            )
        except OSError as error:
            raise os_failure("mmap of the ring buffer", error.errno or 0) from None

    def read(self, limit: int = 1 << 20) -> list[bytes]:
        """What is there, at most about ``limit`` bytes: whole records, each once."""
        at = start = int.from_bytes(self._consumer[:8], "little")
        end = int.from_bytes(self._producer[:8], "little")
        found = []
        while at < end and at - start < limit:
            # The data is mapped twice in a row: no record is torn at the end.
            place = mmap.PAGESIZE + (at & self._size - 1)
            (length,) = struct.unpack_from("<I", self._producer, place)
            if length & _BUSY:
                break
            if not length & _DISCARDED:
                found.append(self._producer[place + _HEADER : place + _HEADER + length])
            at += (_HEADER + (length & ~_DISCARDED) + 7) & ~7
        self._consumer[:8] = at.to_bytes(8, "little")
        return found

    def close(self) -> None:
        """Unmap."""
        self._consumer.close()
        self._producer.close()


class Reader:
    """Records into events. ``kind`` is the class of struct kflex_lat_event, ``names`` slot -> command."""

    def __init__(self, kind: type[ctypes.Structure], push: int) -> None:
        self._kind, self._push = kind, push
        self._head = ctypes.sizeof(kind)
        self.names: dict[int, str] = {}

    def decode(self, record: bytes) -> Event:
        """One record; ValueError if it is cut off."""
        head: Any = self._kind.from_buffer_copy(record)
        middle = self._head + head.request_len
        pushed = head.kind == self._push
        return Event(
            at=head.at,
            conn=head.conn,
            pid=head.pid,
            server=head.server,
            command="" if pushed else self.names.get(head.slot, "?"),
            pushed=pushed,
            phases=dict(zip(PHASES, head.phase, strict=True)),
            argc=head.argc,
            bytes_in=head.bytes_in,
            bytes_out=head.bytes_out,
            request=record[self._head : middle],
            reply=record[middle : middle + head.reply_len],
        )


# --- in words ----------------------------------------------------------------------------------------------


def printable(data: bytes, limit: int = _SHOWN) -> str:
    """Bytes for a terminal: quoted if anything in them is not plain, cut at ``limit``."""
    cut = data[:limit]
    text = "".join(chr(byte) if 0x21 <= byte < 0x7F and byte not in b'"\\' else "" for byte in cut)
    if len(text) != len(cut) or not cut:
        text = '"' + "".join(_escaped(byte) for byte in cut) + '"'
    return text + ("…" if len(data) > limit else "")


def _escaped(byte: int) -> str:
    if byte in b'"\\':
        return "\\" + chr(byte)
    if 0x20 <= byte < 0x7F:
        return chr(byte)
    return {10: "\\n", 13: "\\r", 9: "\\t"}.get(byte, f"\\x{byte:02x}")


@dataclass(frozen=True)
class Argument:
    """An argument as far as it was kept: ``size`` bytes, of which ``data`` are known; None: hidden."""

    size: int | None
    data: bytes | None

    def __str__(self) -> str:
        if self.data is None:
            return f"<{self.size} bytes>" if self.size is not None else "<…>"
        cut = self.size is not None and len(self.data) < self.size
        return printable(self.data) + ("…" if cut and len(self.data) <= _SHOWN else "")


def arguments(event: Event) -> list[Argument]:
    """The request's arguments, the name first; those that were cut off or hidden without their bytes."""
    text = event.request
    found = list(_multibulk(text) if text[:1] == b"*" else _inline(text))
    return found + [Argument(None, None)] * (min(event.argc, 64) - len(found))


def _multibulk(text: bytes) -> Iterator[Argument]:
    at = text.find(b"\n") + 1
    while at and text[at : at + 1] == b"$":
        end = text.find(b"\n", at)
        size = text[at + 1 : end].strip()
        if end < 0 or not size.isdigit():
            return
        start = end + 1
        data = text[start : start + int(size)]
        # Hidden arguments end the text right after their header.
        yield Argument(int(size), data if data or size == b"0" else None)
        at = start + int(size) + 2


def _inline(text: bytes) -> Iterator[Argument]:
    for word in text.split():
        yield Argument(len(word), word)


def request_words(event: Event) -> str:
    """``set name os-work``; hidden arguments as ``<7 bytes>``, further ones as their number."""
    words = arguments(event)
    hidden = 0
    while words and words[-1].size is None:
        words.pop()
        hidden += 1
    shown = [str(word) for word in words] or [event.command.lower()]
    more = hidden + max(0, event.argc - 64)
    return " ".join(shown) + (f" (+{more})" if more else "")


def reply_words(event: Event) -> str:
    """``+OK``, ``(nil)``, ``:3``, ``os-work``, ``<64 bytes>``, ``(array of 3)``."""
    data = event.reply
    line, _, rest = data.partition(b"\r\n")
    kind, number = line[:1], line[1:]
    if kind in b"$=!" and number.isdigit():
        size = int(number)
        if not rest and size:
            return f"<{size} bytes>"
        return str(Argument(size, rest[:size]))
    if (kind in b"$*" and number == b"-1") or kind == b"_":
        return "(nil)"
    if kind in b"*~>%|" and kind and number.isdigit():
        names = {b"*": "array", b"~": "set", b">": "push", b"%": "map", b"|": "attribute"}
        elements = _elements(data, event.bytes_out)
        return elements or f"({names[kind]} of {int(number)})"
    text = "".join(_escaped(byte) for byte in line)
    return text + ("…" if len(line) == len(data) < event.bytes_out else "")


def _elements(data: bytes, size: int) -> str:
    """A small aggregate that was kept whole, in words; "" otherwise."""
    if len(data) != size:
        return ""
    decoder = Decoder()
    decoder.feed(data)
    try:
        value = decoder.pop()
    except ProtocolError:
        return ""
    return "" if value is Decoder.INCOMPLETE else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return printable(bytes(value))
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, tuple):
        return ": ".join(_value(item) for item in value)
    return "(nil)" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def microseconds(ns: float) -> str:
    """``21.4 µs``, ``3.20 ms``, ``1.50 s``."""
    if ns < 1e6:
        return f"{ns / 1e3:.1f} µs"
    return f"{ns / 1e6:.2f} ms" if ns < 1e9 else f"{ns / 1e9:.2f} s"


def line(event: Event) -> str:
    """``set name os-work  +OK  21.4 µs (queue 9.1, exec 1.2, reply 2.0)``."""
    if event.pushed:
        return f"(pushed)  {reply_words(event)}"
    split = ", ".join(f"{name} {event.phases[name] / 1e3:.1f}" for name in PHASES[1:])
    return f"{request_words(event)}  {reply_words(event)}  {microseconds(event.phases['total'])} ({split})"


def as_dict(event: Event) -> dict[str, Any]:
    """For --json: times in µs, arguments as text (\\x escapes); null: not to be seen."""
    found: dict[str, Any] = {
        "type": "push" if event.pushed else "reply",
        "at": event.at / 1e9,
        "pid": event.pid,
        "server": event.server,
        "connection": event.conn,
        "reply": reply_words(event),
        "bytes_out": event.bytes_out,
    }
    if event.pushed:
        return found
    return {
        **found,
        "command": event.command,
        "arguments": [
            None if one.data is None else "".join(_escaped(byte) for byte in one.data)
            for one in arguments(event)[1:]
        ],
        "argc": event.argc,
        "error": event.error,
        "bytes_in": event.bytes_in,
        "us": {name: round(ns / 1e3, 1) for name, ns in event.phases.items()},
    }
