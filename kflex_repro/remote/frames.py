"""What the two sides say to each other, over the standard input and output of one SSH command.

A frame is a kind (one byte), a length (32 bits, big-endian) and so many bytes. Before the agent's first frame
comes ``MAGIC``: what a login shell prints before it is skipped.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

PROTOCOL = 1
MAGIC = b"\0kflex-remote\0"

# To the agent. REQUEST: what to run. DONE: the results are here, remove them.
REQUEST, INTERRUPT, WINDOW, DONE = b"R", b"I", b"W", b"D"
# From the agent. STARTED: pid and directory. FINISHED: exit code and the results' sizes and digests.
HELLO, STARTED, OUT, ERR, FINISHED, FAILED = b"H", b"S", b"o", b"e", b"F", b"X"
# Both ways, so that a connection that is gone without a word is noticed on both sides.
ALIVE = b"K"
ALIVE_S = 5.0
SILENCE_S = 20.0

# In an argument: the agent's directory for results. No argument of a command can contain it.
WORK = "\0"
# Made in that directory over a second connection, where the first one broke: as good as DONE.
FETCHED = ".fetched"
# How long results wait for such a second connection.
LINGER_S = 60.0

_HEADER = struct.Struct(">cI")
_LARGEST = 64 << 20


class Garbage(Exception):
    """What arrived is no frame."""


def encode(kind: bytes, payload: bytes | dict[str, Any] = b"") -> bytes:
    """A frame; a dict goes as JSON."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return _HEADER.pack(kind, len(data)) + data


class Decoder:
    """Frames out of a stream that is cut anywhere."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The frames that are whole with ``data``. Garbage if there cannot be any."""
        self._data += data
        while len(self._data) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._data)
            if length > _LARGEST:
                raise Garbage(f"a frame of {length} bytes")
            end = _HEADER.size + length
            if len(self._data) < end:
                return
            payload = bytes(self._data[_HEADER.size : end])
            del self._data[:end]
            yield kind, payload


def decode(payload: bytes) -> dict[str, Any]:
    """The JSON object of a frame. Garbage if it is none."""
    try:
        value = json.loads(payload)
    except ValueError:
        raise Garbage("no JSON") from None
    if not isinstance(value, dict):
        raise Garbage("no JSON object")
    return value
