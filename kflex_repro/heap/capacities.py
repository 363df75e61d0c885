"""The capacities that a tree's programs fill their heaps to: constants in user-space sources."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.heap.declarations import line_of
from kflex_repro.heap.model import Allocator
from kflex_repro.patching import clang

# No standard headers: constants of built-in types need none, and parsing them takes a second.
_FLAGS = ("-xc++", "-std=c++20", "-nostdinc", "-nostdinc++")
_PROBE = "kflex_probe"


@dataclass(frozen=True)
class CapacityShape:
    """A capacity: the constant ``name`` in ``path``, and the heap that it fills: ``map`` in object ``object``.

    ``classes`` are the size classes that are filled to it, in bytes; ``hash_entries`` the buckets beside
    (0: as many as objects).
    """

    name: str
    path: str
    object: str
    map: str = "heap"
    classes: tuple[int, ...] = (16, 32, 64, 96, 128, 192)
    hash_entries: int = 1_000_000

    def allocator(self, objects: int, cpus: int) -> Allocator:
        """The allocator's model for this heap."""
        return Allocator(cpus=cpus, class_bytes=self.classes, hash_entries=self.hash_entries or objects)


@dataclass(frozen=True)
class Capacity:
    """A capacity found: bytes ``start`` to ``end`` of its file are the number; ``value`` is None if no constant."""

    shape: CapacityShape
    line: int
    start: int
    end: int
    text: str
    value: int | None

    @property
    def where(self) -> str:
        """``path:line``."""
        return f"{self.shape.path}:{self.line}"


def find(
    root: Path, shapes: Sequence[CapacityShape], changed: Mapping[str, bytes] | None = None
) -> list[Capacity]:
    """The capacities of a tree, those whose file is there; ``changed`` are files to read as if they were so.

    KflexError where a file is there but its constant is not, or is there twice.
    """
    found = []
    for path in dict.fromkeys(shape.path for shape in shapes):
        if (root / path).is_file():
            data = (changed or {}).get(path)
            if data is None:
                data = (root / path).read_bytes()
            found += _find_in(root / path, data, [shape for shape in shapes if shape.path == path])
    return found


def _find_in(path: Path, data: bytes, shapes: Sequence[CapacityShape]) -> list[Capacity]:
    unit = clang.parse(path, data, _FLAGS)
    places = []
    for shape in shapes:
        here = unit.initializers(shape.name)
        if len(here) != 1:
            lines = ", ".join(str(line_of(data, start)) for start, _ in here)
            raise KflexError(
                f"{shape.name} is initialized {len(here)} times, 1 was expected",
                f"{shape.path}{':' if lines else ''}{lines}",
                "see --keep-capacities, or set it by hand",
            )
        places.append((shape, *here[0]))
    return [
        Capacity(shape, line_of(data, span.start), span.start, span.end, text, value)
        for (shape, _, span), (text, value) in zip(places, _values(path, data, places), strict=True)
    ]


def _values(
    path: Path, data: bytes, places: Sequence[tuple[CapacityShape, int, clang.Span]]
) -> list[tuple[str, int | None]]:
    """(text, value) of each place, from a copy with a type in front of each whose bound is the value."""
    pieces, at = [], 0
    for number, (_, start, span) in sorted(enumerate(places), key=lambda item: item[1][1]):
        pieces.append(data[at:start])
        pieces.append(
            b"\n; typedef struct { int (*bound)[(%s)]; } %s%d;\n"
            % (data[span.start : span.end], _PROBE.encode(), number)
        )
        at = start
    unit = clang.parse(path, b"".join([*pieces, data[at:]]), _FLAGS)
    bounds = unit.array_bounds(_PROBE, "bound")
    return [
        (data[span.start : span.end].decode("latin-1"), bounds.get(f"{_PROBE}{number}"))
        for number, (_, _, span) in enumerate(places)
    ]


def readable(objects: int) -> int:
    """The largest even number of two significant digits that is not above ``objects``."""
    scale = 10 ** max(0, len(str(objects)) - 2)
    return objects // scale * scale // 2 * 2


def written(objects: int, like: str) -> str:
    """The number as C++ text, grouped by thousands where ``like`` groups its digits."""
    text = f"{objects:,}".replace(",", "'") if "'" in like else str(objects)
    suffix = re.search(r"(?<=[0-9a-fA-F'])[uUlLzZ]+$", like)
    return text + (suffix.group() if suffix else "")
