"""The capabilities of this process."""

from __future__ import annotations

import re
from pathlib import Path


def effective() -> int:
    """The effective set, a bit for each (include/uapi/linux/capability.h); 0 where it is not shown."""
    match = re.search(r"CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text())
    return int(match.group(1), 16) if match else 0
