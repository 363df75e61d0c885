"""libclang as anchors need it: parse what no compiler here could (headers are missing), count in bytes.

Positions are byte offsets into the file's own bytes, so CRLF and bytes that are no UTF-8 survive. Nothing is
compiled: an unknown type or header is no reason to stop.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kflex_repro.errors import KflexError

# Of clang-c/Index.h; the Python binding has no name for the second: go on after a header that is not there.
_DETAILED_PREPROCESSING_RECORD = 0x01
_KEEP_GOING = 0x200
_KINDS = {
    "IDENTIFIER": "identifier",
    "KEYWORD": "keyword",
    "LITERAL": "literal",
    "PUNCTUATION": "punctuation",
    "COMMENT": "comment",
}


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` (exclusive) of a file."""

    start: int
    end: int


@dataclass(frozen=True)
class Token:
    """One token: identifier, keyword, literal, punctuation or comment."""

    kind: str
    start: int
    end: int
    text: bytes


@dataclass(frozen=True)
class Expansion:
    """One expansion of a macro in source text; ``arguments`` without white space and comments around them.

    Expansions inside other macros' expansions are not among them: they have no text of their own.
    """

    path: Path
    start: int
    end: int
    arguments: tuple[Span, ...]


@functools.cache
def _library() -> Any:
    try:
        from clang import cindex

        cindex.conf.lib  # noqa: B018  (loads the library)
        return cindex
    except ImportError:
        raise KflexError("libclang is not installed", "", "pip install 'libclang>=16,<19'") from None
    except Exception as error:
        # cindex.LibclangError is only there once the import went well.
        raise KflexError(
            f"libclang cannot be loaded: {error}", "", "pip install --force-reinstall libclang"
        ) from None


