"""``vm shell``: this terminal, connected to a guest's."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kflex_repro.vm import run

# Ctrl-], as telnet's.
ESCAPE = 0x1D


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@dataclass
class Keyboard:
    """What is typed: ``read`` blocks for the next bytes, b"" when Ctrl-] or the end of input was typed."""

    fd: int = field(default_factory=sys.stdin.fileno)

    def read(self) -> bytes:
        data = os.read(self.fd, 4096)
        return b"" if ESCAPE in data else data


def shell(request: run.Request, disks: tuple[Path, ...], note: Callable[[str], None]) -> int:
    """Run the request's command on this terminal; its exit status, 130 if it was left by Ctrl-].

    ``disks`` are those of run.layers(): nothing can show their making here.
    """
    note("booting; Ctrl-] ends the guest at any moment")

    def show(data: bytes) -> None:
        os.write(sys.stdout.fileno(), data)

    with _raw(sys.stdin.fileno()):
        try:
            outcome = run.run(
                request, show, show, lambda line: note(f"{line}\r"), Keyboard().read, disks=disks
            )
            return outcome.status
        except KeyboardInterrupt:
            return 130
