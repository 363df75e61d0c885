"""Where the offload lives on bpffs, and the locks on it: one start or stop of a server at a time."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from kflex_repro.bpf import fs
from kflex_repro.errors import KflexError
from kflex_repro.patience import patient

_NAME = "kflex"
# A directory here says that we mounted bpffs, so that the last stop can take it away again.
_MOUNTED = "mounted-by-kflex"
# One here says that bpffs was root's alone (systemd mounts it so) before open_to_others().
_SHUT = "shut-to-others"
MARKERS = frozenset({_MOUNTED, _SHUT})
# What the kernel itself puts into every fresh bpffs (kernel/bpf/preload).
_PRELOADED = frozenset({"maps.debug", "progs.debug"})


def root() -> Path | None:
    """Our directory on bpffs (it may not be there); None where no bpffs is mounted."""
    mounted = fs.bpffs_root()
    return mounted / _NAME if mounted else None


def _enter() -> Path:
    """Our directory on bpffs; mounts bpffs where no one has."""
    with _mounting():
        ours = fs.bpffs_root() is None
        place = fs.ensure_bpffs() / _NAME
        place.mkdir(exist_ok=True)
        if ours:
            (place / _MOUNTED).mkdir()
    return place


@contextlib.contextmanager
def _mounting() -> Iterator[None]:
    """No other start or stop mounts or unmounts bpffs, makes or removes our directory on it: of two mounts,
    one would hide what is in the other. Held for a moment only."""
    fd = os.open(fs.BPFFS.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def leave_root(place: Path) -> None:
    """Remove our directory when it is empty, and the mount if it was ours and nobody else uses it."""
    if not place.exists() or any(path.name not in MARKERS for path in place.iterdir()):
        return
    if (place / _SHUT).exists():
        place.parent.chmod(stat.S_IMODE(place.parent.stat().st_mode) & ~stat.S_IXOTH)
        (place / _SHUT).rmdir()
    with _mounting():
        ours = (place / _MOUNTED).exists()
        if ours:
            (place / _MOUNTED).rmdir()
        place.rmdir()
        if ours and all(path.name in _PRELOADED for path in place.parent.iterdir()):
            ctypes.CDLL(None).umount2(os.fsencode(place.parent), 2)  # MNT_DETACH: our own lock still holds it


def open_to_others(place: Path) -> None:
    """Let other users pass through bpffs, to what is theirs in it; the last stop undoes it.

    A server that is not root's must reach its table after a crash. Pins are their owner's alone, as ever.
    """
    mode = stat.S_IMODE(place.parent.stat().st_mode)
    if not mode & stat.S_IXOTH:
        (place / _SHUT).mkdir(exist_ok=True)
        place.parent.chmod(mode | stat.S_IXOTH)


@contextlib.contextmanager
def entered() -> Iterator[Path]:
    """Our directory on bpffs, made if need be, and locked."""
    while True:
        place = _enter()
        with locked(place) as there:
            # Else another process has removed it meanwhile.
            if there:
                yield place
                return


@contextlib.contextmanager
def locked(place: Path) -> Iterator[bool]:
    """One start or stop at a time on this host. False, and no lock, where there is no such directory."""
    deadline = time.monotonic() + patient(30)
    while True:
        try:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may have removed the directory: then it is a lock on nothing.
            if os.path.samestat(os.fstat(fd), place.stat()):
                break
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > deadline:
            raise KflexError(
                "another offload start or stop is running", str(place), "wait until it has finished"
            )
        time.sleep(0.02)
    try:
        yield True
    finally:
        os.close(fd)


def tidy() -> None:
    """Remove what a start that was killed at once leaves: an empty directory, a mount that nobody uses."""
    ours = root()
    if ours is not None and ours.exists():
        with locked(ours):
            leave_root(ours)
