"""The coherence protocol (docs/coherence.md) as a transition system: two clients' BPF programs, the server's
main thread, its drain thread, a client that is never served, and a crash of the server at any step.

A state is a flat tuple; the constants PC ... DEAD name its places. One step is what others can tell apart:
steps that nobody else sees, or that only let others go on (counting out, answering), are joined to the one
before. Memory is sequentially consistent, as x86-64 is for this protocol with full barriers at the two places
that need them (counting in before reading the gate; closing it before reading the counts). The number of the
event loop's iterations and of cuts is not bounded; the number of clients' operations is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .explore import State, Step
from .register import (
    ABSENT,
    DEL,
    GET,
    GETSET,
    KINDS,
    SET,
    START,
    Operation,
    Pending,
    answer,
    result_of,
    states_now,
)


class Break(Enum):
    """Ways to break the protocol."""

    EARLY_GATE = "the gate opens at BEFORE_SLEEP"
    NO_ACTIVE_WAIT = "who closes the gate does not wait for active programs"
    NO_FLIP_WAIT = "the generation is flipped without waiting for active programs"
    GATE_BEFORE_COUNT = "a program reads the gate, then counts itself in"
    NO_DRAIN = "commands run before the kernel's SETs are in Redis"
    NO_INVALIDATION = "a command does not make the table forget its key"
    CLEAN_BEFORE_WRITE = "a cut is clean when Redis has it, not when its AOF has it: no journal"
    NO_CUT_NUMBER = "recovery applies everything in the journal"
    MARKER_FIRST = "the cut's number is not in the cut's transaction, but before it"
    POPULATE_IN_THREAD = "another thread than the main thread copies a key into the table"
    POPULATE_BEFORE_WRITE = "keys are copied into the table at BEFORE_SLEEP, before the AOF is written"
    SPLIT_CUT = "a cut is propagated as single SETs"
    NO_CUT = "entries are copied while programs go on writing in the same generation"
    FREE_ON_INVALIDATION = "an entry in the journal is freed, not DROPPED, when Redis changes its key"
    OVERWRITE_OLD = "an entry that waits for its cut is overwritten in place"
    NO_READER_CHECK = "a reader does not look whether the bucket has moved"
    RECOVER_AT_ONCE = "recovery does not wait for active programs"
    OPEN_WHILE_POSTPONED = (
        "the gate opens while Redis answers before it writes its AOF (an fsync is under way)"
    )


@dataclass(frozen=True)
class Bounds:
    """What is explored. The first operation is on A, and client 0's if both have as many: by symmetry."""

    operations: tuple[int, int] = (2, 1)  # of each client
    remote: bool = (
        True  # a third client, never served, with one command; it may be one unblocked after BEFORE_SLEEP
    )
    pair: int = 0  # instead: client 0 counts up A, then B, so many times; client 1 only reads
    kinds: tuple[int, ...] = (GET, SET, GETSET, DEL)
    crash: bool = True
    postponed: bool = (
        False  # appendfsync everysec: while an fsync is under way Redis does not write, but answers
    )


KEYS = "AB"

# Entries' states; FREE ones are not there at all.
CLEAN, PENDING, DIRTY, ORPHAN, DROPPED = range(5)

# Places in a state.
PC, AT, GATE, ARMED, HOLD, GEN, ASKED = range(7)  # AT: key of the command that runs; ASKED: of GETs, bits
ENTRY = 7  # of each key: () or (first half, second half, state, cut)
UNLINKED = 9  # of each key: entries that are not in the table any more, but in the journal, oldest first
LOCK = 11  # of each key's bucket: 0 or the client + 1
RING = 13  # keys that became dirty in this generation, in order
CLIENT = 14  # two, and the remote one
DRAINER = 17
DB = 18  # Redis's memory
BUFFER = 20  # AOF records not written: (((key, value), ...), cut or 0)
FILE = 21  # what the AOF says: (A, B, newest cut)
PASTS = 22
DEAD = 23

