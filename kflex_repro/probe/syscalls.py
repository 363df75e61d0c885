"""System calls counted and timed in the kernel, of some processes or of all (bpf/syscalls.bpf.c)."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kflex_repro import host
from kflex_repro.bpf import Link, Object
from kflex_repro.build import objects, toolchain
from kflex_repro.errors import KflexError
from kflex_repro.probe import histogram
from kflex_repro.probe.process import Process, need_host_pids

_DEFINE = re.compile(r"^#define __NR_(\w+)\s+(\d+)$", re.M)


@dataclass(frozen=True)
class Syscall:
    """What one system call did: ``calls`` entered, ``returned`` of them, ``errors`` of those."""

    number: int
    name: str
    calls: int
    returned: int
    errors: int
    times: histogram.Times

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        counts = {"calls": self.calls, "returned": self.returned, "errors": self.errors}
        return {"name": self.name, "number": self.number, **counts, **self.times.as_dict()}


@functools.cache
def names() -> dict[int, str]:
    """Names of this machine's system calls, as the C library's kernel headers have them (asm/unistd.h)."""
    tool = toolchain.cc()
    out = subprocess.run(
        [tool.path, "-dM", "-E", "-include", "asm/unistd.h", "-x", "c", "/dev/null"],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if out.returncode != 0:
        raise KflexError("the compiler finds no asm/unistd.h", tool.path, "apt install linux-libc-dev")
    return {int(number): name for name, number in _DEFINE.findall(out.stdout)}


def name_of(number: int) -> str:
    """``read`` for 0 on x86-64; ``syscall_470`` for one that is newer than the headers."""
    return names().get(number, f"syscall_{number}")


class SyscallTrace:
    """Counts from its start to its end, as a context manager; ``read()`` at any time between.

    ``processes`` empty: every process but this one. ``kind`` is what it attached to: tp_btf or raw_tp.
    """

    def __init__(self, processes: Sequence[Process] = ()) -> None:
        self._processes = tuple(processes)
        self._object: Object | None = None
        self._links: list[Link] = []
        # BTF tracepoints are checked by type; a host that refuses them may still allow the raw ones.
        self.kind = "tp_btf" if host.fact("tp_btf").state == "ok" else "raw_tp"

    def start(self) -> SyscallTrace:
        """Load and attach. KflexError where the host refuses both kinds."""
        need_host_pids()
        built = objects.ensure(only="syscalls")
        obj = self._object = Object.open(built.object("syscalls"))
        try:
            pair = {"tp_btf": ("btf_enter", "btf_exit"), "raw_tp": ("raw_enter", "raw_exit")}[self.kind]
            for name, program in obj.programs.items():
                program.set_autoload(name in pair)
            obj.set_rodata(everybody=not self._processes, tracer=os.getpid())
            obj.load()
            for process in self._processes:
                obj.maps["targets"].update(process.pid.to_bytes(4, "little"), bytes(4))
            self._links += [obj.programs[name].attach() for name in pair]
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Take it off: the counts stay as they are until close()."""
        while self._links:
            self._links.pop().destroy()

    def close(self) -> None:
        """Take it off and give up the counts."""
        self.stop()
        if self._object is not None:
            self._object.close()
            self._object = None

    def __enter__(self) -> SyscallTrace:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> list[Syscall]:
        """What was called so far, the longest time first."""
        obj = self._object
        if obj is None:
            raise KflexError("the trace is closed")
        constants, row_type = obj.btf.constants(), obj.btf.struct("syscall_stat")
        shape = histogram.Shape.of(constants)
        special = {constants["SYSCALL_OTHER"]: "(other)", constants["SYSCALL_COMPAT"]: "(32-bit)"}
        found = []
        for number in range(constants["SYSCALL_ROWS"]):
            raw = obj.maps["stats"].lookup(number.to_bytes(4, "little"))
            assert isinstance(raw, list)
            # Most rows are empty: they are not worth being taken apart.
            if not any(map(any, raw)):
                continue
            per_cpu = [row_type.from_buffer_copy(one) for one in raw]
            found.append(
                Syscall(
                    number=number,
                    name=special.get(number) or name_of(number),
                    calls=sum(one.calls for one in per_cpu),
                    returned=sum(one.returned for one in per_cpu),
                    errors=sum(one.errors for one in per_cpu),
                    times=histogram.added(shape, (one.times for one in per_cpu)),
                )
            )
        return sorted(found, key=lambda one: (-one.times.ns, -one.calls, one.name))


def listed() -> list[tuple[int, str]]:
    """(number, name) of every system call that the headers know, by number."""
    return sorted(names().items())
