"""What a dead server's kernel half had acknowledged and no server has taken over: reading the pinned table.

The module of the next server on that dataset recovers it by itself (module/recover.c). This is for what it
may not touch: another dataset, an older copy of the AOF, a server that never comes back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.bpf.btf import Btf
from kflex_repro.bpf.maps import Map
from kflex_repro.errors import KflexError
from kflex_repro.redis.resp import encode_command

_STATES = ("PENDING", "DIRTY", "ORPHAN", "DROPPED")


@dataclass(frozen=True)
class Leftover:
    """One acknowledged SET: its cut's number, key and value."""

    cut: int
    key: bytes
    value: bytes


def journal(btf: Btf, ctl: object, heap: Map, ring: Map) -> list[Leftover]:
    """SETs that are not known to be written, in the order in which they were accepted (enum kflex_state).

    Those of cuts that the AOF got just before the end are among them: only the AOF itself tells.
    """
    const = btf.constants()
    states = {btf.enum("kflex_state")[f"KFLEX_{name}"] for name in _STATES}
    entry, head = btf.struct("kflex_entry"), const["KFLEX_ENTRY_HEAD"]
    cells, positions = memoryview(heap.mmap()), memoryview(ring.mmap()).cast("Q")
    found = []
    for pos in range(int(ctl.journal_head), int(ctl.head)):  # type: ignore[attr-defined]
        record = positions[pos & (ring.max_entries - 1)]
        chunk, at = divmod(record & 0xFFFFFFFF, const["KFLEX_CHUNK_CELLS"])
        if record >> 32 != pos & 0xFFFFFFFF or chunk >= heap.max_entries:
            continue
        start = chunk * heap.stride + at * const["KFLEX_CELL"]
        e = entry.from_buffer_copy(cells[start : start + head])
        if e.pos != pos & 0xFFFFFFFF or e.state not in states:
            continue
        key = start + head
        value = key + (e.klen + 7 & ~7)
        found.append(Leftover(e.cut, bytes(cells[key : key + e.klen]), bytes(cells[value : value + e.vlen])))
    return found


def export(found: Iterable[Leftover], path: Path) -> int:
    """Write ``found`` as RESP SET commands (``redis-cli --pipe < FILE`` applies them); returns their number.

    The file appears whole or not at all, readable by its owner only; KflexError if it is there already.
    """
    if path.exists():
        raise KflexError("the file exists already", str(path), "give the name of a new one")
    last = {each.key: each.value for each in found}
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise KflexError(f"cannot write: {error.strerror}", str(path), "choose another place") from None
    try:
        with os.fdopen(fd, "wb") as out:
            out.writelines(encode_command("SET", key, value) for key, value in last.items())
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).rename(path)
    except OSError as error:
        with suppress(OSError):
            Path(temporary).unlink()
        raise KflexError(f"cannot write: {error.strerror}", str(path), "choose another place") from None
    return len(last)