# The main thread.
ASLEEP, CLOSED, COMMANDS, UNBLOCKED, POSTPONED, WRITTEN = range(6)  # POSTPONED: with an fsync under way
FORGET = {COMMANDS: 6, UNBLOCKED: 7, POSTPONED: 8}  # the key of the command that ran there
GO_ON = {forget: pc for pc, forget in FORGET.items()}

# A client: (where, kind, key, operations begun, a, b).
IDLE = 0
AT_GATE, AT_LOCK, AT_FIRST, AT_SECOND = 1, 2, 3, 4  # SET; a: overwrites in place; counted in
NOT_COUNTED = 5  # SET that has seen an open gate, in the variant that counts itself in afterwards
GET_FIRST, GET_SECOND = 6, 7  # a: first half of the value, b: the bucket has moved
QUEUED, EXECUTED = 8, 9  # passed to Redis; a: its answer

# The drainer: (where, keys to copy, copied, key copied last).
RESTING, HOLDING, COPYING, MARKING, POPULATING = range(5)
REST = (RESTING, (), (), 0)

GATE_OPEN = "a command executes with the gate open"
NOT_LINEARIZABLE = "the answers are not linearizable"
TORN = "a reader accepts a torn value"
TORN_CUT = "a torn value gets into Redis"
LOST = "after the crash the registers are in a state that cannot be"
NEWER_B = "B is newer than A"
STUCK = "nobody can go on"
UNSTABLE = "a second recovery changes what the first one left"


def value_of(client: int, begun: int) -> int:
    return client * 8 + begun


def _pair_broken(a: int, b: int) -> bool:
    """Client 0 writes A=1, B=2, A=3, B=4, ...: round n of B never without round n of A."""
    return (b + 1) // 2 > (a + 1) // 2


