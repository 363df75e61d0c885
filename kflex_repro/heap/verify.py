"""Whether compiled BPF objects have the heaps that their source says: from the BTF of their ``.maps``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.bpf import btf
from kflex_repro.errors import KflexError
from kflex_repro.heap.declarations import Found
from kflex_repro.heap.model import PAGE, PAGES_PER_GB

_BPF_F_MMAPABLE = 1 << 10
_KEY_SIZE = 4


@dataclass(frozen=True)
class CompiledHeap:
    """A heap map of an object file: pages as compiled; ``expected_gb`` as asked, None where nothing was."""

    path: str
    name: str
    pages: int
    expected_gb: int | None

    @property
    def gb(self) -> float:
        """The size in GB."""
        return self.pages / PAGES_PER_GB

    @property
    def complaint(self) -> str:
        """What is wrong with it, "" if nothing is."""
        if self.expected_gb is not None and self.pages != self.expected_gb * PAGES_PER_GB:
            return f"{self.pages:,} pages, {self.expected_gb * PAGES_PER_GB:,} were asked for"
        if self.pages & (self.pages - 1) or not self.pages:
            return f"{self.pages:,} pages are no power of two (the kernel refuses such a map)"
        return ""


def expected(found: Found) -> dict[str, dict[str, int | None]]:
    """What a tree declares: GB by map name by the stem of the compiled file (``ffkx_redis``)."""
    result: dict[str, dict[str, int | None]] = {}
    for item in found.declarations:
        for target in item.objects:
            result.setdefault(_stem(target), {}).update(dict.fromkeys(item.names, item.gb))
    return result


def _stem(path: str | Path) -> str:
    return Path(path).name.partition(".")[0]


def inspect(
    path: Path, declared: Mapping[str, Mapping[str, int | None]] | None = None, gb: int | None = None
) -> list[CompiledHeap]:
    """The heaps of one object. With ``declared`` (see ``expected``) those maps must be there; without, a heap
    is what has a heap's key, value and flags. ``gb`` is the size all must have, before what is declared.

    KflexError for what is no BPF object with BTF, or lacks a declared heap.
    """
    if not path.is_file():
        raise KflexError("no such file", str(path), "compile the objects first")
    with path.open("rb") as stream:
        if stream.read(4) != b"\x7fELF":
            raise KflexError("not an ELF file", str(path), "give BPF object files")
    try:
        maps = btf.load(path).maps()
    except KflexError as error:
        raise KflexError(error.what, str(path), "give a BPF object file compiled with -g") from None
    wanted = (declared or {}).get(_stem(path))
    if wanted is None:
        wanted = dict.fromkeys(name for name, numbers in maps.items() if _looks_like_a_heap(numbers))
        if declared or not wanted:
            raise KflexError(
                "the tree declares no heap for this object" if declared else "the object has no heap map",
                str(path),
                "give objects compiled from the tree's BPF sources",
            )
    heaps = []
    for name, size in wanted.items():
        pages = maps.get(name, {}).get("max_entries")
        if pages is None:
            raise KflexError(f"the object has no map {name}", str(path), "compile it again from the tree")
        heaps.append(CompiledHeap(str(path), name, pages, gb if gb is not None else size))
    return heaps


def _looks_like_a_heap(numbers: Mapping[str, int]) -> bool:
    return (
        numbers.get("key_size") == _KEY_SIZE
        and numbers.get("value_size") == PAGE
        and bool(numbers.get("map_flags", 0) & _BPF_F_MMAPABLE)
    )


def verify(
    objects: Sequence[Path],
    declared: Mapping[str, Mapping[str, int | None]] | None = None,
    gb: int | None = None,
) -> list[CompiledHeap]:
    """The heaps of all objects, as they should be. KflexError for the first that is not."""
    heaps = [heap for path in objects for heap in inspect(path, declared, gb)]
    for heap in heaps:
        if heap.complaint:
            raise KflexError(
                f"heap {heap.name}: {heap.complaint}", heap.path, "compile it from the fitted tree"
            )
    return heaps
