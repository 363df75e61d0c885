"""What a command may not leave: processes, mounts, sockets, files."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path


def _marked(mark: str) -> dict[int, str]:
    """Processes that have inherited ``mark`` in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def _tree(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*")}


@dataclass
class Watch:
    """Of a command that is started with ``env``: its temporary directory, its cache, and what runs for it.

    Others may be using the cache unless it is ``own``: then only what a run makes there is looked for.
    """

    temporary: Path
    cache: Path
    own: bool = False
    mark: str = field(default_factory=lambda: f"KFLEX_TEST_MARK={uuid.uuid4().hex}")

    def __post_init__(self) -> None:
        self.temporary.mkdir(exist_ok=True)
        self._before = self._cached()

    def _cached(self) -> set[str]:
        if self.own:
            return _tree(self.cache)
        return {path.name for path in self.cache.glob(".vm-*")}

    @property
    def env(self) -> dict[str, str]:
        name, _, value = self.mark.partition("=")
        there = {"TMPDIR": str(self.temporary), "KFLEX_CACHE": str(self.cache), name: value}
        return {**os.environ, **there}

    def processes(self) -> dict[int, str]:
        return _marked(self.mark)

    def nothing_left(self) -> None:
        """AssertionError, with what is there; processes have 10 s to go, as the kernel ends them."""
        deadline = time.monotonic() + 10
        while (running := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not running, running
        files = _tree(self.temporary)
        assert not files, files
        # Logs are kept, and a lock's file is a name only.
        new = {path for path in self._cached() - self._before if not path.startswith(("logs", "locks"))}
        assert not new, new
        places = (str(self.temporary), str(self.cache))
        for table in ("/proc/self/mounts", "/proc/net/unix"):
            lines = Path(table).read_text().splitlines()
            held = [line for line in lines if any(place in line for place in places)]
            assert not held, held
