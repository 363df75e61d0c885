"""A content-hashed cache of built things that damage, a full disk and concurrent users cannot spoil.

Layout under the root (``$KFLEX_CACHE``, else ``kflex-repro`` in the user's cache directory)::

    <kind>/<key>/...            outputs of one build, with manifest.json (sha256 of each output)
    locks/<kind>-<key>          held while an entry is being built
    logs/                       what the builders printed

An entry is made in a temporary directory beside its place and renamed into it. It counts only if its manifest
is complete and every hash agrees; anything else is thrown away and built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kflex_repro.errors import KflexError

_MANIFEST = "manifest.json"


def root() -> Path:
    """The cache directory (made if missing). KflexError where it cannot be."""
    if chosen := os.environ.get("KFLEX_CACHE"):
        path = Path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        path = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "kflex-repro"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KflexError(
            f"cannot make the cache directory: {error.strerror}",
            str(path),
            "set KFLEX_CACHE to another place",
        ) from None
    return path.resolve()


def digest(parts: Iterable[str | bytes]) -> str:
    """A key: the first 128 bits, in hex, of the sha256 over the parts and their boundaries."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:32]


def file_digest(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _outputs(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != _MANIFEST)


def _write_manifest(directory: Path) -> None:
    hashes = {str(path.relative_to(directory)): file_digest(path) for path in _outputs(directory)}
    if not hashes:
        raise KflexError("a build step made no output", str(directory))
    (directory / _MANIFEST).write_text(json.dumps(hashes, indent=1) + "\n")


def intact(directory: Path) -> bool:
    """Whether an entry is complete and unchanged since it was made."""
    try:
        hashes = json.loads((directory / _MANIFEST).read_text())
        return bool(hashes) and all(file_digest(directory / name) == value for name, value in hashes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock ``name`` against other processes; released by the kernel if we die."""
    directory = root() / "locks"
    directory.mkdir(exist_ok=True)
    with (directory / name).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def obtain(kind: str, key: str, build: Callable[[Path], None], force: bool = False) -> tuple[Path, bool]:
    """The entry ``kind``/``key``: (its directory, whether it was built now).

    ``build`` fills the empty directory it is given; what it raises leaves no entry.
    """
    place = root() / kind / key
    if not force and intact(place):
        return place, False
    with locked(f"{kind}-{key}"):
        # Another process may have built it while we waited.
        if not force and intact(place):
            return place, False
        place.parent.mkdir(parents=True, exist_ok=True)
        # We hold the lock: what still lies here is of a builder that was killed. Its compilers may still be
        # writing; what they add is for the next to throw away.
        for left in place.parent.glob(f".{key}-*"):
            shutil.rmtree(left, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=place.parent))
        try:
            build(fresh)
            _write_manifest(fresh)
            fresh.chmod(0o755)
            _discard(place)
            fresh.rename(place)
        finally:
            if fresh.exists():
                shutil.rmtree(fresh, ignore_errors=True)
    return place, True


@contextlib.contextmanager
def unused(name: str) -> Iterator[bool]:
    """Whether nobody holds the cache's lock ``name``; if so, it is held in here."""
    directory = root() / "locks"
    directory.mkdir(exist_ok=True)
    with (directory / name).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