class Protocol:
    def __init__(self, bounds: Bounds | None = None, *breaks: Break) -> None:
        self.bounds = bounds or Bounds()
        self.breaks = frozenset(breaks)
        for one in Break:
            setattr(self, one.name.lower(), one in self.breaks)

    def start(self) -> State:
        client = (IDLE, GET, 0, 0, 0, 0)
        return (
            *(ASLEEP, 0, 1, 1, 0, 1, 0),
            *((), ()),
            *((), ()),
            *(0, 0),
            (),
            *(client, client, client),
            REST,
            *(ABSENT, ABSENT),
            (),
            (ABSENT, ABSENT, 0),
            START,
            0,
        )

    def successors(self, s: State) -> list[Step]:
        out: list[Step] = []
        if s == _END:
            return out
        self._program(s, 0, out)
        self._program(s, 1, out)
        if not s[DEAD]:
            self._main(s, out)
            self._drain_thread(s, out)
            if not out:
                out.append(("nobody can go on", s, STUCK))
            if self.bounds.crash:
                self._crash(s, out)
        elif self.recover_at_once or not _active(s):
            # Recovered states are looked at here, and not followed.
            out.append(self._recover(s))
        return out

    # ---- a client and its BPF program ----

    def _program(self, s: State, i: int, out: list[Step]) -> None:
        me = s[CLIENT + i]
        where, kind, key, begun, a, b = me
        if where == IDLE:
            if not s[DEAD]:
                self._begin(s, i, begun, out)
            return
        if where >= QUEUED:
            return
        name = f"client {i}: {KINDS[kind]} {KEYS[key]}"
        if where in (AT_GATE, NOT_COUNTED):
            n = list(s)
            if where == NOT_COUNTED:
                n[CLIENT + i] = (AT_LOCK, kind, key, begun, 0, 0)
                out.append((f"{name}: counts itself in", tuple(n), None))
            elif s[GATE] and not s[HOLD]:
                if self.gate_before_count:
                    n[CLIENT + i] = (NOT_COUNTED, kind, key, begun, 0, 0)
                else:
                    n[CLIENT + i] = (AT_LOCK, kind, key, begun, 0, 0)
                out.append((f"{name}: finds the gate open", tuple(n), None))
            else:
                n[CLIENT + i] = (QUEUED, kind, key, begun, 0, 0)
                out.append((f"{name}: finds the gate closed or held; passes", tuple(n), None))
        elif where == AT_LOCK:
            if s[LOCK + key]:
                n = list(s)
                n[CLIENT + i] = (QUEUED, kind, key, begun, 0, 0)
                out.append((f"{name}: bucket locked; passes", tuple(n), None))
                return
            n = list(s)
            n[LOCK + key] = i + 1
            _moved(n, key)
            e = s[ENTRY + key]
            if e and (self.overwrite_old or not (e[2] == DIRTY and e[3] != s[GEN])):
                m = n.copy()
                m[CLIENT + i] = (AT_FIRST, kind, key, begun, 1, 0)
                out.append((f"{name}: locks, will overwrite in place", tuple(m), None))
            # Also when the value's size class is another one.
            n[CLIENT + i] = (AT_SECOND, kind, key, begun, 0, 0)
            out.append((f"{name}: locks, will link a new entry", tuple(n), None))
        elif where == AT_FIRST:
            n = list(s)
            e = s[ENTRY + key]
            n[ENTRY + key] = (value_of(i, begun), *e[1:])
            n[CLIENT + i] = (AT_SECOND, kind, key, begun, 1, 0)
            out.append((f"{name}: writes half of the value", tuple(n), None))
        elif where == AT_SECOND:
            n = list(s)
            _commit(n, key, value_of(i, begun), inplace=a)
            n[LOCK + key] = 0
            out.append(self._answer(n, i, 0, f"{name}={value_of(i, begun)}: in the table; counts out; +OK"))
        elif where == GET_FIRST:
            n = list(s)
            e = s[ENTRY + key]
            n[CLIENT + i] = (GET_SECOND, kind, key, begun, e[0] if e else -1, b)
            out.append((f"{name}: copies half of the value", tuple(n), None))
        else:
            n = list(s)
            e = s[ENTRY + key]
            if b and not self.no_reader_check:
                n[CLIENT + i] = (QUEUED, kind, key, begun, 0, 0)
                out.append((f"{name}: the bucket has moved; passes", tuple(n), None))
            elif not e or a != e[1]:
                out.append((f"{name}: accepts half of one value and half of another", tuple(n), TORN))
            else:
                out.append(self._answer(n, i, a, f"{name}: copies the rest, answers {a}"))

    def _begin(self, s: State, i: int, begun: int, out: list[Step]) -> None:
        bounds = self.bounds
        if bounds.pair and i == 0:
            if begun < 2 * bounds.pair:
                self._begin_one(s, i, SET, begun % 2, begun + 1, out)
            return
        if begun == bounds.operations[i]:
            return
        first = not s[CLIENT][3] and not s[CLIENT + 1][3]
        if first and i and bounds.operations[0] == bounds.operations[1]:
            return
        for kind in (GET,) if bounds.pair else bounds.kinds:
            for key in (0,) if first else (0, 1):
                self._begin_one(s, i, kind, key, begun + 1, out)

    def _begin_one(self, s: State, i: int, kind: int, key: int, begun: int, out: list[Step]) -> None:
        n = list(s)
        name = f"client {i}: {KINDS[kind]} {KEYS[key]}"
        if kind == GET and s[ENTRY + key] and not s[LOCK + key]:
            n[CLIENT + i] = (GET_FIRST, kind, key, begun, 0, 0)
            out.append((f"{name}: finds the entry", tuple(n), None))
        elif kind == SET:
            n[CLIENT + i] = (AT_GATE, kind, key, begun, 0, 0)
            out.append(
                (f"{name}: {'begins' if self.gate_before_count else 'counts itself in'}", tuple(n), None)
            )
        else:
            n[CLIENT + i] = (QUEUED, kind, key, begun, 0, 0)
            out.append((f"{name}: passes to Redis", tuple(n), None))

    def _answer(self, n: list, i: int, result: int, label: str) -> Step:
        pasts = answer(n[PASTS], _pending(n), i, result)
        n[PASTS] = pasts
        n[CLIENT + i] = (IDLE, GET, 0, n[CLIENT + i][3], 0, 0)
        return label, tuple(n), None if pasts else NOT_LINEARIZABLE

    # ---- the server's main thread ----

    def _main(self, s: State, out: list[Step]) -> None:
        pc = s[PC]
        n = list(s)
        if pc == ASLEEP:
            if s[DRAINER][0] in (RESTING, POPULATING):
                n[PC] = CLOSED
                n[GATE] = n[ARMED] = 0
                out.append(("main: wakes up, takes the GIL, closes the gate", tuple(n), None))
            if s[ARMED] and not s[GATE]:
                m = list(s)
                m[GATE] = 1
                out.append(("main: sleeps in epoll, which opens the gate", tuple(m), None))
        elif pc == CLOSED:
            if _active(s) and not self.no_active_wait:
                return
            _confirm(n)
            records: list = []
            torn = False
            if not self.no_drain:
                torn = self._drain_now(n, records)
            if not (self.populate_before_write or self.populate_in_thread):
                _populate(n)
            n[PC] = COMMANDS
            self._appended(n, s, records, "main: drains, populates (AFTER_SLEEP)", out, torn)
        elif pc in FORGET:
            # Any client's command may be one that was blocked: looked at where it matters most.
            for i in (0, 1, 2) if pc == COMMANDS or self.bounds.postponed else (2,):
                self._execute(s, i, out)
            if pc == COMMANDS:
                if self.populate_before_write:
                    _populate(n)
                n[GATE if self.early_gate else ARMED] = 1
                n[PC] = UNBLOCKED
                out.append(("main: arms the gate (BEFORE_SLEEP)", tuple(n), None))
                if self.bounds.postponed:
                    self._postponed(s, out)
            else:
                if pc == POSTPONED:
                    m = list(s)
                    m[PC] = WRITTEN
                    out.append(("main: does not write the AOF", tuple(m), None))
                _write(n)
                n[PC] = WRITTEN
                out.append(("main: writes the AOF", tuple(n), None))
        elif pc in GO_ON:
            key = s[AT]
            if s[LOCK + key]:
                return
            n[PC] = GO_ON[pc]
            n[AT] = 0
            if not self.no_invalidation:
                self._forget(n, key)
            out.append((f"main: the command's event makes the table forget {KEYS[key]}", tuple(n), None))
        else:
            answers = [i for i in range(3) if s[CLIENT + i][0] == EXECUTED]
            if not answers:
                n[PC] = ASLEEP
                out.append(("main: releases the GIL", tuple(n), None))
            elif s[ARMED] and not s[GATE]:
                n[GATE] = 1
                out.append(("main: its first reply opens the gate", tuple(n), None))
            else:
                for i in answers:
                    result = s[CLIENT + i][4]
                    out.append(self._answer(list(s), i, result, f"main: Redis answers client {i}: {result}"))

    def _postponed(self, s: State, out: list[Step]) -> None:
        """BEFORE_SLEEP with an fsync under way: unless it ends soon, replies leave unwritten."""
        n = list(s)
        if self.populate_before_write:
            _populate(n)
        # What only cuts have put there is in the journal.
        if self.open_while_postponed or all(cut for _, cut in s[BUFFER]):
            n[ARMED] = 1
        n[PC] = POSTPONED
        arms = "arms the gate" if n[ARMED] else "does not arm the gate"
        out.append((f"main: {arms} (BEFORE_SLEEP, fsync under way)", tuple(n), None))

    def _execute(self, s: State, i: int, out: list[Step]) -> None:
        where, kind, key, begun, _, _ = s[CLIENT + i]
        operations = [(kind, key)] if where == QUEUED else []
        if i == 2 and self.bounds.remote and not begun:
            # Its command was sent before, perhaps long ago. It counts as begun now, which is stricter.
            begun = 1
            operations = [(kind, key) for kind in (SET, DEL) for key in (0, 1)]
        for kind, key in operations:
            n = list(s)
            value = value_of(i, begun)
            new, result = result_of(kind, value, n[DB + key])
            n[CLIENT + i] = (EXECUTED, kind, key, begun, result, 0)
            label = f"main: executes client {i}'s {KINDS[kind]} {KEYS[key]}"
            if not self.early_gate:
                n[ARMED] = 0
            if s[GATE]:
                out.append((label, tuple(n), GATE_OPEN))
                continue
            if kind == GET:
                if not s[ENTRY + key]:
                    n[ASKED] |= 1 << key
                out.append((label, tuple(n), None))
                continue
            if kind == DEL and not result:
                out.append((label, tuple(n), None))
                continue
            n[DB + key] = new
            n[AT] = key
            n[PC] = FORGET[s[PC]]
            self._appended(n, s, [(((key, new),), 0)], label, out, False)

    def _forget(self, n: list, key: int) -> None:
        e = n[ENTRY + key]
        if not e:
            return
        n[ENTRY + key] = ()
        _moved(n, key)
        if e[2] == PENDING and not self.free_on_invalidation:
            n[UNLINKED + key] = (*n[UNLINKED + key], (e[0], DROPPED, e[3]))

    def _drain_now(self, n: list, records: list) -> bool:
        """AFTER_SLEEP: no program is active. True: a value was torn."""
        cut = []
        torn = False
        for key in n[RING]:
            e = n[ENTRY + key]
            if e and e[2] == DIRTY:
                torn |= e[0] != e[1]
                cut.append((key, e[0]))
                n[ENTRY + key] = (*e[:2], CLEAN if self.clean_before_write else PENDING, e[3])
        n[RING] = ()
        if cut:
            n[GEN] += 1
            records.extend(self._apply(n, tuple(cut), n[GEN] - 1))
        return torn

    def _apply(self, n: list, cut: tuple, number: int) -> list:
        """Brings a cut into Redis. Returns its AOF records."""
        for key, value in cut:
            n[DB + key] = value
        if self.split_cut:
            return [*(((pair,), 0) for pair in cut), ((), number)]
        if self.marker_first:
            return [((), number), (cut, 0)]
        return [(cut, number)]

    def _appended(self, n: list, s: State, records: list, label: str, out: list[Step], torn: bool) -> None:
        """The step that appends these records to the AOF buffer. The AOF may be cut after each of them."""
        violation = TORN_CUT if torn else None
        if self.bounds.pair and records:
            state = [s[DB], s[DB + 1]]
            for pairs, _ in records:
                for key, value in pairs:
                    state[key] = value
                if _pair_broken(*state):
                    violation = f"{NEWER_B} in the AOF"
        n[BUFFER] = (*n[BUFFER], *records)
        what = "".join(f" {KEYS[key]}={value or 'absent'}" for pairs, _ in records for key, value in pairs)
        out.append((f"{label}{': AOF buffer gets' if what else ''}{what}", tuple(n), violation))

    # ---- the drain thread ----

    def _drain_thread(self, s: State, out: list[Step]) -> None:
        where, todo, copied, key = s[DRAINER]
        n = list(s)
        if where == RESTING:
            if s[PC] == ASLEEP and s[RING]:
                _confirm(n)
                n[HOLD] = 0 if self.no_cut else 1
                n[DRAINER] = (HOLDING, (), (), 0)
                out.append(("drainer: takes the GIL, holds writers", tuple(n), None))
            if self.populate_in_thread and s[PC] == ASLEEP and s[ASKED]:
                key = 0 if s[ASKED] & 1 else 1
                m = list(s)
                m[ASKED] &= ~(1 << key)
                m[DRAINER] = (POPULATING, (), ((key, s[DB + key]),), 0)
                out.append((f"thread: reads {KEYS[key]} from Redis", tuple(m), None))
        elif where == HOLDING:
            if _active(s) and not (self.no_flip_wait or self.no_cut):
                return
            n[DRAINER] = (COPYING, s[RING], (), 0)
            n[RING] = ()
            if not self.no_cut:
                n[GEN] += 1
                n[HOLD] = 0
            out.append(("drainer: flips the generation, lets writers go", tuple(n), None))
        elif where == COPYING and todo:
            key = todo[0]
            value, torn = _oldest_due(s, key)
            n[DRAINER] = (MARKING, todo[1:], (*copied, (key, value)), key)
            out.append((f"drainer: copies {KEYS[key]}={value}", tuple(n), TORN_CUT if torn else None))
        elif where == MARKING:
            e = s[ENTRY + key]
            if not any(u[1] == ORPHAN for u in s[UNLINKED + key]) and e and e[2] == DIRTY:
                n[ENTRY + key] = (*e[:2], CLEAN if self.clean_before_write else PENDING, e[3])
            n[DRAINER] = (COPYING, todo, copied, 0)
            out.append((f"drainer: marks {KEYS[key]} PENDING, unless it is an orphan", tuple(n), None))
        elif where == COPYING:
            number = s[GEN] - 1
            if self.no_cut:
                n[GEN] += 1
                number = s[GEN]
            records = self._apply(n, copied, number)
            for key in (0, 1):
                n[UNLINKED + key] = tuple(u for u in s[UNLINKED + key] if u[1] != ORPHAN)
            n[DRAINER] = REST
            self._appended(n, s, records, "drainer: applies the cut, releases the GIL", out, False)
        elif where == POPULATING:
            ((key, value),) = copied
            if not s[LOCK + key]:
                if not s[ENTRY + key] and value != ABSENT:
                    n[ENTRY + key] = (value, value, CLEAN, 0)
                    _moved(n, key)
                n[DRAINER] = REST
                out.append(
                    (f"thread: puts {KEYS[key]}={value} into the table, if it is not there", tuple(n), None)
                )

    # ---- crash and recovery ----

    def _crash(self, s: State, out: list[Step]) -> None:
        # In the middle of a write the AOF ends in a part of a record, which loading it cuts off.
        writing = s[PC] in (UNBLOCKED, POSTPONED) and s[BUFFER]
        writes = range(len(s[BUFFER])) if writing else (0,)
        for written in writes:
            n = list(s)
            for record in s[BUFFER][:written]:
                n[FILE] = _replay(n[FILE], record)
            n[DEAD] = 1
            n[PC] = n[AT] = n[GATE] = n[ARMED] = n[HOLD] = n[ASKED] = 0
            n[RING] = n[BUFFER] = ()
            n[DB] = n[DB + 1] = ABSENT
            n[DRAINER] = REST
            for i in range(3):
                if n[CLIENT + i][0] == EXECUTED:
                    n[CLIENT + i] = (QUEUED, *n[CLIENT + i][1:4], 0, 0)
            label = "kill -9 of the server"
            if written:
                label += f" while it writes the AOF: {written} of {len(s[BUFFER])} records are"
            out.append((label, tuple(n), None))

    def _recover(self, s: State) -> Step:
        a, b, marker = self._recovered(s, s[FILE])
        n = list(s)
        n[DEAD] = 2
        n[FILE] = (a, b, marker)
        label = (
            f"recovery: the AOF has A={s[FILE][0]} B={s[FILE][1]} and cut {s[FILE][2]}; leaves A={a} B={b}"
        )
        if self.bounds.pair and _pair_broken(a, b):
            return label, tuple(n), f"{NEWER_B} after recovery"
        # What Redis answered before writing it may be gone, as without the offload: only the pair tells.
        if not self.bounds.postponed and (a, b) not in states_now(s[PASTS], _pending(s)):
            return label, tuple(n), LOST
        for key in (0, 1):
            # A key is deleted, the AOF has that, and the server is killed again.
            after = [a, b, marker]
            after[key] = ABSENT
            if self._recovered(s, tuple(after)) != tuple(after):
                return f"{label}; DEL {KEYS[key]}; kill -9 again", tuple(n), UNSTABLE
        return label, _END, None

    def _recovered(self, s: State, file: tuple) -> tuple[int, int, int]:
        state = [file[0], file[1]]
        newest = file[2]
        for key in (0, 1):
            e = s[ENTRY + key]
            journal = [(value, cut) for value, _, cut in s[UNLINKED + key]]
            if e and e[2] in (PENDING, DIRTY):
                # A torn value would be neither half: show it as one that nobody wrote.
                journal.append((e[0] if e[0] == e[1] else -1, e[3]))
            for value, cut in journal:
                if cut > file[2] or self.no_cut_number:
                    state[key] = value
                    newest = max(newest, cut)
        return state[0], state[1], newest


