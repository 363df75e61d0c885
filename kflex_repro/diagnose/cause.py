"""A cause, and what the functions that find causes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kflex_repro.diagnose.case import Case
from kflex_repro.diagnose.events import MAP_FIXED, MAP_FIXED_NOREPLACE, MapCreate, Search
from kflex_repro.heap import model, search

Confidence = Literal["certain", "likely", "possible"]
GIB = 1 << 30
# The end of user space of x86-64 with 4-level paging, and of most machines.
COMMON_BITS = 47


@dataclass(frozen=True)
class Cause:
    """One cause: ``evidence`` quotes the numbers, ``fix`` are commands or sentences.

    ``recipe`` is a recipe's id, or ``fit-heap``; "" where nothing in a source tree can be changed about it.
    """

    id: str
    title: str
    confidence: Confidence
    evidence: tuple[str, ...]
    fix: tuple[str, ...]
    recipe: str = ""


def created(case: Case, *codes: int) -> list[MapCreate]:
    """The failed map creations with one of these errnos."""
    return [event for event in case.log.creates if event.errno in codes]


def is_search(event: Search) -> bool:
    """Whether an mmap was for an address of the caller's choice: a search, or one try of it."""
    return event.tries > 1 or bool((event.flags or 0) & (MAP_FIXED | MAP_FIXED_NOREPLACE))


def largest_gb(case: Case) -> int:
    """The largest heap, GB, that fits the machine's RAM and address space; 4 where the RAM is unknown."""
    ram = case.number("ram_available")
    bits = case.number("va_bits") or COMMON_BITS
    return model.largest_gb(ram, bits) if ram is not None else 4


def fit(case: Case) -> str:
    """What to do about a heap that is too large."""
    size = largest_gb(case)
    return f"kflex-repro fit-heap --gb {size} --source DIR" if size else "a machine with more RAM"


def fits(size: int, bits: int) -> bool:
    """Whether a heap of ``size`` bytes, aligned to its size, fits a user address space at all."""
    whole = 1 << (size - 1).bit_length()
    return search.on_paper(search.fixed(whole, bits), search.task_size(bits)).address is not None
