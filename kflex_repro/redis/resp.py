"""A small strict codec of the Redis protocol (RESP2 and RESP3): encode commands, decode replies as they come.

It is not a client. The tests and the benchmark's checker use it on raw sockets, where a client library would
hide what they look for: the exact bytes, their order, and frames that are wrong. So it accepts only what the
protocol allows (canonical integers, CRLF line ends, known types, bounded lengths) and raises
:class:`ProtocolError` otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kflex_repro.errors import KflexError

__all__ = [
    "MAX_BULK",
    "MAX_DEPTH",
    "MAX_ELEMENTS",
    "Attribute",
    "Decoder",
    "ErrorReply",
    "Map",
    "ProtocolError",
    "Push",
    "Reply",
    "Set",
    "Simple",
    "Verbatim",
    "encode_command",
    "encode_pipeline",
    "encode_reply",
    "strictly_equal",
]

MAX_BULK = 512 * 1024 * 1024
MAX_ELEMENTS = 1024 * 1024
MAX_DEPTH = 32
MAX_LINE = 64 * 1024
"""Longest accepted line, bytes: simple strings, errors, numbers, lengths."""
MAX_DIGITS = 4000
"""Longest accepted integer; Python itself refuses to read ones of more than 4300 digits."""

Argument = bytes | str | int | float
"""What a command's argument may be given as; numbers and text are sent as their UTF-8 text."""

Reply = Any
"""A decoded reply: Simple, ErrorReply, int, bytes (bulk), None (every form of null), list (array), float,
bool, Verbatim, Map, Set, Push or Attribute."""


class ProtocolError(KflexError):
    """The bytes are not RESP. ``offset`` is where in the stream, counted from the decoder's first byte."""

    def __init__(self, what: str, offset: int = 0) -> None:
        self.offset = offset
        super().__init__(what, f"at byte {offset} of the stream")


class Simple(bytes):
    """A simple string (``+OK``): equal to the bytes; :func:`strictly_equal` tells it from a bulk string."""

    def __repr__(self) -> str:
        return f"Simple({bytes(self)!r})"


class ErrorReply(bytes):
    """An error reply, of a line (``-ERR …``) or a bulk (``!``). It is a value: decoding it raises nothing."""

    def __repr__(self) -> str:
        return f"ErrorReply({bytes(self)!r})"

    @property
    def code(self) -> str:
        """Its first word, such as ``WRONGTYPE``."""
        return bytes(self).split(b" ", 1)[0].decode("latin-1")


class Verbatim(bytes):
    """A verbatim string (``=15\\r\\ntxt:…``); ``format`` is its three-letter format."""

    format: str = "txt"

    def __new__(cls, data: bytes, format: str = "txt") -> Verbatim:
        self = super().__new__(cls, data)
        self.format = format
        return self

    def __repr__(self) -> str:
        return f"Verbatim({bytes(self)!r}, {self.format!r})"


class Map(list[tuple[Any, Any]]):
    """A RESP3 map, as its pairs in the order sent (keys may be unhashable)."""


class Set(list[Any]):
    """A RESP3 set, in the order sent."""


class Push(list[Any]):
    """A RESP3 out-of-band push: it answers no command."""


class Attribute(list[tuple[Any, Any]]):
    """A RESP3 attribute: it precedes the reply it describes, and answers no command. (One inside another
    reply is checked and left out: no command of redis-server sends such.)"""


def _argument(value: Argument) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, bool):
        raise TypeError("a bool is no command argument: say '0' or '1'")
    if isinstance(value, float):
        return repr(value).encode()
    return str(value).encode()


