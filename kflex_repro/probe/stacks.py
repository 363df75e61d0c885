"""Profiles as collapsed stacks: one line for each stack, ``frame;frame;frame count``, its root first.

Frames carry what they are, as other tools write it: ``_[k]`` is the kernel, ``_[b]`` one of its BPF programs;
no mark is user space. A file that another tool wrote reads as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kflex_repro.errors import KflexError

Stack = tuple[str, ...]

KERNEL, BPF = "_[k]", "_[b]"
FILE = "stacks.collapsed"


@dataclass(frozen=True)
class Profile:
    """How much of ``unit`` was seen with each stack; the root, first, is the thread's name."""

    title: str
    unit: str
    stacks: Mapping[Stack, int]
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of it, in ``unit``."""
        return sum(self.stacks.values())


@dataclass(frozen=True)
class Weight:
    """What a function has: itself, and with all that it calls."""

    own: int
    total: int


def clean(name: str) -> str:
    """A frame's name without what the format gives a meaning: semicolons, line ends, spaces at the ends."""
    return re.sub(r"[;\r\n\t\0]+", ":", name).strip() or "[unknown]"


def by_function(stacks: Mapping[Stack, int]) -> dict[str, Weight]:
    """Own and total weight of each frame but the root; one that is in a stack twice counts once."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for stack, weight in stacks.items():
        frames = stack[1:]
        if frames:
            own[frames[-1]] += weight
        for frame in set(frames):
            total[frame] += weight
    return {name: Weight(own[name], total[name]) for name in total}


def text(stacks: Mapping[Stack, int]) -> str:
    """The collapsed form, sorted, so that equal profiles are equal files."""
    return "".join(f"{';'.join(stack)} {weight}\n" for stack, weight in sorted(stacks.items()))


def parse(lines: Iterable[str], where: str = "") -> dict[Stack, int]:
    """The stacks of the collapsed form; KflexError names the line that is none."""
    found: Counter[Stack] = Counter()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        stack, _, weight = line.rstrip().rpartition(" ")
        if not stack or not weight.isascii() or not weight.isdigit():
            raise KflexError(
                f"line {number} is not `frame;frame count`: {line.strip()[:60]!r}",
                where,
                "give a directory of `kflex-repro profile`, or a file of collapsed stacks",
            )
        found[tuple(stack.split(";"))] += int(weight)
    return dict(found)


def load(path: Path) -> Profile:
    """A profile from a directory that ``kflex-repro profile`` wrote, or from a file of collapsed stacks."""
    file = path / FILE if path.is_dir() else path
    unit = "samples"
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            stacks = parse(stream, str(file))
        if path.is_dir() and (path / "profile.json").is_file():
            import json

            unit = str(json.loads((path / "profile.json").read_text()).get("unit", unit))
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise KflexError(f"cannot read the profile: {what}", str(file)) from None
    if not stacks:
        raise KflexError("the profile is empty", str(file))
    return Profile(path.name, unit, stacks)


@dataclass(frozen=True)
class Change:
    """A function's own share of the whole (0.0-1.0), in one profile and in another."""

    name: str
    before: float
    after: float


def changes(before: Mapping[Stack, int], after: Mapping[Stack, int]) -> list[Change]:
    """How each function's own share changed, the largest change first."""
    first, second = by_function(before), by_function(after)
    totals = sum(before.values()), sum(after.values())
    nothing = Weight(0, 0)
    found = [
        Change(name, first.get(name, nothing).own / totals[0], second.get(name, nothing).own / totals[1])
        for name in {*first, *second}
    ]
    return sorted(found, key=lambda one: (-abs(one.after - one.before), one.name))
