"""The smallest real program: counts the read() calls of each process. A newcomer's check that eBPF works."""

from __future__ import annotations

import contextlib
import ctypes as c
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kflex_repro import build
from kflex_repro.bpf.object import Object
from kflex_repro.errors import KflexError, Unavailable

SECONDS = 2.0
# read's system call number, by machine; the others use the generic table.
_READ = {"x86_64": 0, "s390x": 3, "ppc64le": 3}
_GENERIC_READ = 63
# Program -> what it hangs on; the first that this host allows.
_WAYS = {
    "hello_btf": "BTF tracepoint (tp_btf/sys_enter)",
    "hello_raw": "raw tracepoint (raw_tp/sys_enter)",
}


@dataclass(frozen=True)
class Reads:
    """One process's read() calls; ``command`` is what it was called at its first."""

    pid: int
    command: str
    calls: int


class Counting:
    """The attached program. ``how`` says on what it hangs."""

    def __init__(self, loaded: Object, how: str) -> None:
        self._object = loaded
        self.how = how
        self._count = loaded.btf.struct("hello_count")

    def reads(self) -> list[Reads]:
        """The calls so far, the busiest process first."""
        counts = self._object.maps["hello_counts"]
        found = []
        for key in list(counts.keys()):
            if (value := counts.get(key)) is not None:
                count = self._count.from_buffer_copy(value)
                command = bytes(count.comm).split(b"\0")[0].decode(errors="replace")
                found.append(Reads(int.from_bytes(key, "little"), command, int(count.calls)))
        return sorted(found, key=lambda reads: (-reads.calls, reads.pid))

    @property
    def missed(self) -> int:
        """Calls of processes that the table had no room for."""
        value = self._object.maps[".bss"].get(bytes(4)) or bytes(8)
        return c.c_uint64.from_buffer_copy(value).value


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    """Count while in the context; afterwards nothing is left. KflexError where no way is allowed."""
    if os.geteuid() != 0:
        raise Unavailable("loading a BPF program needs root", "", "sudo kflex-repro doctor --hello")
    path = build.ensure(only="hello").object("hello")
    refused: KflexError | None = None
    for program, how in _WAYS.items():
        with contextlib.ExitStack() as stack:
            try:
                loaded = stack.enter_context(_load(path, program))
                stack.enter_context(loaded.programs[program].attach())
            except KflexError as error:
                refused = error
                continue
            yield Counting(loaded, how)
            return
    assert refused is not None
    raise refused


def _load(path: Path, wanted: str) -> Object:
    loaded = Object.open(path)
    try:
        for name, program in loaded.programs.items():
            program.set_autoload(name == wanted)
        loaded.set_rodata(read_number=_READ.get(platform.machine(), _GENERIC_READ))
        loaded.load()
    except BaseException:
        loaded.close()
        raise
    return loaded


@dataclass(frozen=True)
class Hello:
    """What was counted in ``seconds``."""

    how: str
    seconds: float
    calls: int
    missed: int
    top: tuple[Reads, ...]


def hello(seconds: float = SECONDS, top: int = 5) -> Hello:
    """Count for so long."""
    with counting() as running:
        started = time.monotonic()
        time.sleep(seconds)
        found = running.reads()
        took = time.monotonic() - started
        return Hello(running.how, took, sum(one.calls for one in found), running.missed, tuple(found[:top]))
