"""Taking over connections that are older than the offload (bpf/adopt.bpf.h says why that is exact).

Only connections at rest are taken: nothing under way in TCP, nothing in Redis. Redis is asked, never stopped.
What does not rest for a few milliseconds stays as it is; a later ``offload start`` tries it again.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kflex_repro.bpf.links import Link
from kflex_repro.bpf.object import Object
from kflex_repro.errors import KflexError
from kflex_repro.offload import clients, netns
from kflex_repro.offload.clients import Client

if TYPE_CHECKING:
    from kflex_repro.offload.session import Session

# Iterator programs and the map they go over, None for all TCP sockets.
ITERATORS: dict[str, str | None] = {
    "kflex_adopt_server": None,
    "kflex_adopt_client": None,
    "kflex_adopt_end": "adopting",
}
LIST = "kflex_list"
# Every round walks all TCP sockets of the host: many at a time, at most KFLEX_ADOPT_BATCH.
_ROUND = 3 * clients.BATCH
# Few at a time where something stood in the way: the shorter a round, the more connections rest through it.
_RETRY = 32
# struct kflex_adopt, and struct kflex_adopted behind its tuple.
_RECORD = struct.Struct("8I")
_REPORT = struct.Struct(f"{clients.TUPLE.size}sII")

_RESULTS = {
    "KFLEX_A_UNSEEN": "no such socket: it is closing, or in another network namespace",
    "KFLEX_A_SERVER": "its client is not on this host, or in another network namespace",
    "KFLEX_A_BUSY": "never at rest",
    "KFLEX_A_FOREIGN": "its socket is in a sockmap of another program",
    "KFLEX_A_FULL": "all 16384 connection numbers are taken",
}


@dataclass
class Adoption:
    """What an adoption did: ``unavailable`` says why none was possible; ``passing`` counts by reason."""

    adopted: int = 0
    already: int = 0
    passing: Counter[str] = field(default_factory=Counter)
    unavailable: str = ""
    seconds: float = 0.0
    gil_ms_max: float = 0.0
    gil_ms: float = 0.0
    deaf: bool = False

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "adopted": self.adopted,
            "already_enrolled": self.already,
            "passing": dict(self.passing),
            "unavailable": self.unavailable,
            "seconds": round(self.seconds, 4),
            "redis_held_ms_max": round(self.gil_ms_max, 3),
            "redis_held_ms": round(self.gil_ms, 3),
        }

    def __str__(self) -> str:
        if self.unavailable:
            return f"not adopted: {self.unavailable}"
        text = (
            f"adopted {self.adopted:,} connections in {self.seconds:.2f} s, "
            f"Redis held for at most {self.gil_ms_max:.2f} ms at a time"
        )
        if self.already:
            text += f", {self.already:,} are enrolled already"
        for reason, count in self.passing.most_common():
            text += f"\nnot adopted: {count:,} ({reason})"
        if self.deaf:
            text += (
                "\nthis kernel does not say when adopted connections close: their numbers come back at stop"
            )
        return text


def kernel_hindrance(release: str, version: str) -> str:
    """Why adoption is not safe on this kernel, "" when it is.

    Before Linux 6.5 the TCP iterator held the socket's spinlock, which the sockmap takes again; Debian's 6.1
    has the correction (seen in 6.1.192).
    """
    match = re.match(r"(\d+)\.(\d+)", release)
    number = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if number >= (6, 5):
        return ""
    stable = re.search(r"\b6\.1\.(\d+)", version) or re.match(r"6\.1\.(\d+)", release)
    if number == (6, 1) and stable and int(stable.group(1)) >= 192:
        return ""
    return f"Linux {release} may lock up when sockets are taken over (6.5 and newer do not)"


def this_kernel() -> str:
    """``kernel_hindrance`` of the running one."""
    name = os.uname()
    return kernel_hindrance(name.release, name.version)


def prepare(obj: Object) -> str:
    """Before ``obj`` is loaded: leave out what this kernel refuses. Why it does, "" if it does not.

    Found out on a second copy, so that the offload loads in any case.
    """
    refused = this_kernel()
    if not refused:
        try:
            with Object.open(obj.path) as trial:
                for name, program in trial.programs.items():
                    program.set_autoload(name in ITERATORS)
                trial.maps["conns"].set_max_entries(1)
                trial.load()
        except KflexError as error:
            refused = str(error)
    if refused:
        for name in ITERATORS:
            obj.programs[name].set_autoload(False)
    return refused


def pin(obj: Object, pin_dir: Path, refused: str) -> None:
    """Pin the iterators, so that a later process can run them."""
    wanted = {} if refused else dict(ITERATORS)
    for name, over in {**wanted, LIST: "conns"}.items():
        with obj.programs[name].attach_iter(obj.maps[over] if over else None) as link:
            link.pin(pin_dir / name)


def adopt(session: Session, budget: float = 3.0, answer_within: float = 5.0) -> Adoption:
    """Take over what can be; what is busy is tried again for ``budget`` seconds.

    Redis gets ``answer_within`` seconds for each answer.

    No exception for what concerns adoption alone: the offload works without it. The caller has its directory
    locked.
    """
    done = Adoption()
    began = time.monotonic()
    try:
        hindrance = session.adoption_hindrance()
        if hindrance:
            done.unavailable = hindrance
            return done
        work = _Work(session, done, answer_within)
        try:
            work.clear()
            waiting = work.sweep_all()
            while waiting and time.monotonic() - began < budget:
                waiting = work.sweep(waiting)
            done.passing.update(waiting.values())
        finally:
            work.close()
    except (KflexError, OSError) as error:
        done.unavailable = str(error)
    finally:
        done.seconds = time.monotonic() - began
    return done


class _Work:
    """The iterators of a session, and one adoption's rounds over them."""

    def __init__(self, session: Session, done: Adoption, answer_within: float) -> None:
        self.session, self.done, self.answer_within = session, done, answer_within
        self.run_id = session.full_run_id()
        self.place = netns.of(session.pid)
        # The server's first: a client there has these addresses for certain.
        self.everywhere = sorted(netns.everywhere(), key=lambda space: space.inode != self.place.inode)
        self.codes = {code: name for name, code in session.btf.enum("kflex_adoption").items()}
        self.by_name = session.btf.enum("kflex_adoption")
        self.slots = session.user_slots()
        self.none = session.btf.constants()["KFLEX_USER_NONE"]
        self.links = {name: Link.from_pin(session.pin_dir / name) for name in ITERATORS}

    def close(self) -> None:
        for opened in self.links.values():
            opened.destroy()

    def _walk(self, name: str, space: netns.Namespace | None = None) -> None:
        """Over the TCP sockets of the server's network namespace, or of another (which may have gone)."""
        try:
            netns.call(space or self.place, self.links[name].read_iter)
        except KflexError:
            if space is None or space.inode == self.place.inode:
                raise

    def clear(self) -> None:
        """End what a toolkit that was killed has left under way."""
        self._finish()

    def _list(self, cursor: int, count: int) -> clients.Batch:
        part = clients.batch(self.run_id, self.session.btf, cursor, count, self.answer_within, self.place)
        self.done.gil_ms += part.gil_ns / 1e6
        self.done.gil_ms_max = max(self.done.gil_ms_max, part.gil_ns / 1e6)
        return part

    def sweep_all(self) -> dict[int, str]:
        """Every client once. Those worth another try: client id -> what is in the way."""
        waiting: dict[int, str] = {}
        cursor, more = 0, True
        while more:
            batch: list[Client] = []
            asked: list[tuple[int, int]] = []
            while more and len(batch) < _ROUND:
                asked.append((cursor, clients.BATCH))
                part = self._list(cursor, clients.BATCH)
                batch += part.clients
                cursor, more = part.cursor, bool(part.cursor)
            waiting |= self._round(batch, asked)
        return waiting

    def sweep(self, waiting: Mapping[int, str]) -> dict[int, str]:
        """Those that wait, once more."""
        left = sorted(waiting)
        still: dict[int, str] = {}
        while left:
            cursor = left[0] - 1
            part = self._list(cursor, _RETRY)
            wanted = set(left)
            still |= self._round([c for c in part.clients if c.id in wanted], [(cursor, _RETRY)])
            left = [id for id in left if part.cursor and id > part.cursor]
        return still

    def _round(self, batch: list[Client], asked: list[tuple[int, int]]) -> dict[int, str]:
        """One batch, which these cursors and counts listed, through the steps of bpf/adopt.bpf.h."""
        waiting: dict[int, str] = {}
        candidates: dict[bytes, Client] = {}
        adopting = self.session.map("adopting")
        for client in batch:
            wrong = clients.hindrance(client)
            if wrong is not None and wrong.passing:
                waiting[client.id] = wrong.text
            elif wrong is not None:
                self.done.passing[wrong.text] += 1
            else:
                candidates[client.key] = client
                slot = self.slots.get(client.user, self.none)
                record = _RECORD.pack(0, self.by_name["KFLEX_A_UNSEEN"], slot, 0, 0, 0, 0, 0)
                adopting.update(client.key, record)
        if not candidates:
            return waiting
        try:
            self._walk("kflex_adopt_server")
            again = {c.key: c for cursor, count in asked for c in self._list(cursor, count).clients}
            for key, client in candidates.items():
                now = again.get(key)
                if (
                    now is None
                    or now.id != client.id
                    or now.user != client.user
                    or clients.hindrance(now) is not None
                ):
                    self._refuse(key)
            for space in self.everywhere:
                self._walk("kflex_adopt_client", space)
        finally:
            results = self._finish()
        for key, client in candidates.items():
            name = results.get(key, "KFLEX_A_UNSEEN")
            if name == "KFLEX_A_DONE":
                self.done.adopted += 1
            elif name == "KFLEX_A_ALREADY":
                self.done.already += 1
            elif name == "KFLEX_A_BUSY":
                waiting[client.id] = _RESULTS[name]
            else:
                self.done.passing[_RESULTS[name]] += 1
        return waiting

    def _refuse(self, key: bytes) -> None:
        """Redis no longer shows it at rest: keep the client's half from being taken."""
        adopting = self.session.map("adopting")
        record = adopting.get(key)
        if record is None:
            return
        fields = list(_RECORD.unpack(record))
        if fields[1] == self.by_name["KFLEX_A_SERVER"]:
            fields[1] = self.by_name["KFLEX_A_BUSY"]
            adopting.update(key, _RECORD.pack(*fields))

    def _finish(self) -> dict[bytes, str]:
        """Undo what did not come about, let go of the numbers: tuple -> name of its result."""
        adopting = self.session.map("adopting")
        if next(adopting.keys(), None) is None:
            return {}
        # Records that have not met their server socket must not meet it now.
        for key in list(adopting.keys()):
            record = adopting.get(key)
            if record is not None and _RECORD.unpack(record)[1] == self.by_name["KFLEX_A_UNSEEN"]:
                adopting.delete(key)
        self._walk("kflex_adopt_server")
        results = {}
        for key, code, deaf in _REPORT.iter_unpack(self.links["kflex_adopt_end"].read_iter()):
            results[key] = self.codes.get(code, "KFLEX_A_UNSEEN")
            self.done.deaf |= bool(deaf)
            adopting.delete(key)
        return results
