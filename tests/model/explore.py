"""Breadth-first search of a transition system: each state once, and the shortest way to the first bad one."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

State = tuple[Any, ...]
# What happens, the state after it, and the property that it violates (None: none).
Step = tuple[str, State, str | None]
Successors = Callable[[State], Iterable[Step]]


@dataclass(frozen=True)
class Exploration:
    states: int
    steps: int
    depth: int  # longest shortest way to a state
    violation: str | None  # of the first bad step found
    trace: tuple[str, ...]  # the shortest way to it


class TooMany(Exception):
    """The bound on states was reached: the result would not be exhaustive."""


def explore(start: State, successors: Successors, limit: int = 20_000_000) -> Exploration:
    """All states reachable from `start`, up to the first violation. Raises TooMany beyond `limit` states."""
    index = {start: 0}
    order = [start]
    parents = array("I", [0])
    shared: dict[Any, Any] = {}  # equal parts of different states are one object: a third of the memory
    share = shared.setdefault
    steps = at = depth = 0
    level_ends = 1
    while at < len(order):
        if at == level_ends:
            depth += 1
            level_ends = len(order)
        state = order[at]
        for label, after, violation in successors(state):
            steps += 1
            if violation is not None:
                way = (*_trace(order, parents, at, successors), label)
                return Exploration(len(order), steps, depth, violation, way)
            if after not in index:
                after = tuple([share(part, part) for part in after])
                index[after] = len(order)
                order.append(after)
                parents.append(at)
        at += 1
        if len(order) > limit:
            raise TooMany(f"more than {limit} states")
    return Exploration(len(order), steps, depth, None, ())


def _label(before: State, after: State, successors: Successors) -> str:
    return next(label for label, state, _ in successors(before) if state == after)


def _trace(order: list[State], parents: array, at: int, successors: Successors) -> list[str]:
    way = []
    while at:
        way.append(_label(order[parents[at]], order[at], successors))
        at = parents[at]
    return way[::-1]
