"""The capacities that a tree's programs fill their heaps to: constants in user-space sources."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    """A capacity: the constant ``name`` in ``path``, and the heap it fills: ``map`` of ``object``.

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
    """A capacity found: bytes ``start`` to ``end`` are the number; ``value`` is None if no constant."""

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


def find(root: Path, shape: CapacityShape, changed: Mapping[str, bytes] | None = None) -> Capacity:
    """A tree's capacity; ``changed`` are files to read as if they were so.

    KflexError where its file or the constant is not there, or the constant is there twice.
    """
    path = root / shape.path
    data = (changed or {}).get(shape.path)
    try:
        data = path.read_bytes() if data is None else data
    except OSError as error:
        raise KflexError(f"cannot read: {error.strerror}", shape.path, "is this the right tree?") from None
    places = clang.parse(path, data, _FLAGS).initializers(shape.name)
    if len(places) != 1:
        lines = "".join(f":{line_of(data, span.start)}" for _, span in places)
        what = f"{shape.name} is set {len(places)} times, 1 was expected"
        raise KflexError(what, f"{shape.path}{lines}", "set it by hand, and give --keep-capacities")
    place, span = places[0]
    text = data[span.start : span.end]
    # A type beside it, whose bound is the value.
    probe = b"\n; typedef struct { int (*bound)[(%s)]; } %s;\n" % (text, _PROBE.encode())
    probed = clang.parse(path, data[:place] + probe + data[place:], _FLAGS, macros=False)
    value = probed.array_bounds(_PROBE, "bound").get(_PROBE)
    return Capacity(shape, line_of(data, span.start), span.start, span.end, text.decode("latin-1"), value)


def readable(objects: int) -> int:
    """The largest even number of two significant digits that is not above ``objects``."""
    scale = 10 ** max(0, len(str(objects)) - 2)
    return objects // scale * scale // 2 * 2


def written(objects: int, like: str) -> str:
    """The number as C++ text, grouped by thousands where ``like`` groups its digits."""
    text = f"{objects:,}".replace(",", "'") if "'" in like else str(objects)
    suffix = re.search(r"(?<=[0-9a-fA-F'])[uUlLzZ]+$", like)
    return text + (suffix.group() if suffix else "")
