"""Durable linearizability of two registers, exactly: all orders that explain what has been answered so far.

A configuration is one possible past: ``(A, B, r0, r1, r2)``, the registers' values and, for each of three
clients, the result that its pending operation has been given in that past (``NOT_YET``: no effect in it). A
history is linearizable if and only if a configuration is left after each answer (just-in-time linearization,
Lowe 2017). Two registers together, because a crash must leave a state that both had at one moment.
"""

from __future__ import annotations

from functools import cache

NOT_YET = -1
ABSENT = 0

GET, SET, GETSET, DEL = range(4)
KINDS = ("GET", "SET", "GETSET", "DEL")

Operation = tuple[int, int, int]  # kind, key, value
Pending = tuple[Operation | None, ...]  # for each client
Configuration = tuple[int, ...]
Pasts = tuple[Configuration, ...]

START: Pasts = ((ABSENT, ABSENT, NOT_YET, NOT_YET, NOT_YET),)


def result_of(kind: int, value: int, old: int) -> tuple[int, int]:
    """New value, and the answer: GET, GETSET: the old value; DEL: whether there was one; SET: 0."""
    if kind == GET:
        return old, old
    if kind == SET:
        return value, 0
    if kind == GETSET:
        return value, old
    return ABSENT, int(old != ABSENT)


def _take_effect(past: Configuration, client: int, operation: Operation) -> Configuration:
    kind, key, value = operation
    after = list(past)
    after[key], after[2 + client] = result_of(kind, value, past[key])
    return tuple(after)


def _orders(past: Configuration, pending: Pending) -> set[Configuration]:
    """The past, continued by any of the pending operations in any order."""
    found = {past}
    todo = [past]
    while todo:
        past = todo.pop()
        for client, operation in enumerate(pending):
            if operation is not None and past[2 + client] == NOT_YET:
                after = _take_effect(past, client, operation)
                if after not in found:
                    found.add(after)
                    todo.append(after)
    return found


@cache
def answer(pasts: Pasts, pending: Pending, client: int, result: int) -> Pasts:
    """The pasts in which `client` may now be told `result`. None: the history is not linearizable."""
    left = set()
    operation = pending[client]
    assert operation is not None
    for past in pasts:
        if past[2 + client] != NOT_YET:
            ends = [past]
        else:
            # No more than needed takes effect: others only where they come before this one.
            others = tuple(None if i == client else other for i, other in enumerate(pending))
            ends = [_take_effect(end, client, operation) for end in _orders(past, others)]
        for end in ends:
            if end[2 + client] == result:
                left.add((*end[: 2 + client], NOT_YET, *end[3 + client :]))
    return tuple(sorted(left))


@cache
def states_now(pasts: Pasts, pending: Pending) -> frozenset[tuple[int, int]]:
    """States of both registers that may hold now: what was answered has happened, the pending may have."""
    return frozenset((end[0], end[1]) for past in pasts for end in _orders(past, pending))
