"""What is typed into a guest's terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


def feed(
    read: Callable[[], bytes], send: Callable[[bytes], None], left: Callable[[], None]
) -> threading.Thread:
    """Pass on what is typed until it ends; a thread of its own, as reading a terminal blocks."""

    def work() -> None:
        with contextlib.suppress(OSError):
            while data := read():
                send(data)
            left()

    thread = threading.Thread(target=work, name="keyboard", daemon=True)
    thread.start()
    return thread
