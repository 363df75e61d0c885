"""A file as a row of pieces, plain text and recipes' hunks in turn: edited, reverted, found again."""

from __future__ import annotations

import base64
import bisect
import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kflex_repro.errors import KflexError


@dataclass(frozen=True)
class Piece:
    """Bytes of a file; ``by`` whose hunk they are ("" is nobody's), ``old`` what was there before."""

    data: bytes
    by: str = ""
    old: bytes = b""


@dataclass(frozen=True)
class File:
    """Plain pieces, perhaps empty, around every hunk; ``made`` are directories made with the file."""

    pieces: tuple[Piece, ...]
    created_by: str = ""
    made: tuple[str, ...] = ()

    @property
    def content(self) -> bytes:
        return b"".join(piece.data for piece in self.pieces)

    @property
    def owners(self) -> set[str]:
        return {piece.by for piece in self.pieces if piece.by} | ({self.created_by} - {""})

    def hunks(self) -> Iterator[tuple[int, Piece]]:
        """Each hunk and its offset."""
        at = 0
        for piece in self.pieces:
            if piece.by:
                yield at, piece
            at += len(piece.data)


def line_of(content: bytes, offset: int) -> int:
    """The line number, from 1, of a byte."""
    return content.count(b"\n", 0, max(0, offset)) + 1


def edited(file: File, path: str, name: str, edits: Sequence[tuple[int, int, bytes]]) -> File:
    """The file with (start, end, new) as ``name``'s hunks; they may touch plain text only."""
    content = file.content
    pieces = list(file.pieces)
    # From the back, so that offsets stay true; of two at one place the later one first, so it ends up behind.
    order = sorted(((start, end, i) for i, (start, end, _) in enumerate(edits)), reverse=True)
    limit = len(content)
    for start, end, index in order:
        where = f"{path}:{line_of(content, start)}"
        if not 0 <= start <= end <= len(content):
            raise KflexError("an edit lies outside the file", where)
        if end > limit:
            raise KflexError("two edits overlap", where)
        limit = start
        new = edits[index][2]
        if content[start:end] != new:
            pieces = _replaced(pieces, (start, end, new), name, where)
    return replace(file, pieces=_merged(pieces))


def _replaced(pieces: list[Piece], edit: tuple[int, int, bytes], name: str, where: str) -> list[Piece]:
    start, end, new = edit
    at, other = 0, ""
    for index, piece in enumerate(pieces):
        stop = at + len(piece.data)
        if not piece.by and at <= start and end <= stop:
            data, head, tail = piece.data, start - at, end - at
            hunk = Piece(new, name, data[head:tail])
            return [*pieces[:index], Piece(data[:head]), hunk, Piece(data[tail:]), *pieces[index + 1 :]]
        if piece.by and at <= end and start <= stop:
            other = piece.by
        at = stop
    raise KflexError(
        f"{name} would change what {other} changed", where, f"kflex-repro patch revert {other} first"
    )


def reverted(file: File, path: str, name: str) -> File:
    """The file without ``name``'s hunks; without owners and pieces if ``name`` made it."""
    if file.created_by == name:
        if others := sorted(file.owners - {name}):
            raise KflexError(f"{others[0]} changes a file of {name}", path, f"revert {others[0]} first")
        return File(())
    return replace(
        file, pieces=_merged(Piece(piece.old) if piece.by == name else piece for piece in file.pieces)
    )


def _merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    out: list[Piece] = []
    for piece in pieces:
        if out and not piece.by and not out[-1].by:
            out[-1] = Piece(out[-1].data + piece.data)
        else:
            out.append(piece)
    return tuple(out)


# -- after somebody's edits


