"""A linearizability checker for what Redis commands did: Wing and Gong's search with Lowe's memoisation.

A history is a list of operations, each with the moment before its request was sent and the moment after its
reply was read. It is *linearizable* if there is one order of all operations that explains every reply, in
which no operation that had ended comes after one that began later.

- The search is done per *group* of keys (linearizability is compositional): commands on two keys stay
  inside a group and are checked as one step, while commands on the whole server (FLUSHALL, SWAPDB) are
  projected to each group. That is a necessary condition for the whole.
- A reply that never came (``LOST``) may have taken effect or not, at any time after it was sent.
- A key with a time to live (``Mortal``) may be seen gone from the earliest moment its deadline may be, and
  alive until the latest; between the two either is right, and once seen gone it stays gone.
- A ``PIN`` is one transaction that reads a whole group. Where it meets no other operation it says the state,
  whatever came before: there a history is cut into segments, which are searched one by one.

``COMMANDS`` is the model. The same model is checked against a plain redis-server by the load that uses it
(test_linearizable.py), the search against brute force (tests/unit/test_linear.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.redis.model import LONG_MAX, LONG_MIN, parse_int

LOST: Any = ...
"""The reply of an operation whose connection broke before one came (an Ellipsis: marshal carries it)."""

MS = 1_000_000
FOREVER = 1 << 62
BUDGET = 300_000
"""Configurations looked at in one segment before the search gives up."""


class Op(NamedTuple):
    """One operation on a group. Times in ns of one monotonic clock.

    ``client`` is the connection: on one, operations take effect in the order in which they are given.
    ``keys`` are the slots of the group's state it touches. ``reply`` is decoded: OK is b"OK", an error is its
    code as a str, an array is a tuple.
    """

    call: int
    ret: int
    client: int
    name: str
    keys: tuple[int, ...]
    args: tuple[Any, ...]
    reply: Any


class Mortal(NamedTuple):
    """A value that goes at a moment between ``first`` and ``last``, ns."""

    value: bytes
    first: int
    last: int


Slot = bytes | Mortal | tuple[bytes, ...] | None
"""What a key holds: nothing, a string, a string with a time to live, a list (never empty)."""
State = tuple[Slot, ...]


# -- the model --


def alive(slot: Any) -> Any:
    """A string slot's value without its time to live."""
    return slot.value if type(slot) is Mortal else slot


def like(slot: Any, value: bytes) -> Slot:
    """The value with the slot's time to live."""
    return slot._replace(value=value) if type(slot) is Mortal else value


def mortal(value: bytes, op: Op, ms: int, slack: int) -> Mortal:
    """A value given ``ms`` to live by this operation.

    Redis's clock counts whole milliseconds: the deadline is up to one later than it reads, and a command that
    finds the deadline in the millisecond that has begun by then deletes at once.
    """
    return Mortal(value, op.call + (ms - 1) * MS - slack, min(FOREVER, op.ret) + (ms + 1) * MS + slack)


Slots = list[Any]


def _set(slots: Slots, op: Op, slack: int) -> Any:
    slots[op.keys[0]] = op.args[0]
    return b"OK"


def _set_px(slots: Slots, op: Op, slack: int) -> Any:
    slots[op.keys[0]] = mortal(op.args[0], op, op.args[1], slack)
    return b"OK"


def _get(slots: Slots, op: Op, slack: int) -> Any:
    return alive(slots[op.keys[0]])


def _mget(slots: Slots, op: Op, slack: int) -> Any:
    return tuple(alive(slots[key]) for key in op.keys)


def _getrange(slots: Slots, op: Op, slack: int) -> Any:
    return alive(slots[op.keys[0]]) or b""


def _strlen(slots: Slots, op: Op, slack: int) -> Any:
    return len(alive(slots[op.keys[0]]) or b"")


def _exists(slots: Slots, op: Op, slack: int) -> Any:
    return sum(slots[key] is not None for key in op.keys)


