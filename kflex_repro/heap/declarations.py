"""The heap declarations of a KFlex source tree: expansions of its heap macro, and what each compiles to.

Text that only looks like one (a comment, a string, the macro's definition, a longer name, code that is not
compiled) is none. The size is read as a compiler sees it: the array bound behind ``max_entries``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.heap.model import PAGES_PER_GB
from kflex_repro.patching import clang

# In front of every file: the map macros, for trees whose libbpf headers are not there.
_PRELUDE = b"""\
#define __uint(name, val) int (*name)[val]
#define __type(name, val) __typeof__(val) *name
#define SEC(name) __attribute__((section(name), used))
"""
_PROBE = "kflex_probe_"
# Types only, and megabytes of them: no size depends on it.
_SKIPPED_HEADER = "vmlinux.h"


@dataclass(frozen=True)
class Shape:
    """What a heap declaration looks like: the macro, which argument is its size in GB, and where to look.

    ``files`` are globs of what is compiled, ``include`` its include directories, both relative to the tree.
    """

    macro: str = "ffkx_heap"
    argument: int = 0
    files: tuple[str, ...] = ("bpf/*.bpf.c",)
    include: tuple[str, ...] = ("bpf/include", "bpf", "libbpf/src", "libbpf/include/uapi", "include")


@dataclass(frozen=True)
class Declaration:
    """One use of the heap macro. ``start`` and ``end`` are the bytes of its size argument in ``path``.

    ``names`` are the maps it declares, ``pages`` their max_entries as compiled, ``value`` the argument alone
    (both None where that is no constant), ``macros`` what the argument takes from other macros, ``objects``
    the compiled files that it is part of.
    """

    path: str
    line: int
    start: int
    end: int
    text: str
    names: tuple[str, ...]
    pages: int | None
    value: int | None
    macros: tuple[str, ...]
    objects: tuple[str, ...]

    @property
    def gb(self) -> int | None:
        """The size in GB as compiled; None where it is not a whole number of them."""
        return self.pages // PAGES_PER_GB if self.pages and self.pages % PAGES_PER_GB == 0 else None

    @property
    def where(self) -> str:
        """``path:line``."""
        return f"{self.path}:{self.line}"

    @property
    def label(self) -> str:
        """What people call it: the compiled file's stem and the map's name."""
        return f"{Path(self.path).name.partition('.')[0]}.{'/'.join(self.names) or 'heap'}"


@dataclass(frozen=True)
class Mention:
    """A mention of the macro that declares nothing, and why it is left alone."""

    path: str
    line: int
    why: str


@dataclass(frozen=True)
class Found:
    """All declarations of a tree, in order of path and position, and what was left alone."""

    declarations: tuple[Declaration, ...]
    mentions: tuple[Mention, ...]


def line_of(data: bytes, offset: int) -> int:
    """The line number (from 1) of a byte."""
    return data.count(b"\n", 0, offset) + 1


def find(
    root: Path,
    shape: Shape,
    changed: Mapping[str, bytes] | None = None,
) -> Found:
    """All heap declarations of a tree; ``changed`` are files (relative paths) to read as if they were so."""
    overlay = {root / name: data for name, data in (changed or {}).items()}
    found: dict[tuple[str, int], Declaration] = {}
    mentions: dict[tuple[str, int], Mention] = {}
    sources = sorted({path for pattern in shape.files for path in root.glob(pattern) if path.is_file()})
    for path in sources:
        one = find_in(root, path, shape, overlay)
        for item in one.declarations:
            seen = found.get((item.path, item.start))
            found[item.path, item.start] = (
                replace(seen, objects=seen.objects + item.objects) if seen is not None else item
            )
        for mention in one.mentions:
            mentions[mention.path, mention.line] = mention
    return Found(tuple(found[key] for key in sorted(found)), tuple(mentions[key] for key in sorted(mentions)))


def find_in(root: Path, path: Path, shape: Shape, overlay: Mapping[Path, bytes] | None = None) -> Found:
    """The heap declarations of one compiled file, those of the tree's headers that it includes too."""
    flags = ["-xc", "-target", "bpf", "-include", str(root / ".kflex-prelude.h")]
    flags += [f"-I{root / directory}" for directory in shape.include]
    files = {root / ".kflex-prelude.h": _PRELUDE, **(overlay or {})}
    for directory in shape.include:
        files.setdefault(root / directory / _SKIPPED_HEADER, b"")
    data = files.pop(path) if path in files else path.read_bytes()
    unit = clang.parse(path, data, flags, files)
    sizes = _size_arguments(unit, shape)
    uses: list[tuple[clang.Expansion, clang.Span]] = []
    for use in unit.expansions(list(sizes)):
        relative = _relative(root, use.path)
        if relative is None:
            continue
        name = unit.source(use.path)[use.start : use.end].partition(b"(")[0].strip().decode(errors="replace")
        index = sizes.get(name)
        where = f"{relative}:{line_of(unit.source(use.path), use.start)}"
        if index is None:
            raise KflexError(
                f"a heap is declared through the macro {name}, which hides its size",
                where,
                f"write {shape.macro}(SIZE, FLAGS) there, then run it again",
            )
        if index >= len(use.arguments) or use.arguments[index].start == use.arguments[index].end:
            raise KflexError(f"{name} is used without a size", where, "repair the declaration first")
        uses.append((use, use.arguments[index]))
    compiled = _compile(unit, uses, shape, flags, files)
    defined = set(unit.definitions)
    declarations = []
    for (use, span), (pages, value) in zip(uses, compiled, strict=True):
        source = unit.source(use.path)
        words = [
            t.text.decode() for t in unit.tokens(span.start, span.end, use.path) if t.kind == "identifier"
        ]
        declarations.append(
            Declaration(
                path=_relative(root, use.path) or "",
                line=line_of(source, use.start),
                start=span.start,
                end=span.end,
                text=source[span.start : span.end].decode("latin-1"),
                names=_declared(unit, use),
                pages=pages,
                value=value,
                macros=tuple(dict.fromkeys(word for word in words if word in defined)),
                objects=(_relative(root, path) or "",),
            )
        )
    return Found(tuple(declarations), tuple(_left_alone(root, unit, uses, shape)))