_END: State = ("recovered",)


def _active(s: State) -> bool:
    return AT_GATE <= s[CLIENT][0] <= AT_SECOND or AT_GATE <= s[CLIENT + 1][0] <= AT_SECOND


def _pending(s: State | list) -> Pending:
    pending: list[Operation | None] = []
    for i in range(3):
        where, kind, key, begun, _, _ = s[CLIENT + i]
        pending.append(None if where == IDLE else (kind, key, value_of(i, begun)))
    return tuple(pending)


def _moved(n: list, key: int) -> None:
    """The bucket's sequence number changes: readers that are inside will see it."""
    for i in (0, 1):
        where, kind, at, begun, a, _ = n[CLIENT + i]
        if where in (GET_FIRST, GET_SECOND) and at == key:
            n[CLIENT + i] = (where, kind, at, begun, a, 1)


def _commit(n: list, key: int, value: int, inplace: int) -> None:
    """table_commit: the entry is dirty, in the ring and linked; what it replaces is freed or an orphan."""
    e = n[ENTRY + key]
    gen = n[GEN]
    was = e[2] if e and inplace else None
    if e and not inplace and e[2] == DIRTY and e[3] != gen:
        n[UNLINKED + key] = (*n[UNLINKED + key], (e[0], ORPHAN, e[3]))
    n[ENTRY + key] = (value, value, DIRTY, gen)
    if was != DIRTY:
        n[RING] = (*[k for k in n[RING] if k != key], key)


