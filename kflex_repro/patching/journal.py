"""Several files of a tree replaced together: all of them or none, whenever the process dies.

Under the state directory: ``objects/<sha256>`` (contents), ``prepare.json`` (temporary files may exist: roll
back), ``commit.json`` (decided: roll forward), ``state.json`` (what the tree's owner keeps; written last).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kflex_repro.errors import KflexError

STATE = "state.json"
_PREPARE, _COMMIT = "prepare.json", "commit.json"
_SUFFIX = ".kflex-repro-new"


@dataclass(frozen=True)
class Write:
    """One file: its content before and after; None is "there is no such file".

    ``made`` are the directories that come and go with it, the outermost first.
    """

    path: str
    old: bytes | None
    new: bytes | None
    made: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    path: str
    old: str | None
    new: str | None
    made: tuple[str, ...]


def digest(data: bytes) -> str:
    """The name of a content in the object store."""
    return hashlib.sha256(data).hexdigest()


class Store:
    """The state directory of one tree."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.root = root
        self.directory = directory

    def get(self, name: str) -> bytes:
        """A kept content; KflexError where it is gone or damaged."""
        path = self.directory / "objects" / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise damaged(path, error.strerror or "unreadable") from None
        if digest(data) != name:
            raise damaged(path, "its hash is wrong")
        return data

    def _put(self, data: bytes) -> str:
        name = digest(data)
        path = self.directory / "objects" / name
        if not path.exists():
            replace(path, data)
        return name

    def state(self) -> bytes | None:
        """What the last change left in state.json."""
        try:
            return (self.directory / STATE).read_bytes()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the tree; KflexError if one does."""
        self._make()
        with (self.directory / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise KflexError(
                    "another kflex-repro is changing this tree", str(self.root), "wait for it"
                ) from None
            yield

    def _make(self) -> None:
        try:
            (self.directory / "objects").mkdir(parents=True, exist_ok=True)
            ignore = self.directory / ".gitignore"
            if not ignore.exists():
                replace(ignore, b"*\n")
        except OSError as error:
            raise KflexError(
                f"cannot keep the originals: {error.strerror}",
                str(self.directory),
                "make the tree writable, or work on a copy",
            ) from None

    def interrupted(self) -> bool:
        """Whether a change was begun and not finished."""
        return any((self.directory / name).exists() for name in (_PREPARE, _COMMIT))

    def commit(self, writes: Sequence[Write], state: bytes, keep: Sequence[bytes] = ()) -> None:
        """Make the writes and the new state happen, or nothing; ``keep`` are contents the state refers to.

        The caller holds the lock. OSError becomes KflexError, with everything as it was.
        """
        path = self.directory
        try:
            for data in (state, *keep):
                self._put(data)
            for write in writes:
                self._back_up(write)
            entries = [
                _Entry(
                    write.path,
                    None if write.old is None else self._put(write.old),
                    None if write.new is None else self._put(write.new),
                    write.made,
                )
                for write in writes
            ]
            record = json.dumps({"files": [asdict(entry) for entry in entries], "state": digest(state)})
            replace(path / _PREPARE, record.encode())
            try:
                for write in writes:
                    self._stage(write.path, write.new)
                (path / _PREPARE).rename(path / _COMMIT)
                sync_directory(path)
                self._forward(entries, digest(state))
            except BaseException:
                # An interrupt can come after the last step: then it is done.
                if self.state() != state:
                    self._back(entries)
                raise
            self._clean(entries)
        except OSError as error:
            where = error.filename or str(self.root)
            raise KflexError(
                f"cannot write: {error.strerror}",
                str(where),
                "nothing was changed; free some space or allow it",
            ) from None

    def recover(self) -> list[str]:
        """Finish or undo what a killed process began; lines about files that someone edited in between."""
        path = self.directory
        decided = (path / _COMMIT).exists()
        try:
            record = json.loads((path / (_COMMIT if decided else _PREPARE)).read_bytes())
            entries = [_Entry(**{**entry, "made": tuple(entry["made"])}) for entry in record["files"]]
            state = str(record["state"])
        except (OSError, ValueError, TypeError, KeyError):
            raise damaged(path / (_COMMIT if decided else _PREPARE), "it cannot be read") from None
        foreign = [entry.path for entry in entries if self._now(entry.path) not in (entry.old, entry.new)]
        if decided and not foreign:
            self._forward(entries, state)
            self._clean(entries)
            return []
        self._back([entry for entry in entries if entry.path not in foreign])
        return [f"{name} was edited during an interrupted change: left as it is" for name in foreign]

    def _now(self, name: str) -> str | None:
        target = self.root / name
        return digest(target.read_bytes()) if target.exists() else None

    def _stage(self, name: str, data: bytes | None) -> None:
        if data is None:
            return
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = temporary(target)
        with stage.open("wb") as stream:
            stream.write(data)
            stream.flush()
            if target.exists():
                # Mode, owner and extended attributes stay; the time must not, or make would not notice.
                shutil.copystat(target, stage)
                info = target.stat()
                if os.geteuid() == 0:
                    os.fchown(stream.fileno(), info.st_uid, info.st_gid)
                    os.fchmod(stream.fileno(), info.st_mode & 0o7777)
                os.utime(stage)
            os.fsync(stream.fileno())

    def _install(self, name: str, content: str | None) -> None:
        target = self.root / name
        if content is None:
            target.unlink(missing_ok=True)
        elif self._now(name) != content:
            # Always staged anew: the temporary file of a killed process need not be whole.
            self._stage(name, self.get(content))
            temporary(target).rename(target)
        if target.parent.is_dir():
            sync_directory(target.parent)

    def _forward(self, entries: Sequence[_Entry], state: str) -> None:
        for entry in entries:
            if entry.new is not None and temporary(self.root / entry.path).exists():
                stage = temporary(self.root / entry.path)
                if digest(stage.read_bytes()) == entry.new:
                    stage.rename(self.root / entry.path)
            self._install(entry.path, entry.new)
        replace(self.directory / STATE, self.get(state))

    def _back(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            self._install(entry.path, entry.old)
        self._clean(entries)

    def _clean(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            temporary(self.root / entry.path).unlink(missing_ok=True)
            for name in reversed(entry.made):
                with contextlib.suppress(OSError):
                    # Not empty: its files are there to stay.
                    (self.root / name).rmdir()
        for record in (_PREPARE, _COMMIT):
            (self.directory / record).unlink(missing_ok=True)
        sync_directory(self.directory)

    def _back_up(self, write: Write) -> None:
        """A plain copy of a file before our first change to it, for people."""
        copy = self.directory / "backup" / write.path
        if write.old is not None and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            replace(copy, write.old)

    def tidy(self, contents: set[str], files: set[str]) -> None:
        """Drop the contents and backups that nothing refers to any more."""
        for path in (self.directory / "objects").iterdir():
            if path.name not in contents:
                path.unlink(missing_ok=True)
        backup = self.directory / "backup"
        for path in sorted(backup.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(backup).as_posix() not in files:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def temporary(target: Path) -> Path:
    """Where a file's next content waits: beside it, so that the rename is atomic."""
    return target.with_name(target.name + _SUFFIX)


def replace(path: Path, data: bytes) -> None:
    """Write a file of the state directory atomically and durably."""
    stage = temporary(path)
    with stage.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    stage.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(path: Path, why: str) -> KflexError:
    """The error for a state directory that cannot be trusted."""
    return KflexError(
        f"the record of what was changed is damaged: {why}",
        str(path),
        "the files before our first change are in .kflex-repro/backup; put them back and remove .kflex-repro",
    )
