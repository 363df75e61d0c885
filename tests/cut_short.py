"""A change of files that is cut short: killed or interrupted at any touch of the disk, or out of space."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# An audit event and its arguments: whether it is one to be cut short at.
Counts = Callable[[str, tuple[object, ...]], bool]


def cut_at(step: int, change: Callable[[], object], counts: Counts, kill: bool = True) -> bool:
    """Run a change in a child that is killed, or interrupted, before its ``step``-th counted event; whether
    it was.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if counts(event, args):
                count += 1
                if count == step:
                    if kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise KeyboardInterrupt

        try:
            sys.addaudithook(hook)
            change()
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL if kill else 130)
    return code != 0


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of no more than ``size``; needs root."""
    place = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()
