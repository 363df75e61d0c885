"""The protocol has no bad state within the bounds; each way to break it has one, which is found."""

from __future__ import annotations

import pytest

from .explore import Exploration, TooMany, explore
from .protocol import (
    GATE_OPEN,
    LOST,
    NEWER_B,
    NOT_LINEARIZABLE,
    TORN,
    TORN_CUT,
    UNSTABLE,
    Bounds,
    Break,
    Protocol,
)
from .register import DEL, GET, GETSET, SET, START, answer, states_now

PAIR = Bounds(operations=(0, 1), remote=False, pair=2)
PAIR_POSTPONED = Bounds(operations=(0, 1), remote=False, pair=2, postponed=True)
RIGHT = (
    Bounds(operations=(2, 1)),
    Bounds(operations=(2, 2), remote=False, kinds=(GET, SET)),
    PAIR,
    PAIR_POSTPONED,
)
DEEPER = (
    Bounds(operations=(2, 2), remote=False),
    Bounds(operations=(3, 1), remote=False),
    Bounds(operations=(1, 1), postponed=True),
    Bounds(operations=(2, 2), kinds=(GET, SET)),
    Bounds(operations=(0, 2), remote=False, pair=3),
    Bounds(operations=(0, 1), remote=False, pair=3, postponed=True),
)

SMALL = Bounds(operations=(1, 1))
ALIVE = Bounds(operations=(1, 1), crash=False)
USUAL = Bounds(operations=(2, 1))
BROKEN = {
    Break.EARLY_GATE: (SMALL, GATE_OPEN),
    Break.NO_ACTIVE_WAIT: (SMALL, TORN_CUT),
    Break.NO_FLIP_WAIT: (SMALL, TORN_CUT),
    Break.GATE_BEFORE_COUNT: (ALIVE, NOT_LINEARIZABLE),
    Break.NO_DRAIN: (ALIVE, NOT_LINEARIZABLE),
    Break.NO_INVALIDATION: (ALIVE, NOT_LINEARIZABLE),
    Break.CLEAN_BEFORE_WRITE: (SMALL, LOST),
    Break.NO_CUT_NUMBER: (SMALL, UNSTABLE),
    Break.MARKER_FIRST: (SMALL, LOST),
    Break.POPULATE_IN_THREAD: (Bounds(operations=(2, 1), kinds=(GET, GETSET)), NOT_LINEARIZABLE),
    Break.POPULATE_BEFORE_WRITE: (SMALL, LOST),
    Break.SPLIT_CUT: (PAIR, f"{NEWER_B} in the AOF"),
    Break.NO_CUT: (SMALL, TORN_CUT),
    Break.FREE_ON_INVALIDATION: (SMALL, LOST),
    Break.OVERWRITE_OLD: (SMALL, TORN_CUT),
    Break.NO_READER_CHECK: (USUAL, TORN),
    Break.RECOVER_AT_ONCE: (SMALL, LOST),
    Break.OPEN_WHILE_POSTPONED: (PAIR_POSTPONED, f"{NEWER_B} after recovery"),
}


def _explored(bounds: Bounds, *breaks: Break) -> Exploration:
    system = Protocol(bounds, *breaks)
    result = explore(system.start(), system.successors)
    broken = f" with {breaks[0].name}" if breaks else ""
    print(f"{bounds}{broken}: {result.states} states, {result.steps} steps")
    print(*result.trace, f"=> {result.violation}", sep="\n")
    return result


@pytest.mark.parametrize("bounds", RIGHT, ids=str)
def test_the_protocol_has_no_bad_state(bounds: Bounds) -> None:
    result = _explored(bounds)
    assert result.violation is None
    assert result.states > 20_000, "the bounds leave nothing to look at"


@pytest.mark.soak
@pytest.mark.parametrize("bounds", DEEPER, ids=str)
def test_the_protocol_has_no_bad_state_deeper_down(bounds: Bounds) -> None:
    result = _explored(bounds)
    assert result.violation is None
    assert result.states > 100_000, "the bounds leave nothing to look at"


def test_without_aof_keys_may_be_copied_in_earlier() -> None:
    # BEFORE_SLEEP is before the AOF is written, but there is none: nothing that was seen is ever taken back.
    assert _explored(ALIVE, Break.POPULATE_BEFORE_WRITE).violation is None


def test_every_way_to_break_it_has_a_case() -> None:
    assert set(BROKEN) == set(Break)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_breaking_it_is_found(broken: Break) -> None:
    bounds, expected = BROKEN[broken]
    result = _explored(bounds, broken)
    assert result.violation == expected
    assert result.trace


def test_a_bound_on_states_that_is_reached_is_no_result() -> None:
    system = Protocol(SMALL)
    with pytest.raises(TooMany):
        explore(system.start(), system.successors, limit=1000)


def test_an_answer_that_no_order_explains_leaves_no_past() -> None:
    set_a, get_a = (SET, 0, 7), (GET, 0, 0)
    # While both are pending the GET may see either state; once the SET is answered, only the new one.
    assert answer(START, (set_a, get_a, None), 1, 0)
    assert answer(START, (set_a, get_a, None), 1, 7)
    after = answer(START, (set_a, None, None), 0, 0)
    assert answer(after, (None, get_a, None), 1, 7)
    assert not answer(after, (None, get_a, None), 1, 0)


def test_a_get_that_saw_a_pending_set_makes_it_lasting() -> None:
    set_a, get_a = (SET, 0, 7), (GET, 0, 0)
    assert states_now(START, (set_a, None, None)) == {(0, 0), (7, 0)}
    after = answer(START, (set_a, get_a, None), 1, 7)
    assert states_now(after, (set_a, None, None)) == {(7, 0)}


def test_results_that_depend_on_the_order_fix_it() -> None:
    # DEL says that there was a value: so it came after the SET, and the key is gone.
    after = answer(START, ((SET, 0, 7), (DEL, 0, 0), None), 1, 1)
    assert states_now(after, ((SET, 0, 7), None, None)) == {(0, 0)}
