"""The linearizability checker: histories known to be good or bad, and agreement with brute force."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.redis.linear import (
    FOREVER,
    LOST,
    MS,
    Mortal,
    Op,
    State,
    check,
    check_channel,
    outcomes,
    pinned,
    search,
)

EMPTY: State = (None, None)
CLIENTS = itertools.count(1000)


def op(
    call: int,
    ret: int,
    name: str,
    keys: Any = 0,
    args: Any = (),
    reply: Any = b"OK",
    client: int | None = None,
) -> Op:
    """An operation; each on a connection of its own unless said."""
    keys = keys if isinstance(keys, tuple) else (keys,)
    args = args if isinstance(args, tuple) else (args,)
    return Op(call, ret, next(CLIENTS) if client is None else client, name, keys, args, reply)


def is_fine(*ops: Op, start: State = EMPTY) -> bool:
    verdict = check(ops, start)
    assert not verdict.undecided
    return not verdict.violations


# -- histories known to be good --


def test_nothing_happened() -> None:
    assert is_fine()


def test_concurrent_operations_may_have_any_order() -> None:
    for seen in (None, b"a", b"b"):
        assert is_fine(op(0, 10, "SET", args=b"a"), op(0, 10, "SET", args=b"b"), op(0, 10, "GET", reply=seen))
    # The later of two reads that overlap the write may be the one that sees it.
    assert is_fine(op(0, 100, "SET", args=b"a"), op(10, 20, "GET", reply=None), op(30, 40, "GET", reply=b"a"))


def test_a_write_whose_reply_never_came_may_or_may_not_have_happened() -> None:
    lost = op(0, FOREVER, "SET", args=b"a", reply=LOST)
    assert is_fine(lost, op(10, 20, "GET", reply=None))
    assert is_fine(lost, op(10, 20, "GET", reply=None), op(30, 40, "GET", reply=b"a"))
    assert not is_fine(lost, op(10, 20, "GET", reply=b"a"), op(30, 40, "GET", reply=None))


def test_requests_of_a_connection_that_broke_took_effect_in_their_order() -> None:
    first = op(0, FOREVER, "GET", reply=LOST, client=7)
    second = op(0, FOREVER, "SET", 0, b"a", reply=LOST, client=7)
    third = op(0, FOREVER, "SET", 1, b"b", reply=LOST, client=7)
    assert is_fine(first, second, third, op(20, 30, "MGET", (0, 1), reply=(b"a", b"b")))
    assert is_fine(first, second, third, op(20, 30, "MGET", (0, 1), reply=(b"a", None)))
    assert not is_fine(first, second, third, op(20, 30, "MGET", (0, 1), reply=(None, b"b")))


def test_what_redis_commands_do() -> None:
    story = [
        ("SET", 0, b"7", b"OK"),
        ("INCR", 0, (), 8),
        ("APPEND", 0, b"x", 2),
        ("INCR", 0, (), "ERR"),
        ("GETSET", 0, b"9", b"8x"),
        ("SETNX", 0, b"no", 0),
        ("SETNX", 1, b"yes", 1),
        ("MGET", (0, 1), (), (b"9", b"yes")),
        ("EVAL exchange", (0, 1), (), (b"9", b"yes")),
        ("COPY", (0, 1), (), 1),
        ("GET", 1, (), b"yes"),
        ("RENAME", (1, 0), (), b"OK"),
        ("RENAME", (1, 0), (), "ERR"),
        ("STRLEN", 0, (), 3),
        ("EXEC", (0, 1), (("SET", (1,), (b"1",)), ("INCR", (1,), ()), ("GET", (0,), ())), (b"OK", 2, b"yes")),
        ("SWAPDB", (), (), b"OK"),
        ("GET", 0, (), b"2"),
        ("GETRANGE", 1, (), b"yes"),
        ("EXISTS", (0, 1), (), 2),
        ("DEL", (0, 1), (), 2),
        ("RPUSH", 0, b"i", 1),
        ("RPUSH", 0, b"j", 2),
        ("BLPOP", 0, (), b"i"),
        ("FLUSHALL", (), (), b"OK"),
        ("LPOP", 0, (), None),
        ("GETDEL", 0, (), None),
    ]
    ops = [op(10 * n, 10 * n + 5, *each) for n, each in enumerate(story)]
    assert is_fine(*ops)
    for number, each in enumerate(ops):
        wrong = [*ops[:number], each._replace(reply=b"never written"), *ops[number + 1 :]]
        assert not is_fine(*wrong), each


# -- histories known to be bad --


def test_a_stale_read() -> None:
    assert not is_fine(
        op(0, 10, "SET", args=b"a"), op(20, 30, "SET", args=b"b"), op(40, 50, "GET", reply=b"a")
    )


def test_a_read_of_what_was_never_written() -> None:
    assert not is_fine(op(0, 10, "SET", args=b"a"), op(5, 30, "GET", reply=b"c"))


def test_a_read_before_the_write_began() -> None:
    assert not is_fine(op(0, 10, "GET", reply=b"a"), op(20, 30, "SET", args=b"a"))


def test_a_lost_update() -> None:
    both_one = (op(0, 10, "INCR", reply=1), op(0, 10, "INCR", reply=1))
    assert not is_fine(*both_one)
    assert not is_fine(
        op(0, 1, "SET", args=b"a"),
        # Read and written back by a script, while a SET was acknowledged.
        op(10, 90, "EVAL touch", reply=b"a"),
        op(20, 30, "SET", args=b"b"),
        op(100, 110, "GET", reply=b"a"),
    )


def test_two_readers_that_disagree_about_the_order() -> None:
    writes = (op(0, 100, "SET", args=b"a"), op(0, 100, "SET", args=b"b"))
    reads = [op(10, 20, "GET", reply=b"a"), op(30, 40, "GET", reply=b"b"), op(50, 60, "GET", reply=b"a")]
    assert is_fine(*writes, *reads[:2])
    assert not is_fine(*writes, *reads)


def test_a_torn_pair() -> None:
    write = op(0, 10, "MSET", (0, 1), (b"a", b"b"))
    for half in ((b"a", None), (None, b"b")):
        assert not is_fine(write, op(5, 20, "MGET", (0, 1), reply=half))
    # Neither by two reads, one after the other.
    assert not is_fine(write, op(2, 4, "GET", 0, reply=b"a"), op(5, 6, "GET", 1, reply=None))
    assert not is_fine(
        op(0, 10, "SET", args=b"a"),
        op(0, 90, "RENAME", (0, 1)),
        op(20, 30, "MGET", (0, 1), reply=(None, None)),
    )


def test_a_deleted_key_that_rises_again() -> None:
    history = [op(0, 10, "SET", args=b"a"), op(20, 30, "DEL", reply=1), op(40, 50, "GET", reply=None)]
    assert is_fine(*history)
    assert not is_fine(*history, op(60, 70, "GET", reply=b"a"))
    for everything in ("FLUSHALL", "SWAPDB"):
        assert not is_fine(history[0], op(20, 30, everything, ()), op(40, 50, "GET", reply=b"a"))


def test_a_transaction_that_overwrote_what_it_watched() -> None:
    change = (("WATCHED", (0,), (b"a",)), ("SET", (0,), (b"c",)))
    story = (op(0, 10, "SET", args=b"a"), op(20, 30, "SET", args=b"b"))
    assert not is_fine(*story, op(40, 50, "EXEC", 0, change, reply=(b"OK",)))
    assert is_fine(*story, op(40, 50, "EXEC", 0, change, reply=None), op(60, 70, "GET", reply=b"b"))
    assert not is_fine(*story, op(40, 50, "EXEC", 0, change, reply=None), op(60, 70, "GET", reply=b"c"))


def test_replies_of_one_connection_in_the_wrong_order() -> None:
    """Two in flight on one connection take effect in their order; on two connections in any."""
    for clients, fine in (((7, 7), False), ((7, 8), True)):
        first = op(0, 50, "GET", reply=b"b", client=clients[0])
        second = op(1, 60, "GET", reply=None, client=clients[1])
        assert is_fine(first, second, op(0, 70, "SET", args=b"b")) is fine


def test_times_to_live() -> None:
    given_life = op(0, MS, "SET PX", args=(b"a", 10))

    def reads(call: int, ret: int, reply: Any) -> Op:
        return op(call, ret, "GET", reply=reply)

    assert is_fine(given_life, reads(5 * MS, 6 * MS, b"a"), reads(30 * MS, 31 * MS, None))
    # Around the deadline it may be either, but not both ways.
    assert is_fine(given_life, reads(10 * MS, 12 * MS, b"a"), reads(12 * MS, 13 * MS, None))
    assert not is_fine(given_life, reads(10 * MS, 11 * MS, None), reads(11 * MS + 1, 12 * MS, b"a"))
    # Expired, and read late; gone, and too early.
    assert not is_fine(given_life, reads(13 * MS, 14 * MS, b"a"))
    assert not is_fine(given_life, reads(5 * MS, 6 * MS, None))
    # What takes the time to live away.
    for change in (op(2 * MS, 3 * MS, "PERSIST", reply=1), op(2 * MS, 3 * MS, "SET", args=b"a")):
        assert is_fine(given_life, change, reads(30 * MS, 31 * MS, b"a"))
        assert not is_fine(given_life, change, reads(30 * MS, 31 * MS, None))
    # It moves along, and what APPEND makes of the value dies with it.
    moved = (
        given_life,
        op(2 * MS, 3 * MS, "APPEND", args=b"b", reply=2),
        op(4 * MS, 5 * MS, "COPY", (0, 1), reply=1),
    )
    assert is_fine(
        *moved, op(6 * MS, 7 * MS, "GET", 1, reply=b"ab"), op(30 * MS, 31 * MS, "GET", 1, reply=None)
    )
    assert not is_fine(*moved, op(30 * MS, 31 * MS, "GET", 1, reply=b"ab"))


# -- pins --


def test_a_pin_says_what_is_there_and_cuts_the_history() -> None:
    pin = op(20, 30, "PIN", (), reply=((b"a", -1), None))
    assert pinned(pin, 0) == (b"a", None)
    history = [op(0, 10, "SET", args=b"a"), pin, op(40, 50, "GET", reply=b"a")]
    verdict = check(history, EMPTY)
    assert verdict.segments == 2
    assert not verdict.violations
    assert not is_fine(*history[:2], op(40, 50, "GET", reply=None))
    assert not is_fine(history[0], pin._replace(reply=((b"b", -1), None)))
    # A pin that meets another operation cuts nothing.
    assert check([history[0]._replace(ret=25), pin, history[2]], EMPTY).segments == 1
    mortal = pinned(op(0, MS, "PIN", (), reply=((b"a", 7), ((b"i", b"j"),))), 0)
    assert mortal == (Mortal(b"a", 6 * MS, 9 * MS), (b"i", b"j"))


def test_an_explanation_ends_with_the_impossible_reply() -> None:
    history = [op(100 * n, 100 * n + 10, "SET", args=b"%d" % n) for n in range(10)]
    history.append(op(2000, 2010, "GET", reply=b"3"))
    history += [op(3000 + 100 * n, 3010 + 100 * n, "SET", args=b"later") for n in range(10)]
    (text,) = check(history, EMPTY, title="the keys").violations
    assert "the keys" in text
    assert "GET [0]  -> b'3'   <-- never possible" in text
    assert "later" not in text


def test_a_search_that_is_too_large_says_so() -> None:
    """Many concurrent changes without a read between: it gives up, it does not call them wrong."""
    ops = [op(0, 10, "SET", args=b"%d" % n) for n in range(14)]
    verdict = check([*ops, op(5, 10, "GET", reply=b"never")], EMPTY, budget=1000)
    assert verdict.undecided
    assert not verdict.violations


@pytest.mark.parametrize("concurrency", [1, 2, 4, 6])
def test_long_histories_are_quick(concurrency: int) -> None:
    """20,000 operations without a pin, each overlapping many: about one configuration an operation."""
    history = simulate(random.Random(concurrency), 20_000, concurrency, EMPTY, lost=0)
    found = search(history, EMPTY)
    assert found.order is not None
    assert found.looked < 60_000


# -- the channel --


def test_a_channel() -> None:
    published = [(0, 1, b"a"), (2, 3, b"b"), (2, 4, b"c")]
    assert check_channel(published, [[b"a", b"b", b"c"], [b"a", b"b", b"c"]]) == []
    assert check_channel(published, [[b"a", b"c", b"b"]]) == []
    for bad in (
        [[b"a", b"b", b"c"], [b"a", b"c", b"b"]],
        [[b"b", b"a", b"c"]],
        [[b"a", b"b"]],
        [[b"a", b"b", b"c", b"c"]],
        [[b"a", b"b", b"c", b"d"]],
    ):
        assert check_channel(published, bad), bad


# -- histories that are made up --

KINDS: list[tuple[str, int, int]] = [
    # name, how many keys, how many values
    ("SET", 1, 1),
    ("GET", 1, 0),
    ("GET", 1, 0),
    ("SETNX", 1, 1),
    ("GETSET", 1, 1),
    ("APPEND", 1, 1),
    ("INCR", 1, 0),
    ("DEL", 1, 0),
    ("MSET", 2, 2),
    ("MGET", 2, 0),
    ("RENAME", 2, 0),
    ("COPY", 2, 0),
    ("EVAL touch", 1, 0),
    ("EVAL exchange", 2, 0),
    ("SWAPDB", 0, 0),
]


def draw(rng: random.Random, number: int) -> tuple[str, tuple[int, ...], tuple[bytes, ...]]:
    name, keys, values = rng.choice(KINDS)
    return (
        name,
        tuple(rng.sample((0, 1), keys)),
        tuple(b"%d%d" % (number + 1, each) for each in range(values)),
    )


def simulate(rng: random.Random, count: int, concurrency: int, start: State, lost: float = 0.1) -> list[Op]:
    """A history that has an order: each operation takes effect at a random point inside its interval; this
    share of them is never answered."""
    points = sorted(rng.sample(range(100 * count), count))
    state, out = start, []
    for number, point in enumerate(points):
        name, keys, args = draw(rng, number)
        before, behind = rng.randrange(1 + 50 * concurrency), rng.randrange(1 + 50 * concurrency)
        bare = Op(point - before, point + behind, number, name, keys, args, LOST)
        reply = replies(state, bare)
        (state,) = outcomes(state, bare._replace(reply=reply))
        unanswered = rng.random() < lost
        out.append(bare._replace(ret=FOREVER) if unanswered else bare._replace(reply=reply))
    return sorted(out, key=lambda each: each.call)


def replies(state: State, bare: Op) -> Any:
    from tests.redis.linear import COMMANDS

    return COMMANDS[bare.name](list(state), bare, 0)


def brute_force(ops: list[Op], start: State) -> bool:
    """All orders of all operations that have a reply, with every subset of those that have none."""
    must = [each for each in ops if each.reply is not LOST]
    may = [each for each in ops if each.reply is LOST]
    for size in range(len(may) + 1):
        for extra in itertools.combinations(may, size):
            for order in itertools.permutations([*must, *extra]):
                if any(b.ret < a.call for a, b in itertools.combinations(order, 2)):
                    continue
                states = {start}
                for each in order:
                    states = {after for state in states for after in outcomes(state, each)}
                if states:
                    return True
    return False


@given(st.integers(0, 1 << 32), st.integers(1, 60), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_a_history_that_has_an_order_passes(seed: int, count: int, concurrency: int) -> None:
    history = simulate(random.Random(seed), count, concurrency, EMPTY)
    found = search(history, EMPTY)
    assert found.order is not None
    # And what it found really is one: it explains every reply, and keeps the order of time.
    states = {EMPTY}
    for index in found.order:
        states = {after for state in states for after in outcomes(state, history[index])}
    assert states
    placed = [history[index] for index in found.order]
    assert all(b.ret >= a.call for a, b in itertools.combinations(placed, 2))
    assert {index for index, each in enumerate(history) if each.reply is not LOST} <= set(found.order)


@given(st.integers(0, 1 << 32), st.integers(2, 6), st.integers(1, 4))
@settings(max_examples=400, deadline=None)
def test_it_agrees_with_brute_force(seed: int, count: int, concurrency: int) -> None:
    """On histories that are right, and on ones that somebody has changed: a reply, or a time."""
    rng = random.Random(seed)
    history = simulate(rng, count, concurrency, EMPTY)
    for _ in range(rng.randrange(3)):
        index, other = rng.randrange(count), rng.randrange(count)
        each = history[index]
        if each.reply is LOST or rng.random() < 0.3:
            later = rng.randrange(300)
            history[index] = each._replace(call=each.call + later, ret=each.ret + later)
        else:
            said = history[other].reply
            history[index] = each._replace(reply=None if said is LOST else said)
    history.sort(key=lambda each: each.call)
    assert (search(history, EMPTY).order is not None) == brute_force(history, EMPTY)