def _getset(slots: Slots, op: Op, slack: int) -> Any:
    was = alive(slots[op.keys[0]])
    slots[op.keys[0]] = op.args[0]
    return was


def _getdel(slots: Slots, op: Op, slack: int) -> Any:
    was = alive(slots[op.keys[0]])
    slots[op.keys[0]] = None
    return was


def _setnx(slots: Slots, op: Op, slack: int) -> Any:
    if slots[op.keys[0]] is not None:
        return 0
    slots[op.keys[0]] = op.args[0]
    return 1


def _append(slots: Slots, op: Op, slack: int) -> Any:
    slot = slots[op.keys[0]]
    value = (alive(slot) or b"") + op.args[0]
    slots[op.keys[0]] = like(slot, value)
    return len(value)


def _incr(slots: Slots, op: Op, slack: int) -> Any:
    slot = slots[op.keys[0]]
    number = parse_int(b"0" if slot is None else alive(slot))
    if number is None or not LONG_MIN <= number + 1 <= LONG_MAX:
        return "ERR"
    slots[op.keys[0]] = like(slot, b"%d" % (number + 1))
    return number + 1


def _del(slots: Slots, op: Op, slack: int) -> Any:
    found = _exists(slots, op, slack)
    for key in op.keys:
        slots[key] = None
    return found


def _pexpire(slots: Slots, op: Op, slack: int) -> Any:
    slot = slots[op.keys[0]]
    if slot is None:
        return 0
    slots[op.keys[0]] = mortal(alive(slot), op, op.args[0], slack)
    return 1


def _persist(slots: Slots, op: Op, slack: int) -> Any:
    slot = slots[op.keys[0]]
    if type(slot) is not Mortal:
        return 0
    slots[op.keys[0]] = slot.value
    return 1


def _mset(slots: Slots, op: Op, slack: int) -> Any:
    for key, value in zip(op.keys, op.args, strict=True):
        slots[key] = value
    return b"OK"


def _rename(slots: Slots, op: Op, slack: int) -> Any:
    old, new = op.keys
    if slots[old] is None:
        return "ERR"
    slots[new], slots[old] = slots[old], None
    return b"OK"


def _copy(slots: Slots, op: Op, slack: int) -> Any:
    old, new = op.keys
    if slots[old] is None:
        return 0
    slots[new] = slots[old]
    return 1


def _touch(slots: Slots, op: Op, slack: int) -> Any:
    """EVAL: reads, takes its time, sets what it read."""
    slots[op.keys[0]] = alive(slots[op.keys[0]])
    return slots[op.keys[0]]


def _exchange(slots: Slots, op: Op, slack: int) -> Any:
    """EVAL on two keys: each gets the other's value; both old ones are the reply."""
    one, two = op.keys
    was = alive(slots[one]), alive(slots[two])
    slots[two], slots[one] = was
    return was


def _exec(slots: Slots, op: Op, slack: int) -> Any:
    """MULTI … EXEC: args are its commands, each (name, keys, args).

    A first one named WATCHED (keys, the values that GET gave after WATCH) is no command: an EXEC that does
    not answer nil promises that these have not changed.
    """
    out = []
    for name, keys, args in op.args:
        if name == "WATCHED":
            if any(alive(slots[key]) != value for key, value in zip(keys, args, strict=True)):
                return None
            continue
        inner = op._replace(name=name, keys=keys, args=args)
        out.append(COMMANDS[name](slots, inner, slack))
    return tuple(out)


def _flushall(slots: Slots, op: Op, slack: int) -> Any:
    slots[:] = [None] * len(slots)
    return b"OK"


def _swapdb(slots: Slots, op: Op, slack: int) -> Any:
    half = len(slots) // 2
    slots[:] = slots[half:] + slots[:half]
    return b"OK"


def _rpush(slots: Slots, op: Op, slack: int) -> Any:
    items = (*(slots[op.keys[0]] or ()), op.args[0])
    slots[op.keys[0]] = items
    return len(items)