def _oldest_due(s: State, key: int) -> tuple[int, bool]:
    for value, state, _ in s[UNLINKED + key]:
        if state == ORPHAN:
            return value, False
    e = s[ENTRY + key]
    return e[0], e[0] != e[1]


def _confirm(n: list) -> None:
    """With the GIL: nothing waits for the AOF, so every cut that was applied is in it."""
    if n[BUFFER]:
        return
    for key in (0, 1):
        e = n[ENTRY + key]
        if e and e[2] == PENDING:
            n[ENTRY + key] = (*e[:2], CLEAN, 0)
        n[UNLINKED + key] = tuple(u for u in n[UNLINKED + key] if u[1] != DROPPED)


def _populate(n: list) -> None:
    for key in (0, 1):
        if n[ASKED] >> key & 1 and not n[ENTRY + key] and n[DB + key] != ABSENT:
            n[ENTRY + key] = (n[DB + key], n[DB + key], CLEAN, 0)
            _moved(n, key)
    n[ASKED] = 0


def _replay(file: tuple, record: tuple) -> tuple[int, int, int]:
    state = list(file)
    for key, value in record[0]:
        state[key] = value
    state[2] = record[1] or file[2]
    return tuple(state)


def _write(n: list) -> None:
    for record in n[BUFFER]:
        n[FILE] = _replay(n[FILE], record)
    n[BUFFER] = ()
