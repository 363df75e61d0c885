"""How large the table is, and how it is laid into the maps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from kflex_repro import memory
from kflex_repro.errors import KflexError
from kflex_repro.memory import MIB

# KFLEX_TABLE_MIN_BYTES and KFLEX_TABLE_MAX_BYTES of abi.h.
MINIMUM = 4 * MIB
MAXIMUM = 1 << 30
_AUTO_PART = Fraction(1, 8)
# Ring positions: twice what may be dirty at a time.
RING = 1 << 17
# An entry of a 16-byte key and a 64-byte value; buckets are sized for three of these in six slots.
_TYPICAL_ENTRY = 128
_PER_BUCKET = 3


@dataclass(frozen=True)
class Plan:
    """Sizes of a table's maps: heap chunks of 2 MiB, buckets, ring positions, bytes in all."""

    chunks: int
    buckets: int
    ring: int
    bytes: int

    @property
    def typical_entries(self) -> int:
        """How many keys of 16 and values of 64 bytes fit."""
        return self.chunks * 2 * MIB // _TYPICAL_ENTRY


def plan(table_bytes: int, where: str = "--table-size") -> Plan:
    """The table that fits into ``table_bytes`` of RAM, all of which the kernel takes when the maps are made.

    KflexError for less than 4 MiB or more than 1 GiB, that names ``where`` the size comes from.
    """
    if not MINIMUM <= table_bytes <= MAXIMUM:
        raise KflexError(
            f"a table of {table_bytes / MIB:.1f} MiB is not possible",
            where,
            f"choose {MINIMUM // MIB}m to {MAXIMUM // MIB}m",
        )
    chunks = max(1, (table_bytes - MIB) * 3 // 4 // (2 * MIB))
    wanted = chunks * 2 * MIB // _TYPICAL_ENTRY // _PER_BUCKET
    buckets = 1 << max(10, (wanted - 1).bit_length())
    return Plan(chunks, buckets, RING, chunks * (2 * MIB + 8192) + buckets * 64 + RING * 8)


def available() -> int:
    """MemAvailable in bytes."""
    return memory.available()


def auto(free: int) -> int:
    """What ``--table-size auto`` means: an eighth of the free RAM, at most 1 GiB."""
    return memory.share(free, _AUTO_PART, MINIMUM, MAXIMUM)


def parse_size(text: str) -> int | None:
    """``auto`` (None), or a number of bytes with k, m or g behind it (powers of 1024)."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+)([kmg]?)b?", text.lower())
    if not match:
        raise KflexError(
            f"'{text}' is not a size", "--table-size", "say auto, or a number and k, m or g: 256m"
        )
    return int(match.group(1)) << {"": 0, "k": 10, "m": 20, "g": 30}[match.group(2)]
