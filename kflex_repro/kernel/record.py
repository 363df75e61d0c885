"""What an installation made, written before it is made: /var/lib/kflex-repro/kernels/RELEASE.json.

A record that does not say ``installed`` is of an installation or a removal that was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.kernel.place import Root
from kflex_repro.patching import journal

PLACE = "/var/lib/kflex-repro/kernels"
INSTALLING, INSTALLED, REMOVING = "installing", "installed", "removing"


@dataclass(frozen=True)
class Made:
    """A file or (``tree``) directory of an installation; sha256 is None for what a tool makes."""

    path: str
    tree: bool = False
    sha256: str | None = None


@dataclass(frozen=True)
class Record:
    """``config_new`` is the sha256 of grub's configuration as we left it; the one before is kept beside."""

    release: str
    state: str
    arch: str
    source: str
    made: tuple[Made, ...]
    config: str | None = None
    config_new: str | None = None
    left: tuple[str, ...] = ()

    @property
    def image(self) -> str:
        return f"vmlinuz-{self.release}"

    def now(self, **change: object) -> Record:
        """The record with some facts changed."""
        return replace(self, **change)  # type: ignore[arg-type]


class Store:
    """The records of one system."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.directory = root.real(PLACE)

    def _file(self, release: str) -> Path:
        return self.directory / f"{release}.json"

    def backup_name(self, release: str) -> str:
        """Where grub's configuration of before an installation is kept while that one runs."""
        return f"{PLACE}/{release}.grub.cfg"

    def backup(self, release: str) -> Path:
        """The same, as a path outside."""
        return self.root.real(self.backup_name(release))

    def get(self, release: str) -> Record | None:
        """One record; KflexError where it is damaged."""
        path = self._file(release)
        try:
            facts = json.loads(path.read_bytes())
            if facts.pop("version") != 1:
                raise ValueError("a version of its own")
            made = tuple(Made(**item) for item in facts.pop("made"))
            record = Record(**{**facts, "made": made, "left": tuple(facts["left"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise KflexError(
                "the record of an installed kernel is damaged",
                str(path),
                "remove that kernel's files by hand, then the record",
            ) from None
        return record

    def all(self) -> list[Record]:
        """Every record, by release."""
        names = sorted(path.stem for path in self.directory.glob("*.json")) if self.directory.is_dir() else []
        return [record for name in names if (record := self.get(name)) is not None]

    def put(self, record: Record) -> None:
        """Write a record, atomically and durably."""
        data = json.dumps({"version": 1, **asdict(record)}, indent=1) + "\n"
        journal.replace(self._file(record.release), data.encode())

    def drop(self, record: Record) -> None:
        """Forget an installation."""
        self._file(record.release).unlink(missing_ok=True)
        journal.sync_directory(self.directory)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from changing this system's kernels. KflexError where somebody does, or we may not."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            stream = (self.directory / "lock").open("w")
        except OSError as error:
            fix = "run as root" if self.root.is_host and os.geteuid() else "make it writable"
            raise KflexError(
                f"cannot keep records of kernels, {error.strerror}", str(self.directory), fix
            ) from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Programs that we start hold it, too, and may outlive us.
                os.set_inheritable(stream.fileno(), True)
            except BlockingIOError:
                raise KflexError(
                    "another kflex-repro is changing this system's kernels",
                    str(self.directory),
                    "wait for it",
                ) from None
            yield