def _lpop(slots: Slots, op: Op, slack: int) -> Any:
    items = slots[op.keys[0]]
    if items is None:
        return None
    slots[op.keys[0]] = items[1:] or None
    return items[0]


def _pin(slots: Slots, op: Op, slack: int) -> Any:
    """All slots in one transaction: of a string (value, PTTL), of a list a tuple of its items."""
    return LOST


COMMANDS: dict[str, Callable[[Slots, Op, int], Any]] = {
    "GET": _get,
    "SET": _set,
    "SET PX": _set_px,
    "MGET": _mget,
    "GETRANGE": _getrange,
    "STRLEN": _strlen,
    "EXISTS": _exists,
    "GETSET": _getset,
    "GETDEL": _getdel,
    "SETNX": _setnx,
    "APPEND": _append,
    "INCR": _incr,
    "DEL": _del,
    "PEXPIRE": _pexpire,
    "PERSIST": _persist,
    "MSET": _mset,
    "RENAME": _rename,
    "COPY": _copy,
    "EVAL touch": _touch,
    "EVAL exchange": _exchange,
    "EXEC": _exec,
    "FLUSHALL": _flushall,
    "SWAPDB": _swapdb,
    "RPUSH": _rpush,
    "LPOP": _lpop,
    "BLPOP": _lpop,
}


READS = frozenset({"GET", "MGET", "GETRANGE", "STRLEN", "EXISTS", "PIN"})
REFUSALS: dict[str, Any] = {
    "SETNX": 0,
    "INCR": "ERR",
    "RENAME": "ERR",
    "COPY": 0,
    "DEL": 0,
    "PEXPIRE": 0,
    "PERSIST": 0,
    "GETDEL": None,
    "EVAL touch": None,
    "EXEC": None,
    "LPOP": None,
    "BLPOP": None,
}
"""What these answer when they do nothing."""


def only_looked(op: Op) -> bool:
    """Whether an operation with this reply cannot have changed anything, in whatever state it met."""
    return op.name in READS or REFUSALS.get(op.name, LOST) == op.reply


def pinned(op: Op, slack: int) -> State:
    """The state that a PIN's reply describes, after it."""
    out: list[Slot] = []
    for slot in op.reply:
        if slot is None or type(slot[0]) is not tuple:
            out.append(None if slot is None else _with_ttl(slot, op, slack))
        else:
            out.append(slot[0])
    return tuple(out)


def _with_ttl(slot: tuple[bytes, int], op: Op, slack: int) -> Slot:
    value, ms = slot
    return value if ms < 0 else mortal(value, op, ms, slack)


def _fits_pin(state: State, op: Op) -> bool:
    """Whether a PIN may read this state (of times to live only that there is one)."""
    if op.reply is LOST:
        return True
    for slot, said in zip(state, op.reply, strict=True):
        if slot is None or said is None:
            if slot is not said:
                return False
        elif type(slot) is tuple or type(said[0]) is tuple:
            if slot != said[0]:
                return False
        elif alive(slot) != said[0] or (type(slot) is Mortal) != (said[1] >= 0):
            return False
    return True


def outcomes(state: State, op: Op, slack: int = 0) -> list[State]:
    """The states in which this operation may leave the group when it gives its reply; none: it cannot."""
    name = op.name
    keys = op.keys
    if name == "GET":
        slot = state[keys[0]]
        if type(slot) is not Mortal:
            return [state] if slot == op.reply or op.reply is LOST else []
    elif name == "SET":
        key = keys[0]
        return [(*state[:key], op.args[0], *state[key + 1 :])] if op.reply in (b"OK", LOST) else []
    elif name == "PIN":
        keys = tuple(range(len(state)))
    starts: list[State] = [state]
    for key in keys:
        slot = state[key]
        if type(slot) is Mortal:
            gone = [(*each[:key], None, *each[key + 1 :]) for each in starts] if op.ret >= slot.first else []
            starts = (starts if op.call <= slot.last else []) + gone
    if name == "PIN":
        return [each for each in starts if _fits_pin(each, op)]
    command = COMMANDS[name]
    found = []
    for start in starts:
        slots = list(start)
        reply = command(slots, op, slack)
        if op.reply is LOST or (reply == op.reply and type(reply) is type(op.reply)):
            after = tuple(slots)
            found.append(state if after == state else after)
        elif name == "EXEC" and op.reply is None and op.args[0][0] == "WATCHED":
            # A transaction may be given up more often than the values show: nothing happens then.
            found.append(state)
    return found


