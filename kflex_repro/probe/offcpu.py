"""Where threads wait, by the kernel's scheduler tracepoint (bpf/offcpu.bpf.c): time off the CPU by stack.

Stacks of user space are walked by frame pointers: of code that has none (distributions' builds) the frames
above the first are missing. The kernel's part is whole.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kflex_repro import host
from kflex_repro.bpf import Link, Object
from kflex_repro.build import objects
from kflex_repro.errors import KflexError
from kflex_repro.probe import stacks, symbols
from kflex_repro.probe.process import Process, need_host_pids

PREEMPTED = "(preempted)" + stacks.KERNEL
_SWITCH = "__schedule" + stacks.KERNEL
_SCHEDULER = re.compile(r"_*(io_)?(preempt_)?schedule(_|$)")


@dataclass(frozen=True)
class Waits:
    """Microseconds off the CPU by stack; ``lost`` waits had no room in the kernel's tables."""

    stacks: dict[stacks.Stack, int]
    waits: int
    lost: int


class OffCpuTrace:
    """Sums waits from its start to its end, as a context manager. ``processes`` empty: all but this one."""

    def __init__(self, processes: Sequence[Process] = ()) -> None:
        self._processes = tuple(processes)
        self._object: Object | None = None
        self._link: Link | None = None
        self._ended_ns = 0
        self._users: dict[int, symbols.User] = {}
        self.kind = "tp_btf" if host.fact("tp_btf").state == "ok" else "raw_tp"

    def start(self) -> OffCpuTrace:
        """Load and attach."""
        need_host_pids()
        obj = self._object = Object.open(objects.ensure(only="offcpu").object("offcpu"))
        try:
            wanted = {"tp_btf": "btf_switch", "raw_tp": "raw_switch"}[self.kind]
            for name, program in obj.programs.items():
                program.set_autoload(name == wanted)
            obj.set_rodata(everybody=not self._processes, tracer=os.getpid())
            obj.load()
            for process in self._processes:
                obj.maps["targets"].update(process.pid.to_bytes(4, "little"), bytes(4))
                # Now, because at the end it may have ended.
                self._users[process.pid] = symbols.User(process.pid)
            self._link = obj.programs[wanted].attach()
        except BaseException:
            self.close()
            raise
        return self

    def stop(self) -> None:
        """Take it off; the sums stay until close()."""
        if self._link is not None:
            self._link.destroy()
            self._link = None
            self._ended_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def close(self) -> None:
        """Take it off and give up the sums."""
        self.stop()
        if self._object is not None:
            self._object.close()
            self._object = None

    def __enter__(self) -> OffCpuTrace:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> Waits:
        """What was waited for, those who still wait included; call it after stop()."""
        obj = self._object
        if obj is None:
            raise KflexError("the trace is closed")
        kernel = symbols.Kernel()
        key_type, open_type = obj.btf.struct("wait_key"), obj.btf.struct("waiting")
        weighed: Counter[stacks.Stack] = Counter()
        waits, cut = 0, 0
        sums, waiting = obj.maps["sums"], obj.maps["waiting"]
        for raw, value in [(key, sums.get(key)) for key in list(sums.keys())]:
            if value is not None:
                ns, count = struct.unpack("<QQ", value)
                key = key_type.from_buffer_copy(raw)
                cut += count if key.kernel < 0 else 0
                weighed[self._stack(key, kernel)] += ns
                waits += count
        for value in [waiting.get(tid) for tid in list(waiting.keys())]:
            if value is not None:
                one = open_type.from_buffer_copy(value)
                weighed[self._stack(one.key, kernel)] += max(0, self._ended_ns - one.since)
                waits += 1
        dropped = obj.maps[".bss"].get(bytes(4)) or bytes(8)
        found = {stack: ns // 1000 for stack, ns in weighed.items() if ns >= 1000}
        return Waits(found, waits, cut + int.from_bytes(dropped[:8], "little"))

    def _addresses(self, stack_id: int) -> list[int]:
        """From the innermost frame outwards."""
        assert self._object is not None
        if stack_id < 0:
            return []
        raw = self._object.maps["stacks"].get(stack_id.to_bytes(4, "little")) or b""
        found = list(struct.unpack(f"<{len(raw) // 8}Q", raw))
        return found[: found.index(0)] if 0 in found else found

    def _stack(self, key: Any, kernel: symbols.Kernel) -> stacks.Stack:
        comm = bytes(key.comm).split(b"\0")[0].decode(errors="replace")
        if key.tgid not in self._users:
            self._users[key.tgid] = symbols.User(key.tgid)
        user = self._users[key.tgid]
        frames = []
        for address in self._addresses(key.user):
            frame = user.frame(address)
            # Without frame pointers what follows is whatever lay on the stack.
            if frame is None:
                break
            frames.append(frame)
        frames.reverse()
        frames += _waiting_point([kernel.frame(at) for at in reversed(self._addresses(key.kernel))])
        if key.preempted:
            frames.append(PREEMPTED)
        return (stacks.clean(comm), *frames)


def _waiting_point(frames: list[str]) -> list[str]:
    """The kernel's frames down to what waited: every wait ends in the scheduler, and in our probe."""
    if _SWITCH in frames:
        del frames[frames.index(_SWITCH) :]
    while frames and _SCHEDULER.match(frames[-1]):
        frames.pop()
    return frames