def _relative(root: Path, path: Path) -> str | None:
    """A path as the tree's own (through ``..`` too); None outside of the tree."""
    clean = Path(os.path.normpath(path))
    return clean.relative_to(root).as_posix() if clean.is_relative_to(root) else None


def _size_arguments(unit: clang.Unit, shape: Shape) -> dict[str, int | None]:
    """The heap macro and the macros around it: which argument is the size; None where none is."""
    macro = shape.macro.encode()
    # Tokens cost: only of macros that can reach ours, found by their text.
    texts = {name: (path, span) for name, (path, span) in unit.definitions.items() if name != shape.macro}
    reach, names = {}, [macro]
    for word in names:
        for name in [
            n for n, (path, span) in texts.items() if word in unit.source(path)[span.start : span.end]
        ]:
            reach[name] = texts.pop(name)
            names.append(name.encode())
    bodies = {
        name: [token for token in unit.tokens(span.start, span.end, path) if token.kind != "comment"]
        for name, (path, span) in reach.items()
    }
    known: dict[str, int | None] = {shape.macro: shape.argument}
    progress = True
    while progress:
        progress = False
        for name, body in bodies.items():
            if name in known:
                continue
            at = next((i for i, t in enumerate(body[1:], 1) if t.text.decode("latin-1") in known), None)
            if at is not None:
                known[name] = _passed_on(body, at, known[body[at].text.decode()])
                progress = True
    return known


