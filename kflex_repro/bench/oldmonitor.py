"""The monitor of the old design, written anew to be measured beside ours: see bpf/oldmonitor.bpf.c.

Four tracepoints (beginning and end of read and of write), the payload copied at each, one perf event each, a
reader in C that is woken for every one. It counts commands and prints nothing for them.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kflex_repro import build
from kflex_repro.bpf import Link, Object, fs
from kflex_repro.bpf.maps import possible_cpus
from kflex_repro.build import cache, toolchain
from kflex_repro.build.objects import source_root
from kflex_repro.errors import KflexError, os_failure

TRACEFS = Path("/sys/kernel/tracing")
# Per CPU, a power of two: eight times what bcc takes unless told, so that little is lost.
PAGES = 64
_OBJECT = "oldmonitor"
_READER = "oldmonitor_reader"
_CLONE_NEWNS = 0x00020000
_MS_REC_PRIVATE = 0x4000 | 0x40000
_END_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """What the reader took: by command, all events, those lost (at least), and the mean "latency", ns.

    Lost are events that found no room, and runs that the kernel skipped because another program was running
    on that CPU. The latency is the duration of the write call, as the old monitor had it.
    """

    commands: dict[str, int]
    events: int
    lost: int
    latency_ns: float


def with_tracefs(work: Callable[[], T]) -> T:
    """``work()`` where tracefs is mounted at its usual place, in a mount namespace that goes away with it.

    Nothing is mounted for the rest of the machine. ``work`` runs in a thread of its own.
    """
    if TRACEFS in fs.mounts("tracefs"):
        return work()

    def run() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None):
            raise os_failure("a mount namespace for tracefs", ctypes.get_errno())
        fs.mount("tracefs", TRACEFS)
        return work()

    with ThreadPoolExecutor(1, "tracefs") as thread:
        return thread.submit(run).result()


def _reader() -> Path:
    """The reader's program, built if its sources changed."""
    sources, tool = source_root() / "bpf", toolchain.cc()
    source, header = sources / f"{_READER}.c", sources / "oldmonitor.h"
    flags = ["-O2", "-Wall", "-Wextra"]
    key = cache.digest([tool.banner, *flags, source.read_bytes(), header.read_bytes()])

    def make(out: Path) -> None:
        command: list[str | Path] = [tool.path, *flags, source, "-o", out / _READER]
        toolchain.Runner().run(_READER, command, toolchain.log_path(_READER, key))

    return cache.obtain("oldmonitor", key, make)[0] / _READER


class OldMonitor:
    """Attached to the process ``pid`` as long as it is open. A context manager."""

    def __init__(self, pid: int) -> None:
        self._links: list[Link] = []
        self._child: subprocess.Popen[str] | None = None
        self._object = Object.open(build.ensure(only=_OBJECT).object(_OBJECT))
        try:
            self._object.set_rodata(target=pid)
            self._object.maps["events"].set_max_entries(possible_cpus())
            self._object.load()
            self._listen()
            with_tracefs(self._attach)
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        fd = self._object.maps["events"].fd
        self._child = subprocess.Popen(
            [_reader(), str(fd), str(PAGES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(fd,),
            start_new_session=True,
        )
        assert self._child.stdout is not None
        if self._child.stdout.readline().strip() != "ready":
            _, said = self._child.communicate(timeout=_END_S)
            raise KflexError(f"the old monitor's reader did not start, {said.strip()}")

    def _attach(self) -> None:
        for program in self._object.programs.values():
            self._links.append(program.attach())

    def finish(self) -> Seen:
        """Detach, and what was seen."""
        missed = sum(int(program.info.recursion_misses) for program in self._object.programs.values())
        self._detach()
        assert self._child is not None
        out, _ = self._child.communicate("", timeout=_END_S)
        found = json.loads(out)
        writes = found["writes"]
        mean = found["write_ns"] / writes if writes else 0.0
        return Seen(found["commands"], found["events"], found["lost"] + missed, mean)

    def _detach(self) -> None:
        links, self._links = self._links, []
        for link in links:
            link.destroy()

    def close(self) -> None:
        """Detach and end the reader. No error twice."""
        self._detach()
        child, self._child = self._child, None
        if child is not None:
            if child.poll() is None:
                child.kill()
            child.communicate()
        self._object.close()

    def __enter__(self) -> OldMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