@functools.cache
def builtin_headers() -> tuple[str, ...]:
    """Flags for the compiler's own headers, which libclang from PyPI lacks; none where there is no clang."""
    from kflex_repro.build import toolchain

    tool = toolchain.find_clang()
    if tool is None:
        return ()
    try:
        out = subprocess.run(
            [tool.path, "-print-resource-dir"], check=True, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return ("-resource-dir", out.stdout.strip())


class _RangeList(ctypes.Structure):
    """CXSourceRangeList of clang-c/CXSourceLocation.h."""

    _fields_ = (("count", ctypes.c_uint), ("ranges", ctypes.c_void_p))


@functools.cache
def _skipped_ranges() -> tuple[Any, Any]:
    """clang_getSkippedRanges and its disposal, which the Python binding leaves out."""
    ci = _library()
    library = ci.conf.lib
    get, dispose = library.clang_getSkippedRanges, library.clang_disposeSourceRangeList
    get.argtypes = [ci.TranslationUnit, ci.File]
    get.restype = ctypes.POINTER(_RangeList)
    dispose.argtypes = [ctypes.POINTER(_RangeList)]
    dispose.restype = None
    return get, dispose


class Unit:
    """A parsed file. Keep it while cursors of it are in use."""

    def __init__(self, path: Path, sources: Mapping[Path, bytes], unit: Any) -> None:
        self.path = path
        self.data = sources[path]
        self._unit = unit
        self._sources = dict(sources)

    def cursors(self) -> Iterator[Any]:
        """The top-level cursors, those of included files too."""
        yield from self._cursors

    @functools.cached_property
    def _cursors(self) -> list[Any]:
        return list(self._unit.cursor.get_children())

    @staticmethod
    def _ours(cursor: Any) -> bool:
        # Headers bring thousands of cursors; to ask each for its file by name takes a second.
        ask = _library().conf.lib.clang_Location_isFromMainFile
        ask.argtypes = [_library().SourceLocation]
        return bool(ask(cursor.location))

    def _declarations(self) -> Iterator[Any]:
        """Top-level cursors of all files, and those that the file itself has in namespaces and classes."""
        kinds = _library().CursorKind
        inside = {
            kinds.NAMESPACE,
            kinds.LINKAGE_SPEC,
            kinds.UNEXPOSED_DECL,
            kinds.CLASS_DECL,
            kinds.STRUCT_DECL,
            kinds.CLASS_TEMPLATE,
        }
        waiting = list(self.cursors())
        while waiting:
            cursor = waiting.pop()
            yield cursor
            if cursor.kind in inside and self._ours(cursor):
                waiting += cursor.get_children()

    def functions(self) -> list[Any]:
        """Functions and methods that the file itself defines, in namespaces and classes too."""
        kinds = _library().CursorKind
        wanted = {
            kinds.FUNCTION_DECL,
            kinds.CXX_METHOD,
            kinds.FUNCTION_TEMPLATE,
            kinds.CONSTRUCTOR,
            kinds.DESTRUCTOR,
        }
        return [
            cursor
            for cursor in self._declarations()
            if cursor.kind in wanted and self._ours(cursor) and cursor.is_definition()
        ]

    def skipped(self) -> list[Span]:
        """What the preprocessor leaves out of the file itself: #if 0, the other branch of an #ifdef."""
        ci = _library()
        get, dispose = _skipped_ranges()
        found = get(self._unit, ci.File.from_name(self._unit, str(self.path)))
        try:
            ranges = ctypes.cast(found.contents.ranges, ctypes.POINTER(ci.SourceRange))
            copies = [ci.SourceRange.from_buffer_copy(ranges[i]) for i in range(found.contents.count)]
        finally:
            dispose(found)
        return [Span(item.start.offset, item.end.offset) for item in copies]

    def walk(self) -> Iterator[Any]:
        """Every cursor of the file itself, depth first."""
        for cursor in self.cursors():
            if self.of(cursor) == self.path:
                yield from cursor.walk_preorder()

    @staticmethod
    def of(cursor: Any) -> Path | None:
        """The file a cursor is in; None for what the compiler brings itself."""
        where = cursor.location.file
        return Path(where.name) if where is not None else None

    def source(self, path: Path) -> bytes:
        """The bytes of the file or of one it includes, as parsed."""
        if path not in self._sources:
            self._sources[path] = path.read_bytes()
        return self._sources[path]

    def tokens(self, start: int = 0, end: int | None = None, path: Path | None = None) -> list[Token]:
        """The tokens between two offsets (all), those in code that is not compiled too."""
        ci = _library()
        path = path or self.path
        data = self.source(path)
        end = len(data) if end is None else end
        file = ci.File.from_name(self._unit, str(path))
        extent = ci.SourceRange.from_locations(
            ci.SourceLocation.from_offset(self._unit, file, start),
            ci.SourceLocation.from_offset(self._unit, file, end),
        )
        found = []
        for token in self._unit.get_tokens(extent=extent):
            first, last = token.extent.start.offset, token.extent.end.offset
            # libclang's range ends with the token that begins at its end.
            if start <= first and last <= end:
                found.append(Token(_KINDS[token.kind.name], first, last, data[first:last]))
        return found

    @functools.cached_property
    def definitions(self) -> dict[str, tuple[Path, Span]]:
        """Macros that source text defines (the last definition of each): where the name and body are."""
        ci = _library()
        found = {}
        for cursor in self.cursors():
            if cursor.kind == ci.CursorKind.MACRO_DEFINITION and (path := self.of(cursor)):
                extent = cursor.extent
                found[cursor.spelling] = (path, Span(extent.start.offset, extent.end.offset))
        return found

    def initializers(self, name: str) -> list[tuple[int, Span]]:
        """Where the file initializes a variable, or defines a macro, of this name: the value.

        With it goes an offset where a declaration may stand: behind the variable's, in front of the macro's.
        """
        ci = _library()
        found = []
        for cursor in self.walk():
            if cursor.spelling != name:
                continue
            start, end = cursor.extent.start.offset, cursor.extent.end.offset
            tokens = [token for token in self.tokens(start, end) if token.kind != "comment"]
            if cursor.kind == ci.CursorKind.MACRO_DEFINITION:
                # libclang's range begins at the name, not at the directive.
                place, value = self.data.rfind(b"#", 0, start), tokens[1:]
            elif cursor.kind == ci.CursorKind.VAR_DECL:
                at = next((i for i, token in enumerate(tokens) if token.text == name.encode()), len(tokens))
                place = self.data.find(b";", end) + 1 or len(self.data)
                value = tokens[at + 1 :]
                if value and value[0].text == b"=":
                    value = value[1:]
                elif value and value[0].text in (b"{", b"("):
                    value = value[1:-1]
                else:
                    continue
            else:
                continue
            if value:
                found.append((place, Span(value[0].start, value[-1].end)))
        return found

    def expansions(self, names: Sequence[str]) -> list[Expansion]:
        """Expansions of macros of these names, in the order of the text; in included files too."""
        ci = _library()
        found = []
        for cursor in self.cursors():
            if cursor.kind != ci.CursorKind.MACRO_INSTANTIATION or cursor.spelling not in names:
                continue
            path = self.of(cursor)
            if path is not None:
                start, end = cursor.extent.start.offset, cursor.extent.end.offset
                found.append(Expansion(path, start, end, arguments(self.tokens(start, end, path))))
        return found

    def array_bounds(self, prefix: str, member: str) -> dict[str, int]:
        """Of the typedefs whose names begin so, to structs: the bound of the array that ``member`` points to.

        That is how a map's definition says a number; a bound that is no constant is left out.
        """
        ci = _library()
        found = {}
        for cursor in self._declarations():
            if cursor.kind != ci.CursorKind.TYPEDEF_DECL or not cursor.spelling.startswith(prefix):
                continue
            record = cursor.underlying_typedef_type.get_canonical().get_declaration()
            for field in record.get_children():
                if field.kind == ci.CursorKind.FIELD_DECL and field.spelling == member:
                    array = field.type.get_canonical().get_pointee()
                    if array.kind == ci.TypeKind.CONSTANTARRAY:
                        found[cursor.spelling] = array.element_count
        return found


def arguments(tokens: Sequence[Token]) -> tuple[Span, ...]:
    """The arguments of the first call, or use of a macro, among the tokens.

    An empty argument is an empty span behind its comma or parenthesis.
    """
    found: list[Span] = []
    depth, first, last = 0, -1, -1
    for token in tokens:
        if token.kind == "comment":
            continue
        if token.kind == "punctuation" and token.text in (b")", b"]", b"}"):
            depth -= 1
        if (depth == 1 and token.text == b",") or (depth == 0 and token.text == b")"):
            found.append(Span(first, last))
            if depth == 0:
                break
            first = last = token.end
        elif depth >= 1:
            if first == last:
                first = token.start
            last = token.end
        if token.kind == "punctuation" and token.text in (b"(", b"[", b"{"):
            if depth == 0:
                first = last = token.end
            depth += 1
    return tuple(found)


def parse(
    path: Path,
    data: bytes | None = None,
    flags: Sequence[str] = (),
    overlay: Mapping[Path, bytes] | None = None,
    macros: bool = True,
) -> Unit:
    """Parse ``path`` (its bytes are ``data`` if given) with a compiler's flags, ``-I`` first of all.

    ``overlay`` replaces or makes up other files; without ``macros`` no definitions and expansions are kept,
    which is faster. KflexError only where libclang gives nothing at all.
    """
    ci = _library()
    if data is None:
        data = path.read_bytes()
    sources = {**(overlay or {}), path: data}
    unsaved = [(str(name), content) for name, content in sources.items()]
    try:
        unit = ci.TranslationUnit.from_source(
            str(path),
            ["-ferror-limit=0", *builtin_headers(), *flags],
            unsaved,
            options=_KEEP_GOING | (_DETAILED_PREPROCESSING_RECORD if macros else 0),
        )
    except ci.TranslationUnitLoadError:
        raise KflexError("libclang cannot parse the file", str(path)) from None
    return Unit(path, sources, unit)