def lines(data: bytes) -> list[bytes]:
    """Lines with their ends; only a newline ends one (CR stays in its line)."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def lost(file: File, now: bytes | None) -> list[tuple[str, int]]:
    """(whose, line) of each hunk that cannot be found again in the content of now, which is another."""
    if now is None:
        return [(name, 1) for name in sorted(file.owners)]
    if file.created_by:
        # All of it is ours, and it goes as a whole.
        same = next(
            (i for i, (a, b) in enumerate(zip(file.content, now, strict=False)) if a != b),
            min(len(now), len(file.content)),
        )
        return [(file.created_by, line_of(now, same))]
    places = _places(file, now)
    return [(hunk.by, line) for (_, hunk), (at, line) in zip(file.hunks(), places, strict=True) if at is None]


def rebased(file: File, now: bytes) -> File:
    """The pieces in the content of now; what is lost becomes plain text."""
    found = [
        (at, hunk)
        for (_, hunk), (at, _) in zip(file.hunks(), _places(file, now), strict=True)
        if at is not None
    ]
    return replace(file, pieces=_cut(now, found))


def _places(file: File, now: bytes) -> list[tuple[int | None, int]]:
    """(offset in ``now`` or None, line in ``now``) of each hunk: all its lines must be there, together."""
    content = file.content
    before, after = lines(content), lines(now)
    starts = [0, *itertools.accumulate(map(len, before))]
    starts_now = [0, *itertools.accumulate(map(len, after))]
    blocks = _matching(before, after)
    out: list[tuple[int | None, int]] = []
    for at, hunk in file.hunks():
        end = at + len(hunk.data)
        first = bisect.bisect_right(starts, min(at, len(content) - 1)) - 1 if content else 0
        last = bisect.bisect_right(starts, max(end - 1, min(at, len(content) - 1))) - 1 if content else 0
        place, shift = None, 0
        for a, b, size in blocks:
            if a <= first:
                shift = b - a
            if a <= first and last < a + size:
                place = starts_now[b + first - a] + at - starts[first]
        if not content and not now:
            place = 0
        out.append((place, max(1, min(first + shift + 1, len(after)))))
    return out


def _matching(before: list[bytes], after: list[bytes]) -> list[tuple[int, int, int]]:
    """Equal runs of lines (start before, start after, length), in order."""
    shorter = min(len(before), len(after))
    head = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    rest = shorter - head
    tail = next((i for i in range(rest) if before[-1 - i] != after[-1 - i]), rest)
    middle = difflib.SequenceMatcher(
        None, before[head : len(before) - tail], after[head : len(after) - tail]
    ).get_matching_blocks()
    return [
        (0, 0, head),
        *((a + head, b + head, size) for a, b, size in middle if size),
        (len(before) - tail, len(after) - tail, tail),
    ]


# -- kept as JSON


def packed(file: File, written: str) -> dict[str, Any]:
    """The file for state.json; ``written`` names its content."""
    hunks = [
        {"by": hunk.by, "at": at, "length": len(hunk.data), "old": base64.b64encode(hunk.old).decode()}
        for at, hunk in file.hunks()
    ]
    return {"written": written, "created_by": file.created_by, "made": list(file.made), "hunks": hunks}


def unpacked(item: dict[str, Any], content: bytes) -> File:
    """What ``packed`` made."""
    found = [
        (
            int(hunk["at"]),
            Piece(
                content[hunk["at"] : hunk["at"] + hunk["length"]],
                str(hunk["by"]),
                base64.b64decode(hunk["old"], validate=True),
            ),
        )
        for hunk in item["hunks"]
    ]
    return File(_cut(content, found), str(item["created_by"]), tuple(map(str, item["made"])))


def _cut(content: bytes, hunks: Iterable[tuple[int, Piece]]) -> tuple[Piece, ...]:
    out, at = [], 0
    for start, hunk in hunks:
        out += [Piece(content[at:start]), hunk]
        at = start + len(hunk.data)
    return (*out, Piece(content[at:]))


def unified(path: str, old: bytes | None, new: bytes | None) -> bytes:
    """A unified diff of one file that ``patch -p1`` and git understand; None is no such file."""
    name = path.encode("utf-8", "surrogateescape")
    source = b"/dev/null" if old is None else b"a/" + name
    target = b"/dev/null" if new is None else b"b/" + name
    out = []
    for line in difflib.diff_bytes(
        difflib.unified_diff, lines(old or b""), lines(new or b""), source, target, lineterm=b"\n"
    ):
        out.append(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n")
    return b"".join(out)