def encode_command(*args: Argument) -> bytes:
    """One command as the multibulk request that every client library sends."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        data = arg if type(arg) is bytes else _argument(arg)
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def encode_pipeline(commands: Iterable[Iterable[Argument]]) -> bytes:
    """Several commands, one after the other, as one piece of bytes."""
    return b"".join(encode_command(*command) for command in commands)


def encode_reply(value: Reply, resp3: bool = False) -> bytes:
    """A reply's bytes, as redis-server writes them in RESP2 or RESP3; the reverse of :class:`Decoder`.

    Raises TypeError for a value that the asked version cannot carry.
    """
    if value is None:
        return b"_\r\n" if resp3 else b"$-1\r\n"
    if isinstance(value, bool):
        _needs_resp3(value, resp3)
        return b"#t\r\n" if value else b"#f\r\n"
    if isinstance(value, int):
        if -(1 << 63) <= value < 1 << 63:
            return b":%d\r\n" % value
        _needs_resp3(value, resp3)
        return b"(%d\r\n" % value
    if isinstance(value, float):
        _needs_resp3(value, resp3)
        return b",%b\r\n" % _double(value)
    if isinstance(value, Simple):
        return b"+%b\r\n" % bytes(value)
    if isinstance(value, ErrorReply):
        if b"\r" in value or b"\n" in value:
            _needs_resp3(value, resp3)
            return b"!%d\r\n%b\r\n" % (len(value), bytes(value))
        return b"-%b\r\n" % bytes(value)
    if isinstance(value, Verbatim):
        _needs_resp3(value, resp3)
        return b"=%d\r\n%b:%b\r\n" % (len(value) + 4, value.format.encode("ascii"), bytes(value))
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    if isinstance(value, Map | Attribute):
        _needs_resp3(value, resp3)
        body = b"".join(encode_reply(item, resp3) for pair in value for item in pair)
        return b"%b%d\r\n%b" % (b"%" if isinstance(value, Map) else b"|", len(value), body)
    if isinstance(value, list):
        kind = b"*"
        if isinstance(value, Set | Push):
            _needs_resp3(value, resp3)
            kind = b"~" if isinstance(value, Set) else b">"
        return b"%b%d\r\n%b" % (kind, len(value), b"".join(encode_reply(item, resp3) for item in value))
    raise TypeError(f"{type(value).__name__} is no reply")


def _needs_resp3(value: Reply, resp3: bool) -> None:
    if not resp3:
        raise TypeError(f"RESP2 has no {type(value).__name__}")


def _double(value: float) -> bytes:
    if value != value:
        return b"nan"
    if value in (float("inf"), float("-inf")):
        return b"inf" if value > 0 else b"-inf"
    return repr(value).encode()


def strictly_equal(left: Reply, right: Reply) -> bool:
    """Whether two replies are the same value *of the same type*, all the way down.

    So +OK is not $2 OK, and nan equals nan.
    """
    if type(left) is not type(right):
        return False
    if isinstance(left, list):
        return len(left) == len(right) and all(map(strictly_equal, left, right))
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(strictly_equal, left, right))
    if isinstance(left, Verbatim):
        return bytes(left) == bytes(right) and left.format == right.format
    if isinstance(left, float):
        return left == right or (left != left and right != right)
    return bool(left == right)


class _Open:
    """An aggregate whose elements are still arriving."""

    __slots__ = ("items", "kind", "missing")

    def __init__(self, kind: int, missing: int) -> None:
        self.kind = kind
        self.missing = missing
        self.items: list[Any] = []


class Decoder:
    """Replies out of a byte stream that comes in any pieces.

    ``feed`` takes bytes; ``pop`` gives the next whole reply or :data:`Decoder.INCOMPLETE`. Once a
    :class:`ProtocolError` was raised the stream has no meaning any more: every further call raises it again.
    """

    INCOMPLETE: Any = type(
        "Incomplete", (), {"__repr__": lambda self: "INCOMPLETE", "__bool__": lambda self: False}
    )()

    def __init__(
        self, max_bulk: int = MAX_BULK, max_elements: int = MAX_ELEMENTS, max_depth: int = MAX_DEPTH
    ) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._dropped = 0
        self._stack: list[_Open] = []
        self._max_bulk = max_bulk
        self._max_elements = max_elements
        self._max_depth = max_depth
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the stream."""
        if self._at > 65536:
            self._dropped += self._at
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    @property
    def pending(self) -> int:
        """How many bytes were fed and not yet consumed by a whole token."""
        return len(self._buffer) - self._at

    @property
    def between_replies(self) -> bool:
        """Whether the stream stands exactly at the end of a reply."""
        return not self._stack and self.pending == 0

    def __iter__(self) -> Iterator[Reply]:
        """Every reply that is complete by now."""
        while True:
            reply = self.pop()
            if reply is Decoder.INCOMPLETE:
                return
            yield reply

    def pop(self) -> Reply:
        """The next reply, or ``Decoder.INCOMPLETE`` when its last byte has not come yet."""
        if self._broken is not None:
            raise self._broken
        try:
            return self._pop()
        except ProtocolError as error:
            self._broken = error
            raise

    def _fail(self, what: str) -> ProtocolError:
        return ProtocolError(what, self._dropped + self._at)

    def _pop(self) -> Reply:
        while True:
            token = self._token()
            if token is Decoder.INCOMPLETE:
                return token
            if isinstance(token, _Open):
                if token.missing:
                    if len(self._stack) >= self._max_depth:
                        raise self._fail(f"aggregates nested deeper than {self._max_depth}")
                    self._stack.append(token)
                    continue
                token = self._closed(token)
            while self._stack:
                top = self._stack[-1]
                if not isinstance(token, Attribute):
                    top.items.append(token)
                    top.missing -= 1
                if top.missing:
                    break
                self._stack.pop()
                token = self._closed(top)
            else:
                return token

    def _closed(self, opened: _Open) -> Reply:
        items = opened.items
        kind = opened.kind
        if kind == 0x2A:  # *
            return items
        if kind == 0x7E:  # ~
            return Set(items)
        if kind == 0x3E:  # >
            return Push(items)
        pairs = list(zip(items[::2], items[1::2], strict=True))
        return Map(pairs) if kind == 0x25 else Attribute(pairs)

    def _token(self) -> Any:
        buffer, at = self._buffer, self._at
        end = buffer.find(b"\n", at)
        if end < 0:
            if len(buffer) - at > MAX_LINE:
                raise self._fail(f"a line longer than {MAX_LINE} bytes")
            self._check_type()
            return Decoder.INCOMPLETE
        if end - at > MAX_LINE:
            raise self._fail(f"a line longer than {MAX_LINE} bytes")
        if end == at or buffer[end - 1] != 0x0D:
            raise self._fail("a line that does not end in CRLF")
        kind = buffer[at]
        line = bytes(buffer[at + 1 : end - 1])
        if b"\r" in line:
            raise self._fail("a CR inside a line")
        after = end + 1
        if kind in b"$!=":
            return self._bulk(kind, line, after)
        token = self._line(kind, line)
        self._at = after
        return token

    def _check_type(self) -> None:
        if self.pending and self._buffer[self._at] not in b"+-:$*_,#!=(%~>|":
            raise self._fail(f"unknown reply type {bytes(self._buffer[self._at : self._at + 1])!r}")

    def _bulk(self, kind: int, line: bytes, start: int) -> Any:
        length = self._length(line, self._max_bulk, null=kind == 0x24)
        if length < 0:
            self._at = start
            return None
        end = start + length
        if len(self._buffer) < end + 2:
            return Decoder.INCOMPLETE
        if self._buffer[end : end + 2] != b"\r\n":
            raise self._fail("a bulk string that does not end in CRLF where its length says")
        data = bytes(self._buffer[start:end])
        if kind == 0x3D:
            if length < 4 or data[3:4] != b":":
                raise self._fail("a verbatim string without its format")
            verbatim = Verbatim(data[4:], data[:3].decode("latin-1"))
            self._at = end + 2
            return verbatim
        self._at = end + 2
        return data if kind == 0x24 else ErrorReply(data)

    def _line(self, kind: int, line: bytes) -> Any:
        if kind == 0x2B:  # +
            return Simple(line)
        if kind == 0x2D:  # -
            return ErrorReply(line)
        if kind == 0x3A:  # :
            value = self._integer(line)
            if not -(1 << 63) <= value < 1 << 63:
                raise self._fail("an integer beyond 64 bits")
            return value
        if kind in b"*~>":
            length = self._length(line, self._max_elements, null=kind == 0x2A)
            return None if length < 0 else _Open(kind, length)
        if kind in b"%|":
            return _Open(kind, 2 * self._length(line, self._max_elements // 2))
        if kind == 0x5F:  # _
            if line:
                raise self._fail("a null with content")
            return None
        if kind == 0x23:  # #
            if line not in (b"t", b"f"):
                raise self._fail(f"a boolean {line[:20]!r}")
            return line == b"t"
        if kind == 0x28:  # (
            return self._integer(line)
        if kind == 0x2C:  # ,
            return self._double(line)
        raise self._fail(f"unknown reply type {bytes([kind])!r}")

    def _integer(self, line: bytes) -> int:
        digits = line[1:] if line[:1] == b"-" else line
        if not digits.isdigit() or (digits[:1] == b"0" and line != b"0"):
            raise self._fail(f"not a canonical integer: {line[:40]!r}")
        if len(digits) > MAX_DIGITS:
            raise self._fail(f"an integer of more than {MAX_DIGITS} digits")
        return int(line)

    def _length(self, line: bytes, limit: int, null: bool = False) -> int:
        if null and line == b"-1":
            return -1
        length = self._integer(line)
        if length < 0:
            raise self._fail(f"a negative length: {length}")
        if length > limit:
            raise self._fail(f"a length of {length}, more than {limit}")
        return length

    def _double(self, line: bytes) -> float:
        if line in (b"inf", b"-inf", b"nan"):
            return float(line)
        text = line[1:] if line[:1] == b"-" else line
        mantissa, _, exponent = text.replace(b"E", b"e").partition(b"e")
        whole, dot, fraction = mantissa.partition(b".")
        if not whole.isdigit() or (dot and not fraction.isdigit()):
            raise self._fail(f"not a double: {line[:40]!r}")
        if b"e" in text.lower() and not exponent.removeprefix(b"-").removeprefix(b"+").isdigit():
            raise self._fail(f"not a double: {line[:40]!r}")
        return float(line)
