"""A load that keeps books: what was acknowledged, and what may or may not have happened when a server died.

Each client process owns keys that nobody else writes, one connection per owner, one command at a time. So
of every key it is
known what it must hold: what its last acknowledged command made of it. Of one key of each owner, the one of
the command
that was sent and not answered, two values are right.

*Rings* are keys that one owner sets to 1, 2, 3, … in turn: ring of width 2: A=1 B=2 A=3 B=4 …. Whatever is
cut off anywhere
must hold the values after one of these steps, never a later one without an earlier: "a state that existed".
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kflex_repro.redis.resp import Decoder, ErrorReply
from tests.redis.harness import Conn, Timeout, eventually

Value = bytes | None
"""What a key holds; None: it is not there."""

RINGS = (2, 5)
SERVED_SIZES = (0, 10, 60, 61, 700, 3000, 4096)
LARGE = 9000
PAD = b"~"


@dataclass
class Book:
    """What must be in Redis. ``doubtful``: the keys whose last command was not answered, and the value it
    would
    have made."""

    known: dict[bytes, Value] = field(default_factory=dict)
    doubtful: dict[bytes, Value] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    """Commands so far, by owner."""
    errors: list[str] = field(default_factory=list)
    """Replies that were wrong while the load ran."""

    def merge(self, other: Book) -> None:
        self.known.update(other.known)
        self.doubtful.update(other.doubtful)
        self.steps.update(other.steps)
        self.errors.extend(other.errors)

    def wrong(self, found: Mapping[bytes, Value]) -> list[str]:
        """What the server does not have as it must; [] when everything is right."""
        out = list(self.errors)
        for key, must in self.known.items():
            have = found[key]
            if have == must or (key in self.doubtful and have == self.doubtful[key]):
                continue
            kind = "lost" if have is None else "risen" if must is None else "not the last value"
            asked = f", {shown(self.doubtful[key])} was asked for" if key in self.doubtful else ""
            out.append(f"{kind}: {key!r} is {shown(have)}, acknowledged was {shown(must)}{asked}")
        return [*out, *rings_broken(found)]

    def settle(self, found: Mapping[bytes, Value]) -> None:
        """From now on what was found is what there is."""
        self.known = {key: found[key] for key in self.known}
        self.doubtful = {}
        self.errors = []


def shown(value: Value) -> str:
    if value is None:
        return "nothing"
    return repr(value if len(value) < 60 else value[:40]) + (
        f" ({len(value)} bytes)" if len(value) >= 60 else ""
    )


# -- rings --


def ring_key(owner: int, width: int, at: int) -> bytes:
    return b"o%d:ring%d:%d" % (owner, width, at)


def ring_step(value: Value) -> int:
    """The step that set this value; 0: none yet."""
    return int(value.rstrip(PAD)) if value is not None else 0


def ring_broken(owner: int, width: int, found: Mapping[bytes, Value]) -> str:
    """ "" when the ring's keys hold what they held after one of the owner's steps; else what they hold."""
    have = [ring_step(found.get(ring_key(owner, width, at))) for at in range(width)]
    newest = max(have)
    # The last step that set key ``at``, among the first ``newest``.
    must = [max(0, newest - (newest - at) % width) for at in range(width)]
    return "" if have == must else f"ring of {width} of owner {owner} is {have}: never a state"


def rings_broken(found: Mapping[bytes, Value]) -> list[str]:
    """Each ring among these keys that is in no state that existed."""
    rings = set()
    for key in found:
        owner, _, rest = key.partition(b":")
        if rest.startswith(b"ring"):
            rings.add((int(owner[1:]), int(rest[4:].partition(b":")[0])))
    return [line for owner, width in sorted(rings) if (line := ring_broken(owner, width, found))]


# -- the owners --


class Owner:
    """One connection and the keys that it alone writes."""

    def __init__(self, port: int, number: int, book: Book, rng: random.Random, passing: float) -> None:
        self.number = number
        self.conn = Conn(port)
        self.rng = rng
        self.passing = passing
        """Share of commands other than SET; 1: it hammers."""
        self.step_number = book.steps.get(number, 0)
        prefix = b"o%d:" % number
        self.known: dict[bytes, Value] = {
            key: value for key, value in book.known.items() if key.startswith(prefix)
        }
        self.doubtful: dict[bytes, Value] = {}
        self.errors: list[str] = []
        self.ring_at = {
            width: max(ring_step(self.known.get(ring_key(number, width, at))) for at in range(width))
            for width in RINGS
        }

    def key(self, name: bytes) -> bytes:
        return b"o%d:%s" % (self.number, name)

    def one(self) -> None:
        """One command, its reply, and what the two say of the key. ConnectionError when the server has
        gone.
        """
        self.step_number += 1
        args, key, becomes, reply = self._hammer() if self.passing == 1 else self._mostly_set()
        self.doubtful = {key: becomes}
        self.known.setdefault(key, None)
        said = self.conn.do(*args)
        if isinstance(said, ErrorReply) or said != reply:
            self.errors.append(f"{args[0]!r} {key!r}: {said!r}, not {reply!r}")
        self.known[key] = becomes
        self.doubtful = {}

    def _fresh(self) -> bytes:
        """A value that was never there before: an integer, or text of some size."""
        if self.rng.random() < 0.4:
            return b"%d" % self.step_number
        text = b"%d:%d:" % (self.number, self.step_number)
        size = LARGE if self.rng.random() < 0.01 else self.rng.choice(SERVED_SIZES)
        return text.ljust(size, b".")

    def _mostly_set(self) -> Any:
        # Keys that live and die: SET, then sooner or later DEL, or a command that makes something else of it.
        mortal = self.key(b"life%d" % self.rng.randrange(8))
        if self.rng.random() < self.passing:
            if self.rng.random() < 0.2:
                return ("GET", mortal), mortal, self.known.get(mortal), self.known.get(mortal)
            return self._change(mortal)
        kind = self.rng.random()
        if kind < 0.25:
            return self._set(mortal, self._fresh())
        if kind < 0.60:
            width = self.rng.choice(RINGS)
            self.ring_at[width] += 1
            step = self.ring_at[width]
            # Some of it integers, some not: they come into Redis by different commands.
            return self._set(ring_key(self.number, width, step % width), b"%d" % step + PAD * (step % 3))
        return self._set(self.key(b"v%d" % self.rng.randrange(40)), self._fresh())

    def _set(self, key: bytes, value: bytes) -> Any:
        return ("SET", key, value), key, value, b"OK"

    def _change(self, key: bytes) -> Any:
        was = self.known.get(key)
        kind = self.rng.random()
        if kind < 0.5:
            return ("DEL", key), key, None, 0 if was is None else 1
        if kind < 0.6:
            return ("GETDEL", key), key, None, was
        if kind < 0.7:
            value = self._fresh()
            return ("GETSET", key, value), key, value, was
        if was is not None and was.isdigit() and len(was) < 15:
            return ("INCRBY", key, 7), key, b"%d" % (int(was) + 7), int(was) + 7
        made = (was or b"") + b"+%d" % self.step_number
        return ("APPEND", key, made[len(was or b"") :]), key, made, len(made)

    def _hammer(self) -> Any:
        """Commands that pass: Redis never rests."""
        kind = self.rng.random()
        if kind < 0.5:
            key = self.key(b"count")
            number = int(self.known.get(key) or b"0") + 1
            return ("INCR", key), key, b"%d" % number, number
        key = self.key(b"text%d" % self.rng.randrange(3))
        if len(self.known.get(key) or b"") > 200:
            return ("DEL", key), key, None, 1
        return self._change(key)


class Load:
    """Owners in processes of their own, until told to stop or until the server has gone.

    The first ``hammers`` owners send only commands that pass, in bursts; the others SETs, and ``passing``
    of their commands
    are others. Goes on with the data that ``book`` describes.
    """

    def __init__(
        self,
        port: int,
        book: Book | None = None,
        *,
        seed: int = 1,
        processes: int = 2,
        owners: int = 6,
        hammers: int = 1,
        passing: float = 0.1,
    ) -> None:
        self.book = Book() if book is None else book
        assert not self.book.doubtful, "settle first"
        context = multiprocessing.get_context("fork")
        self._stop = context.Event()
        self._steps = context.Array("Q", processes, lock=False)
        self._clients = []
        for n in range(processes):
            mine = range(n, owners, processes)
            said, say = context.Pipe(duplex=False)
            process = context.Process(target=self._run, args=(n, port, mine, seed, hammers, passing, say))
            process.start()
            say.close()
            self._clients.append((process, said))

    def _run(self, n: int, port: int, mine: range, seed: int, hammers: int, passing: float, say: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        book = Book()
        owners: list[Owner] = []
        rng = random.Random(f"{seed}/pace/{n}")
        try:
            for number in mine:
                seeded = random.Random(f"{seed}/{number}/{self.book.steps.get(number, 0)}")
                share = 1.0 if number < hammers else passing
                owners.append(Owner(port, number, self.book, seeded, share))
            while not self._stop.is_set():
                for owner in owners:
                    # A hammer that never rests would keep the gate closed: bursts, and pauses in which SETs
                    # are served.
                    if owner.passing == 1 and rng.random() < 0.6:
                        continue
                    for _ in range(rng.randrange(1, 40)):
                        owner.one()
                        self._steps[n] += 1
        except (OSError, EOFError):
            pass  # the server has gone
        except Timeout as error:
            book.errors.append(f"client process {n}: {error}")
        for owner in owners:
            book.merge(Book(owner.known, owner.doubtful, {owner.number: owner.step_number}, owner.errors))
        say.send(book)

    @property
    def steps(self) -> int:
        """Commands that were acknowledged so far."""
        return sum(self._steps)

    def run_for(self, steps: int, timeout: float = 30.0) -> None:
        """Waits until so many more commands were acknowledged."""
        goal = self.steps + steps
        eventually(lambda: self.steps >= goal or not self.alive, timeout, what="the load's progress")
        assert self.alive or self.steps >= goal, "the load ended by itself"

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process, _ in self._clients)

    def stop(self) -> Book:
        """Ends the load, or takes its end; the books."""
        self._stop.set()
        book = Book(dict(self.book.known), {}, dict(self.book.steps))
        for process, said in self._clients:
            assert said.poll(60), "a client does not end"
            book.merge(said.recv())
            process.join(10)
        return book

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for process, said in self._clients:
            process.join(1 if exc[0] else 15)
            if process.is_alive():
                process.kill()
                process.join()
            said.close()


# -- looking --


def read_back(port: int, keys: Iterable[bytes]) -> dict[bytes, Value]:
    """What Redis itself holds, by a command that the kernel never answers; None: no such key."""
    wanted = sorted(keys)
    found: dict[bytes, Value] = {}
    with Conn(port) as conn:
        for start in range(0, len(wanted), 200):
            part = wanted[start : start + 200]
            replies = conn.do("MGET", *part)
            assert isinstance(replies, list), replies
            found.update(zip(part, replies, strict=True))
    return found


def everything(port: int) -> dict[bytes, Value]:
    """The whole of database 0."""
    with Conn(port) as conn:
        keys = conn.do("KEYS", "*")
    assert isinstance(keys, list)
    return read_back(port, keys)


def digest(port: int) -> bytes:
    with Conn(port) as conn:
        said = conn.do("DEBUG", "DIGEST")
    assert isinstance(said, bytes)
    return said


def quiesce(port: int) -> bytes:
    """Nothing the kernel has accepted is missing in Redis, the AOF or the replicas' stream; the digest
    then.
    """
    with Conn(port) as conn:
        # A command that passes: whatever was acknowledged before is drained first, and written before it is
        # answered.
        assert conn.do("SET", "quiesce", "now", "EX", "1000") == b"OK"
        assert conn.do("DEL", "quiesce") == 1
    return digest(port)


def moment_without_fsync(port: int, timeout: float = 20.0) -> float:
    """Waits for a moment at which Redis, with appendfsync everysec, writes before it replies; how long it
    lasts, seconds.

    While the fsync of each second runs, Redis itself only buffers (flushAppendOnlyFile): kill -9 then
    loses, with the
    offload or without it. That fsync starts with the first write of a wall-clock second.
    """
    deadline = time.monotonic() + timeout
    with Conn(port) as conn:
        while time.monotonic() < deadline:
            into = time.time() % 1
            if not 0.25 < into < 0.7:
                time.sleep(0.02)
                continue
            info = conn.do("INFO", "persistence")
            assert isinstance(info, bytes)
            if b"aof_pending_bio_fsync:0\r\n" in info:
                return 0.95 - into
            time.sleep(0.005)
    raise Timeout(f"the fsync does not end within {timeout} s")


# -- the AOF --


def aof_dir(directory: Path) -> Path:
    return directory / "appendonlydir"


def incr_file(directory: Path) -> Path:
    """The file that Redis appends to, by the manifest."""
    manifest = (aof_dir(directory) / "appendonly.aof.manifest").read_text().splitlines()
    (name,) = (line.split()[1] for line in manifest[-1:] if line.endswith("type i"))
    return aof_dir(directory) / name


def aof_units(data: bytes) -> Iterator[tuple[int, list[list[bytes]]]]:
    """What Redis replays as one: a command, or MULTI … EXEC; with the offset at which it ends. Stops where
    the file does.
    """
    decoder = Decoder()
    decoder.feed(data)
    unit: list[list[bytes]] = []
    queued = False
    while True:
        command = decoder.pop()
        if command is Decoder.INCOMPLETE:
            return
        assert isinstance(command, list), command
        name = command[0].upper()
        queued = queued or name == b"MULTI"
        unit.append(command)
        if not queued or name == b"EXEC":
            yield len(data) - decoder.pending, unit
            unit, queued = [], False


def replay(state: dict[bytes, Value], command: list[bytes]) -> None:
    """What a command of the load's AOF does to these keys; commands that it cannot hold raise."""
    name, args = command[0].upper(), command[1:]
    if name in (b"MULTI", b"EXEC", b"SELECT"):
        return
    if name in (b"SET", b"MSET"):
        pairs = args[:2] if name == b"SET" else args
        state.update(zip(pairs[::2], pairs[1::2], strict=True))
    elif name in (b"DEL", b"UNLINK"):
        for key in args:
            state[key] = None
    elif name in (b"INCR", b"INCRBY"):
        by = int(args[1]) if len(args) > 1 else 1
        state[args[0]] = b"%d" % (int(state.get(args[0]) or b"0") + by)
    elif name == b"APPEND":
        state[args[0]] = (state.get(args[0]) or b"") + args[1]
    else:
        raise AssertionError(f"the AOF has {command[:2]!r}")


def never_a_state(data: bytes, start: Mapping[bytes, Value] | None = None) -> list[str]:
    """Replays an incr file piece by piece: after which of them a ring is in no state that existed."""
    state = dict(start or {})
    for end, unit in aof_units(data):
        for command in unit:
            replay(state, command)
        if broken := rings_broken(state):
            return [
                f"the AOF cut at byte {end} of {len(data)}: {line}; last: {unit[-3:]!r}" for line in broken
            ]
    return []


def copy_dataset(source: Path, target: Path) -> Path:
    """A copy of a server's AOF directory, as a backup takes it."""
    shutil.copytree(aof_dir(source), aof_dir(target))
    return target


@contextlib.contextmanager
def loaded(directory: Path, *args: str) -> Iterator[Any]:
    """A plain redis-server on this directory's AOF."""
    from kflex_repro.redis.server import ManagedServer

    with ManagedServer(
        ["--appendonly", "yes", "--enable-debug-command", "yes", "--databases", "2", *args], dir=directory
    ) as server:
        yield server


def waits(condition: Callable[[], Any], timeout: float = 20.0, what: str = "") -> Any:
    """eventually(), polled gently: for what takes a server's time."""
    return eventually(condition, timeout, what, every=0.01)
