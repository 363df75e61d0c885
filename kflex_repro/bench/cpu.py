"""CPU time: of one process (all its threads) and of the whole machine, per operation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")


def parse_process_ticks(stat: str) -> int:
    """utime + stime, in clock ticks, from the text of ``/proc/PID/stat`` (the whole thread group)."""
    # The command name is in parentheses and may itself hold spaces and parentheses.
    after = stat.rpartition(")")[2].split()
    return int(after[11]) + int(after[12])


def parse_busy_ticks(stat: str) -> int:
    """Busy clock ticks of all CPUs together from the text of ``/proc/stat``.

    user, nice, system, irq and softirq: without idle, iowait and what a hypervisor stole.
    """
    for line in stat.splitlines():
        name, *rest = line.split()
        if name == "cpu":
            user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in rest[:7])
            return user + nice + system + irq + softirq
    raise ValueError("no cpu line in /proc/stat")


@dataclass(frozen=True)
class CpuCost:
    """Microseconds of CPU per operation; ``server`` is None where the server's process cannot be seen."""

    server: float | None
    system: float


class CpuMeter:
    """Measures between its construction and ``per_op``.

    ``pid`` is the server, None if it is not ours to see.
    """

    def __init__(self, pid: int | None, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._pid = pid
        self._server = self._process()
        self._busy = parse_busy_ticks((proc / "stat").read_text())

    def _process(self) -> int | None:
        if self._pid is None:
            return None
        try:
            return parse_process_ticks((self._proc / str(self._pid) / "stat").read_text())
        except (OSError, ValueError, IndexError):
            return None

    def per_op(self, ops: int) -> CpuCost:
        """CPU spent since construction, divided by ``ops`` (> 0)."""
        server = self._process()
        busy = parse_busy_ticks((self._proc / "stat").read_text())
        used = None if server is None or self._server is None else (server - self._server) * _TICK_US / ops
        return CpuCost(used, (busy - self._busy) * _TICK_US / ops)
