"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from kflex_repro.errors import KflexError


def write_atomically(path: Path, data: bytes, option: str = "--out") -> None:
    """Replace ``path`` by ``data``: either all of it is there, or the old file is.

    KflexError in one line if not; it names the ``option`` that the path came from.
    """
    temporary: str | None = None
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(data)
            file.flush()
            os.fsync(fd)
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = f"choose another place with {option}"
        if full:
            fix = f"free some space, or {fix}"
        raise KflexError(f"cannot write {path.name}, {error.strerror}", str(path.parent), fix) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


def in_memory(name: str) -> BinaryIO:
    """An empty file for another process to write to, gone with its last descriptor; memfd_create(2).

    tempfile's would not do where a killed command may leave nothing: it tries $TMPDIR with a file of a name.
    """
    return os.fdopen(os.memfd_create(name), "w+b")
