"""Places in a C or C++ file: functions, calls, macros, strings, includes, initializers, as byte ranges.

Functions are libclang's where it can make them out, else found in its tokens: a function of the artifact may
return a type of a header that is not there. Calls, strings and includes are found in the tokens: comments,
directives and code that is not compiled never match, and a macro is called like a function.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kflex_repro.patching import clang
from kflex_repro.patching.clang import Span, Token

# Where the artifact and libbpf keep their headers; those that are there are searched.
INCLUDE = (
    "include",
    "bpf/include",
    "bpf",
    "libbpf/src",
    "libbpf/include",
    "libbpf/include/uapi",
    "tools/include",
    "tools/include/uapi",
    "tools/lib/bpf",
)
_CPP = {".cpp", ".cc", ".cxx", ".hpp", ".hh"}
_OPEN = {b"(": b")", b"[": b"]", b"{": b"}"}
_CLOSE = {close: start for start, close in _OPEN.items()}
# What may stand between a function's parameters and its body.
_TRAILER = {b"const", b"noexcept", b"override", b"final", b"volatile", b"&", b"&&"}
_KEYWORDS = {b"if", b"while", b"for", b"switch", b"return", b"sizeof", b"catch", b"else", b"do"}


@dataclass(frozen=True)
class Function:
    """A definition, ``start`` to ``end``; ``entry`` is behind its opening brace, ``leave`` at the other."""

    start: int
    end: int
    entry: int
    leave: int


@dataclass(frozen=True)
class Call:
    """A call of a function, method or macro.

    ``start`` to ``end`` is the whole expression with what the callee is taken from: ``receiver``, without the
    operator, an empty span where there is none.
    """

    start: int
    end: int
    callee: Span
    receiver: Span
    arguments: tuple[Span, ...]


@dataclass(frozen=True)
class Include:
    """An ``#include`` line, without its end; ``name`` as between the brackets or quotes."""

    start: int
    end: int
    name: str


def flags(root: Path, path: str) -> tuple[str, ...]:
    """Compiler flags to read a file of a tree with."""
    name = PurePosixPath(path)
    found = [
        f"-I{root / name.parent}",
        *(f"-I{root / place}" for place in INCLUDE if (root / place).is_dir()),
    ]
    if name.suffix in _CPP:
        # Not the C++ library's headers: a second each time, and no place depends on them.
        return ("-xc++", "-std=c++20", "-nostdinc++", *found)
    return ("-xc", *(("-target", "bpf") if ".bpf." in name.name else ()), *found)