# -- the search --


@dataclass(frozen=True)
class Found:
    """What a search says. ``order``: indices of the operations in an order that explains them; None: there is
    none, then ``stuck`` are those that were placed in the longest attempt. ``undecided``: it gave up."""

    order: tuple[int, ...] | None
    stuck: tuple[int, ...] = ()
    undecided: bool = False
    looked: int = 0


def search(ops: Sequence[Op], start: State, slack: int = 0, budget: int = BUDGET) -> Found:
    """Looks for a linearization of operations sorted by ``call`` (those of a client in their order).

    A configuration is (base, mask, state): all operations before ``base`` are placed, and those of the mask
    above it. An operation may come next if it began before every other that is still to be placed had ended.
    One that only looks is placed as soon as it fits: that never costs a solution.
    """
    count = len(ops)
    calls = [op.call for op in ops]
    rets = [FOREVER if op.reply is LOST else op.ret for op in ops]
    # A read that nobody heard the answer of says nothing.
    void = [op.reply is LOST and op.name in READS for op in ops]
    after = _predecessors(ops, void)
    needs, makers = _needs(ops)
    looks = [op.reply is not LOST and only_looked(op) for op in ops]
    seen: set[tuple[int, int, State]] = set()
    Trail = tuple[Any, int]  # (the trail before, an operation): shared by all attempts that begin alike
    stack: list[tuple[int, int, State, Trail | None, int]] = [(0, 0, start, None, 0)]
    best: Trail | None = None
    best_length = -1
    looked = 0
    while stack:
        base, mask, state, trail, length = stack.pop()
        if (base, mask, state) in seen:
            continue
        seen.add((base, mask, state))
        while True:
            looked += 1
            earliest = FOREVER
            waiting = []
            index, bits = base, mask
            while index < count and calls[index] <= earliest:
                if not bits & 1:
                    if rets[index] < earliest:
                        earliest = rets[index]
                    before = after[index]
                    if (before < base or mask >> (before - base) & 1) and not void[index]:
                        waiting.append(index)
                bits >>= 1
                index += 1
            if length > best_length:
                best, best_length = trail, length
            if earliest == FOREVER and index == count:
                return Found(_unwind(trail), looked=looked)
            if looked > budget:
                return Found(None, _unwind(best), undecided=True, looked=looked)
            choices: list[tuple[int, int, State]] = []
            for index in waiting:
                op = ops[index]
                states = [
                    each
                    for each in outcomes(state, op, slack)
                    if each is state or not _dead(state, each, index, base, mask, needs, makers)
                ]
                if op.reply is not LOST:
                    if looks[index] and any(each is state for each in states):
                        choices = [(0, index, state)]
                        break
                    choices += [(rets[index], index, each) for each in states]
                else:
                    choices += [(FOREVER, index, each) for each in states]
            if not choices:
                break
            if len(choices) > 1:
                choices.sort(key=lambda choice: choice[0])
                for _, index, following in reversed(choices[1:]):
                    stack.append((*_placed(base, mask, index), following, (trail, index), length + 1))
            _, index, state = choices[0]
            base, mask = _placed(base, mask, index)
            trail, length = (trail, index), length + 1
            if len(choices) > 1:
                if (base, mask, state) in seen:
                    break
                seen.add((base, mask, state))
    return Found(None, _unwind(best), looked=looked)


