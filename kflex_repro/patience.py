"""How long to wait for what takes milliseconds on a real machine: longer on an emulated CPU.

Timeouts are set where they are used, for real machines; this is the one place that knows the factor.
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

# QEMU without KVM is 10 to 30 times slower than its host, and the timeouts have room to begin with.
FACTOR = 10.0


def cpu_model() -> str:
    """The processor's name as the kernel has it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return match.group(1).strip() if match else platform.processor() or "unknown"


@functools.cache
def emulated() -> bool:
    """Whether the CPU is an emulated one (QEMU TCG): figures then say nothing about speed."""
    return "TCG" in cpu_model() or "QEMU Virtual CPU" in cpu_model()


def patient(seconds: float) -> float:
    """``seconds`` on a real machine, ``FACTOR`` times that on an emulated one."""
    return seconds * FACTOR if emulated() else seconds
