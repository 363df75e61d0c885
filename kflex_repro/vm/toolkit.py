"""kflex-repro itself as a guest's command: the same code, interpreter and settings as here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kflex_repro.vm import rootfs
from kflex_repro.vm.kernels import Kernel
from kflex_repro.vm.run import Request


def request(arguments: Sequence[str], kernel: Kernel, timeout: float, out: Path | None = None) -> Request:
    """``kflex-repro ARGUMENTS`` in a guest of ``kernel``; ``timeout`` in s over all."""
    source = Path(__file__).resolve().parents[2]
    return Request(
        command=(sys.executable, "-m", "kflex_repro", *arguments),
        kernel=kernel,
        timeout=timeout,
        cwd=source,
        env={"PYTHONPATH": str(source)},
        out=out,
    )


def progress(say: Callable[[str], None]) -> rootfs.Progress:
    """The making of a guest's root as lines of text for ``say``, which shows one at a time."""

    def show(name: str, done: int, total: int) -> None:
        say(f"making the guest's root, {name}: {done / max(1, total):.0%} of {total / 1e6:.0f} MB")

    return show


class Lines:
    """Bytes as they come from the guest, cut into lines for ``take``."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._rest = take, b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if text := line.decode(errors="replace").strip():
                self._take(text)