class Source:
    """One file of a tree, parsed from bytes in memory."""

    def __init__(
        self, root: Path, path: str, data: bytes, overlay: Mapping[str, bytes] | None = None
    ) -> None:
        self.path = path
        self.data = data
        others = {root / name: content for name, content in (overlay or {}).items() if name != path}
        self.unit = clang.parse(root / path, data, flags(root, path), others)
        self._all = self.unit.tokens()
        lines = _Lines(data)
        skipped = self.unit.skipped()
        self._directives: list[list[Token]] = []
        self.tokens: list[Token] = []
        until = -1
        last: Token | None = None
        for token in self._all:
            if token.kind == "comment":
                continue
            if token.start < until:
                self._directives[-1].append(token)
                continue
            if token.text in (b"#", b"%:") and (last is None or lines.between(last.end, token.start)):
                until = lines.logical_end(token.start)
                self._directives.append([token])
            elif not any(span.start <= token.start < span.end for span in skipped):
                self.tokens.append(token)
            last = token
        self._starts = [token.start for token in self.tokens]
        self._pairs = _pairs(self.tokens)
        self._functions: dict[str, list[Any]] | None = None

    @property
    def newline(self) -> bytes:
        """How most of the file's lines end."""
        return b"\r\n" if 2 * self.data.count(b"\r\n") > self.data.count(b"\n") else b"\n"

    def line(self, offset: int) -> int:
        """The line number of a byte."""
        return self.data.count(b"\n", 0, offset) + 1

    def text(self, span: Span) -> bytes:
        """The bytes of a span."""
        return self.data[span.start : span.end]

    def functions(self, name: str) -> list[Function]:
        """Definitions of a function or method, by its name without class and namespace."""
        found = list(self._functions_by_cursor(name))
        return sorted(found or self._functions_by_token(name), key=lambda function: function.start)

    def _functions_by_cursor(self, name: str) -> Iterator[Function]:
        if self._functions is None:
            self._functions = {}
            for cursor in self.unit.functions():
                self._functions.setdefault(cursor.spelling, []).append(cursor)
        for cursor in self._functions.get(name, ()):
            start, end = cursor.extent.start.offset, cursor.extent.end.offset
            at = self._at(cursor.location.offset)
            while at < len(self.tokens) and self.tokens[at].start < end:
                close = self._pairs.get(at)
                # Recovery may end a body elsewhere than its brace.
                if self.tokens[at].text == b"{" and close is not None and self.tokens[close].end == end:
                    yield Function(start, end, self.tokens[at].end, self.tokens[close].start)
                    break
                at += 1

    def _functions_by_token(self, name: str) -> Iterator[Function]:
        tokens = self.tokens
        for i, token in enumerate(tokens):
            if token.text != name.encode() or not self._followed_by(i, b"(") or i + 1 not in self._pairs:
                continue
            if i and tokens[i - 1].text in (b".", b"->", b"(", b",", b"=", b"return", b"!"):
                continue
            at = self._pairs[i + 1] + 1
            while at < len(tokens) and tokens[at].text in _TRAILER:
                at += 1
            if at >= len(tokens) or tokens[at].text != b"{" or at not in self._pairs:
                continue
            first = i
            while first and tokens[first - 1].text not in (b";", b"}", b"{", b":", b"public", b"private"):
                first -= 1
            close = self._pairs[at]
            yield Function(tokens[first].start, tokens[close].end, tokens[at].end, tokens[close].start)

    def calls(self, callee: str, within: Function | None = None, of: str = "") -> list[Call]:
        """Calls of ``callee`` in a function (anywhere); with ``of``, only on what a call of that returns."""
        found = []
        for i in self._inside(within):
            token = self.tokens[i]
            if token.text != callee.encode() or not self._followed_by(i, b"(") or i + 1 not in self._pairs:
                continue
            first = self._receiver(i)
            close = self._pairs[i + 1]
            callee_of = self._callee_of(i - 2) if first < i - 1 else b""
            if of and callee_of != of.encode():
                continue
            end = self.tokens[i - 2].end if first < i - 1 else token.start
            start = self.tokens[first].start
            receiver = Span(start, end) if first < i else Span(token.start, token.start)
            arguments = clang.arguments(self.tokens[i + 1 : close + 1])
            if len(arguments) == 1 and arguments[0].start == arguments[0].end:
                arguments = ()
            found.append(
                Call(start, self.tokens[close].end, Span(token.start, token.end), receiver, arguments)
            )
        return found

    def macros(self, name: str, within: Function | None = None) -> list[Call]:
        """Expansions of a macro in the text; where its definition is not there, what looks like them."""
        known = {
            use.start
            for use in self.unit.expansions([name])
            if use.path == self.unit.path and (within is None or within.start <= use.start < within.end)
        }
        return [call for call in self.calls(name, within) if not known or call.callee.start in known]

    def strings(self, text: str, within: Function | None = None) -> list[Span]:
        """Plain string literals of this content."""
        wanted = b'"' + text.encode() + b'"'
        tokens = [self.tokens[i] for i in self._inside(within)]
        return [Span(token.start, token.end) for token in tokens if token.text == wanted]

    def initializers(self, name: str) -> list[Span]:
        """Values that a variable is initialized with, or a macro defined as."""
        return [span for _, span in self.unit.initializers(name)]

    def includes(self) -> list[Include]:
        """The file's include lines."""
        found = []
        for tokens in self._directives:
            if len(tokens) > 2 and tokens[1].text == b"include":
                start, end = tokens[0].start, tokens[-1].end
                name = self.data[tokens[2].start : end].strip(b'<>"').decode("utf-8", "replace")
                found.append(Include(start, end, name))
        return found

    def above(self, function: Function) -> int:
        """Where something can be put in front of a function: its line's start, or its comment's."""
        at = self._line_start(function.start)
        for token in reversed([token for token in self._all if token.kind == "comment" and token.end <= at]):
            between = self.data[token.end : at]
            if between.strip() or between.count(b"\n") > 1:
                break
            start = self._line_start(token.start)
            if self.data[start : token.start].strip():
                break
            at = start
        return at

    def _line_start(self, offset: int) -> int:
        return self.data.rfind(b"\n", 0, offset) + 1

    def _at(self, offset: int) -> int:
        return bisect.bisect_left(self._starts, offset)

    def _inside(self, within: Function | None) -> range:
        if within is None:
            return range(len(self.tokens))
        return range(self._at(within.entry), self._at(within.leave))

    def _followed_by(self, index: int, text: bytes) -> bool:
        return index + 1 < len(self.tokens) and self.tokens[index + 1].text == text

    def _receiver(self, index: int) -> int:
        """The first token of the postfix expression that ends with the name at ``index``."""
        first = index
        while first >= 2 and self.tokens[first - 1].text in (b".", b"->", b"::"):
            before = self._postfix(first - 2)
            if before is None:
                break
            first = before
        if first and self.tokens[first - 1].text == b"::":
            first -= 1
        return first

    def _postfix(self, index: int) -> int | None:
        """The first token of the name, call or subscript that ends at ``index``."""
        token = self.tokens[index]
        if token.text in (b")", b"]"):
            start = self._pairs.get(index)
            if start is None:
                return None
            name = self._name_before(start)
            return start if name is None else name
        return index if token.kind in ("identifier", "keyword") else None

    def _name_before(self, bracket: int) -> int | None:
        """The name that an opening bracket belongs to, also behind template arguments."""
        at = bracket - 1
        if at >= 0 and self.tokens[at].text in (b">", b">>"):
            depth = 0
            while at >= 0:
                text = self.tokens[at].text
                depth += {b">": 1, b">>": 2, b"<": -1}.get(text, 0)
                if text in (b";", b"{", b"}"):
                    return None
                at -= 1
                if depth <= 0:
                    break
        token = self.tokens[at] if at >= 0 else None
        named = token is not None and (token.kind == "identifier" or token.text == b"this")
        return at if named and token is not None and token.text not in _KEYWORDS else None

    def _callee_of(self, index: int) -> bytes:
        """The name called by a call that ends at ``index``."""
        if index < 0 or self.tokens[index].text != b")" or index not in self._pairs:
            return b""
        name = self._name_before(self._pairs[index])
        return b"" if name is None else self.tokens[name].text


class _Lines:
    """Line ends of a text, those behind a backslash apart."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def between(self, start: int, end: int) -> bool:
        return b"\n" in self._data[start:end]

    def logical_end(self, offset: int) -> int:
        """The end of a directive: the first line end that no backslash joins."""
        while True:
            end = self._data.find(b"\n", offset)
            if end < 0:
                return len(self._data)
            if self._data[max(0, end - 2) : end].rstrip(b"\r")[-1:] != b"\\":
                return end
            offset = end + 1


def _pairs(tokens: Sequence[Token]) -> dict[int, int]:
    """The partner of each bracket, both ways; one without a partner is left out."""
    pairs: dict[int, int] = {}
    stack: list[int] = []
    for i, token in enumerate(tokens):
        if token.kind != "punctuation":
            continue
        if token.text in _OPEN:
            stack.append(i)
        elif token.text in _CLOSE:
            if stack and tokens[stack[-1]].text == _CLOSE[token.text]:
                start = stack.pop()
                pairs[start], pairs[i] = i, start
            elif stack:
                stack.pop()
    return pairs


def one_line(found: Iterable[int], source: Source) -> str:
    """The lines of places, for an error: ``12, 40``."""
    return ", ".join(str(source.line(at)) for at in found)