def _dead(
    before: State, after: State, index: int, base: int, mask: int, needs: Wanted, makers: Wanted
) -> bool:
    """Whether this step takes away a value that somebody still reads and that nobody will make again."""
    left = {alive(slot) for slot in after}
    for slot in before:
        value = alive(slot)
        if value is None or value in left or value not in needs:
            continue

        def to_come(each: int) -> bool:
            return each != index and each >= base and not mask >> (each - base) & 1

        if any(map(to_come, needs[value])) and not any(map(to_come, makers.get(value, ()))):
            return True
    return False


Wanted = dict[bytes, list[int]]
"""By value: indices of operations."""


def _needs(ops: Sequence[Op]) -> tuple[Wanted, Wanted]:
    """Who has read which value out of a key (so it was there), and who can make it."""
    needs: Wanted = {}
    for index, op in enumerate(ops):
        for value in _seen(op):
            if type(value) is bytes:
                needs.setdefault(value, []).append(index)
    by_length: dict[Any, list[bytes]] = {}
    for value in needs:
        by_length.setdefault(len(value), []).append(value)
    makers: Wanted = {}
    for index, op in enumerate(ops):
        parts = [(op.name, op.args, op.reply)]
        if op.name == "EXEC":
            commands = [each for each in op.args if each[0] != "WATCHED"]
            replies = op.reply if type(op.reply) is tuple else (LOST,) * len(commands)
            parts = [(name, args, reply) for (name, _, args), reply in zip(commands, replies, strict=True)]
        for name, args, reply in parts:
            if name == "APPEND":
                fitting = needs if reply is LOST else by_length.get(reply, ())
                made = [value for value in fitting if value.endswith(args[0])]
            elif name == "INCR" and reply is LOST:
                made = [value for value in needs if value.lstrip(b"-").isdigit()]
            elif name == "INCR":
                made = [b"%d" % reply] if type(reply) is int else []
            else:
                made = [arg for arg in args if type(arg) is bytes]
            for value in made:
                makers.setdefault(value, []).append(index)
    return needs, makers


def _seen(op: Op) -> Iterable[Any]:
    """Values that were in a key, says this reply, when the operation came (not what it put there itself)."""
    name, reply = op.name, op.reply
    if reply is LOST:
        return ()
    if name in ("GET", "GETDEL", "EVAL touch") or (name == "GETRANGE" and reply):
        return (reply,)
    if name == "GETSET":
        return (reply,) if reply not in op.args else ()
    if name == "INCR" and type(reply) is int and reply != 1:
        return (b"%d" % (reply - 1),)
    if name in ("MGET", "EVAL exchange"):
        return reply if type(reply) is tuple else ()
    if name == "PIN":
        return [slot[0] for slot in reply if slot is not None]
    return ()


def _placed(base: int, mask: int, index: int) -> tuple[int, int]:
    mask |= 1 << (index - base)
    while mask & 1:
        mask >>= 1
        base += 1
    return base, mask


def _predecessors(ops: Sequence[Op], void: Sequence[bool]) -> list[int]:
    """For each operation the one before it on its connection that counts, or -1."""
    last: dict[int, int] = {}
    out = []
    for index, op in enumerate(ops):
        out.append(last.get(op.client, -1))
        if not void[index]:
            last[op.client] = index
    return out


def _unwind(trail: Any) -> tuple[int, ...]:
    out = []
    while trail is not None:
        trail, index = trail
        out.append(index)
    return tuple(reversed(out))


# -- histories --


@dataclass
class Verdict:
    """What the history of one group shows. ``violations`` are complete texts."""

    segments: int = 0
    longest: int = 0
    undecided: int = 0
    looked: int = 0
    violations: list[str] = field(default_factory=list)


def segments(ops: Iterable[Op], start: State, slack: int = 0) -> Iterable[tuple[State, list[Op]]]:
    """The history cut behind each PIN that meets no other operation, with the state at the start of each."""
    ordered = sorted(ops, key=lambda op: op.call)
    piece: list[Op] = []
    ends = 0
    for op, following in itertools.pairwise([*ordered, None]):
        assert op is not None
        piece.append(op)
        if op.name == "PIN" and ends < op.call and (following is None or op.ret < following.call):
            yield start, piece
            start, piece = pinned(op, slack), []
        ends = max(ends, op.ret)
    if piece:
        yield start, piece