def _passed_on(body: Sequence[clang.Token], at: int, index: int | None) -> int | None:
    """Which parameter of a macro becomes argument ``index`` of the macro used at ``at`` in its body."""
    function_like = len(body) > 1 and body[1].text == b"(" and body[0].end == body[1].start
    inner = clang.arguments(body[at:])
    if index is None or not function_like or index >= len(inner):
        return None
    parameters = clang.arguments(body)
    span = inner[index]
    words = [t.text for t in body if span.start <= t.start < span.end and t.text not in (b"(", b")")]
    names = [[t.text for t in body if p.start <= t.start < p.end] for p in parameters]
    return names.index(words) if len(words) == 1 and words in names else None


def _compile(
    unit: clang.Unit,
    uses: Sequence[tuple[clang.Expansion, clang.Span]],
    shape: Shape,
    flags: Sequence[str],
    overlay: Mapping[Path, bytes],
) -> list[tuple[int | None, int | None]]:
    """(pages, value of the argument) of each use, from a copy with a type for each in front of each.

    In place, because macros may be redefined further down; behind two semicolons, because what stands before
    may not parse without its headers: one for a declaration half done, one for old-style parameters.
    """
    if not uses:
        return []
    pieces: dict[Path, list[bytes]] = {}
    at: dict[Path, int] = {}
    for number, (use, span) in enumerate(uses):
        source = unit.source(use.path)
        piece = pieces.setdefault(use.path, [])
        text, size = source[use.start : use.end], source[span.start : span.end]
        if not text.startswith(shape.macro.encode()):
            # A macro around it may declare more than a type.
            text = b"%s(%s%s, 0)" % (shape.macro.encode(), b"0, " * shape.argument, size)
        probe = f"{_PROBE}{number}".encode()
        piece.append(source[at.get(use.path, 0) : use.start])
        piece.append(
            b"; ; typedef %s %s; typedef struct { int (*max_entries)[(%s)]; } %sv; "
            % (text, probe, size, probe)
        )
        at[use.path] = use.start
    copies = {path: b"".join([*piece, unit.source(path)[at[path] :]]) for path, piece in pieces.items()}
    probed = clang.parse(
        unit.path, copies.get(unit.path, unit.data), flags, {**overlay, **copies}, macros=False
    )
    bounds = probed.array_bounds(_PROBE, "max_entries")
    return [(bounds.get(f"{_PROBE}{n}"), bounds.get(f"{_PROBE}{n}v")) for n in range(len(uses))]


def _declared(unit: clang.Unit, use: clang.Expansion) -> tuple[str, ...]:
    """The names that follow a use up to its semicolon."""
    source = unit.source(use.path)
    stop = source.find(b";", use.end)
    names: list[str] = []
    depth, fresh = 0, True
    for token in unit.tokens(use.end, len(source) if stop < 0 else stop, use.path):
        if token.text in (b"(", b"[", b"{"):
            depth += 1
        elif token.text in (b")", b"]", b"}"):
            depth -= 1
        elif depth == 0 and token.text == b",":
            fresh = True
        elif depth == 0 and fresh and token.kind == "identifier":
            names.append(token.text.decode())
            fresh = False
    return tuple(names)


def _left_alone(
    root: Path, unit: clang.Unit, uses: Sequence[tuple[clang.Expansion, clang.Span]], shape: Shape
) -> list[Mention]:
    """Mentions of the macro in the file that no compiler sees: in comments, and in code that is left out."""
    macro = shape.macro.encode()
    if macro not in unit.data:
        return []
    path = _relative(root, unit.path) or ""
    taken = {use.start for use, _ in uses if use.path == unit.path}
    defined = [span for where, span in unit.definitions.values() if where == unit.path]
    found = []
    tokens = unit.tokens()
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.kind == "comment" and (at := token.text.find(macro + b"(")) >= 0:
            found.append(Mention(path, line_of(unit.data, token.start + at), "in a comment"))
        elif (
            token.text == macro
            and token.kind == "identifier"
            and following is not None
            and following.text == b"("
            and token.start not in taken
            and not any(span.start <= token.start < span.end for span in defined)
        ):
            found.append(Mention(path, line_of(unit.data, token.start), "in code that is not compiled"))
    return found
