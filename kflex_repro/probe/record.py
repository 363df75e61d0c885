"""Recordings: the events as the kernel wrote them, in chunks, so that keeping up costs little.

A file is a line of JSON that describes it, then chunks: a byte for the kind, four for the length
(little-endian), the content. One that was cut off (a full disk, kill -9) can be replayed up to there.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kflex_repro.errors import KflexError, os_failure
from kflex_repro.probe.events import Event, Reader
from kflex_repro.probe.targets import Server

_MAGIC = "kflex-repro monitor"
_SCHEMA = 1
_RECORDS, _NAMES, _TOTALS = b"R", b"N", b"T"
_MAX_CHUNK = 64 << 20


class Writer:
    """A new recording; it must not exist. ``fields`` is the layout of an event's head."""

    def __init__(
        self,
        path: Path,
        kind: type[ctypes.Structure],
        constants: Mapping[str, int],
        servers: Sequence[Server],
    ) -> None:
        self.path = path
        head = {
            "what": _MAGIC,
            "schema": _SCHEMA,
            "abi": constants["KFLEX_LAT_ABI"],
            "push": constants["KFLEX_LAT_K_PUSH"],
            "head": _layout(kind),
            "size": ctypes.sizeof(kind),
            "wall": time.time(),
            "monotonic": time.monotonic(),
            "servers": [{"port": one.port, "pid": one.pid, "name": one.name} for one in servers],
        }
        try:
            # What is recorded may be somebody's data.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise KflexError("the file exists", str(path), "choose another name for --record") from None
        except OSError as error:
            raise os_failure("open", error.errno or 0, str(path)) from None
        self._file = os.fdopen(fd, "wb", buffering=1 << 20)
        self._file.write(json.dumps(head).encode() + b"\n")
        self._names: dict[int, str] = {}

    def _chunk(self, kind: bytes, data: bytes) -> None:
        try:
            self._file.write(kind + struct.pack("<I", len(data)) + data)
        except OSError as error:
            raise os_failure("write", error.errno or 0, str(self.path)) from None

    def add(self, records: Iterable[bytes], names: Mapping[int, str]) -> None:
        """Append records whose commands are named by ``names``."""
        if dict(names) != self._names:
            self._names = dict(names)
            self._chunk(_NAMES, json.dumps(self._names).encode())
        data = b"".join(struct.pack("<H", len(record)) + record for record in records)
        if data:
            self._chunk(_RECORDS, data)

    def close(self, totals: Mapping[str, Any]) -> None:
        """Say how it ended, and close."""
        try:
            self._chunk(_TOTALS, json.dumps(dict(totals)).encode())
            self._file.close()
        except OSError as error:
            raise os_failure("write", error.errno or 0, str(self.path)) from None


def _layout(kind: type[ctypes.Structure]) -> list[list[Any]]:
    fields = []
    for name, type_, *_ in kind._fields_:
        count = getattr(type_, "_length_", 0)
        fields.append([name, ctypes.sizeof(type_) // (count or 1), count])
    return fields


def _class(layout: Sequence[Sequence[Any]], size: int) -> type[ctypes.Structure]:
    """The class of a recorded layout, so that recordings outlive the program that made them."""
    integers: dict[int, Any] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
    fields = [(name, integers[width] * count if count else integers[width]) for name, width, count in layout]
    body = {"_pack_": 1, "_layout_": "ms", "_fields_": fields}
    made: type[ctypes.Structure] = type("event", (ctypes.Structure,), body)
    if ctypes.sizeof(made) != size:
        raise ValueError("layout and size differ")
    return made


class Recording:
    """A recording to replay: ``events()`` in their order; afterwards ``totals`` ({} if it was cut off)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise os_failure("open", error.errno or 0, str(path)) from None
        try:
            head = json.loads(self._file.readline(1 << 16))
            if head["what"] != _MAGIC:
                raise ValueError
            if head["schema"] != _SCHEMA:
                raise KflexError(
                    f"a recording of another version ({head['schema']})", str(path), "replay it with that one"
                )
            self._reader = Reader(_class(head["head"], int(head["size"])), int(head["push"]))
            self.offset = float(head["wall"]) - float(head["monotonic"])
            self.servers: list[dict[str, Any]] = list(head["servers"])
        except (ValueError, KeyError, TypeError):
            self._file.close()
            raise KflexError("not a recording of `monitor --record`", str(path)) from None
        self.totals: dict[str, Any] = {}
        self.cut_off = False

    def events(self) -> Iterator[Event]:
        """Every event; the incomplete end of a file that was cut off is left out."""
        try:
            for kind, data in self._chunks():
                if kind == _NAMES:
                    self._reader.names = {int(slot): name for slot, name in json.loads(data).items()}
                elif kind == _TOTALS:
                    self.totals = json.loads(data)
                elif kind == _RECORDS:
                    yield from self._decoded(data)
                else:
                    raise ValueError
        except (ValueError, struct.error):
            raise KflexError("a damaged recording", str(self.path)) from None

    def _decoded(self, data: bytes) -> Iterator[Event]:
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<H", data, at)
            yield self._reader.decode(data[at + 2 : at + 2 + length])
            at += 2 + length

    def _chunks(self) -> Iterator[tuple[bytes, bytes]]:
        while head := self._file.read(5):
            length = int.from_bytes(head[1:], "little")
            if len(head) == 5 and length > _MAX_CHUNK:
                raise ValueError
            data = self._file.read(length) if len(head) == 5 else b""
            if len(head) < 5 or len(data) < length:
                break
            yield head[:1], data
        self.cut_off = not self.totals

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