def check(ops: Iterable[Op], start: State, slack: int = 0, title: str = "", budget: int = BUDGET) -> Verdict:
    """Checks the history of one group that begins in this state; stops at its first violation."""
    verdict = Verdict()
    for state, piece in segments(ops, start, slack):
        found = search(piece, state, slack, budget)
        verdict.segments += 1
        verdict.longest = max(verdict.longest, len(piece))
        verdict.looked += found.looked
        if found.undecided:
            verdict.undecided += 1
        elif found.order is None:
            verdict.violations.append(explain(piece, state, slack, title, budget))
            break
    return verdict


def prefix(ops: Sequence[Op], until: int) -> list[Op]:
    """What had been seen at a moment: replies that came later are not known yet."""
    return [op if op.ret <= until else op._replace(reply=LOST, ret=FOREVER) for op in ops if op.call <= until]


def explain(ops: Sequence[Op], start: State, slack: int = 0, title: str = "", budget: int = BUDGET) -> str:
    """The shortest part of a history that no order explains, as text; its last reply is the wrong one."""
    ends = sorted({op.ret for op in ops if op.reply is not LOST})
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        found = search(prefix(ops, ends[middle]), start, slack, budget)
        low, high = (low, middle) if found.order is None and not found.undecided else (middle + 1, high)
    part = prefix(ops, ends[high])
    found = search(part, start, slack, budget)
    origin = part[0].call
    culprit = next((op for op in part if op.ret == ends[high]), part[-1])
    lines = [f"no order explains {title or 'this history'}; it begins as {_show(start)}"]
    lines += [f"  {_line(op, origin)}{'   <-- never possible' if op is culprit else ''}" for op in part[-80:]]
    placed = [part[index] for index in found.stuck][-12:]
    lines.append("  the longest order found ends with:")
    lines += [f"    {_line(op, origin)}" for op in placed]
    state = start
    for index in found.stuck:
        options = outcomes(state, part[index], slack)
        state = options[0] if options else state
    lines.append(f"    which leaves {_show(state)}")
    return "\n".join(lines)


def _line(op: Op, origin: int) -> str:
    end = "   …    " if op.ret >= FOREVER else f"{(op.ret - origin) / 1000:8.1f}"
    args = " ".join(map(_show, op.args))
    keys = ",".join(map(str, op.keys))
    said = "no reply yet" if op.reply is LOST else _show(op.reply)
    return f"{(op.call - origin) / 1000:8.1f} – {end} µs  c{op.client:<4} {op.name} [{keys}] {args} -> {said}"


def _show(value: Any) -> str:
    if isinstance(value, bytes):
        return repr(value) if len(value) <= 40 else f"{value[:24]!r}…({len(value)})"
    if type(value) is Mortal:
        return f"{_show(value.value)} until {value.first / MS:.1f}–{value.last / MS:.1f} ms"
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))})"
    return str(value)


def check_channel(
    published: Sequence[tuple[int, int, bytes]], received: Sequence[Sequence[bytes]]
) -> list[str]:
    """Messages of one channel, each (call, ret, message), all different, and what each subscriber got: all of
    them, once, in one order, and none before one that had been published earlier."""
    wrong = []
    known = {message: (call, ret) for call, ret, message in published}
    for number, got in enumerate(received):
        if len(set(got)) != len(got) or set(got) != set(known):
            lost, strange = set(known) - set(got), set(got) - set(known)
            wrong.append(
                f"subscriber {number} got {len(got)} of {len(known)} messages; missing {sorted(lost)[:5]}, "
                f"never published {sorted(strange)[:5]}"
            )
            continue
        if list(got) != list(received[0]):
            wrong.append(f"subscriber {number} got another order than subscriber 0")
        latest = 0
        for message in got:
            call, ret = known[message]
            if ret < latest:
                wrong.append(f"subscriber {number} got {message!r} after one that was published later")
            latest = max(latest, call)
    return wrong
