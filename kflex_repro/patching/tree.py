"""A user's source tree: changed all or nothing, and exactly revertible, recipe by recipe.

What we keep is under ``.kflex-repro/`` in the tree: for each file we changed, its content after our last
change and the hunks in it (whose, where, what was there before), which is how one recipe is reverted under
another; and in ``backup/`` the file as it was before our first change.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from kflex_repro.errors import KflexError
from kflex_repro.patching import journal, pieces
from kflex_repro.patching.journal import Store, Write
from kflex_repro.patching.pieces import File, Piece

STATE_DIRECTORY = ".kflex-repro"
_SCHEMA = 1


@dataclass(frozen=True)
class Edit:
    """Bytes ``start:end`` of a file replaced by ``new``; with ``create``, a file that is not there yet.

    ``path`` is relative to the tree, with slashes; offsets are of the file as ``Tree.read`` gives it.
    """

    path: str
    start: int
    end: int
    new: bytes
    create: bool = False


@dataclass(frozen=True)
class Applied:
    """A recipe in the tree: version, when (UTC, ISO 8601), what the caller noted, the files it changed."""

    name: str
    version: str
    when: str
    facts: Mapping[str, object]
    files: tuple[str, ...]


class Tree:
    """One source tree. Not shared between threads; other processes are kept out while it changes."""

    def __init__(self, root: Path, store: Store) -> None:
        self.root = root
        self._store = store
        self._applied: dict[str, Applied] = {}
        self._files: dict[str, File] = {}
        self._recovered: list[str] = []

    @classmethod
    def open(cls, root: Path) -> Tree:
        """The tree at a directory; finishes or undoes what a killed process left half done."""
        place = root.expanduser()
        if not place.is_dir():
            what = "not a directory" if place.exists() else "there is no such directory"
            raise KflexError(what, str(root), "give --source the directory with the sources")
        if not os.access(place, os.R_OK | os.X_OK):
            raise KflexError("the source tree cannot be read", str(root), "look at its permissions")
        place = place.resolve()
        directory = place / STATE_DIRECTORY
        if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
            raise KflexError("not a directory of ours", str(directory), "remove it")
        tree = cls(place, Store(place, directory))
        if tree._store.interrupted():
            with tree._changing():
                pass
        tree._load()
        return tree

    def read(self, path: str, without: str = "") -> bytes:
        """A file's content now; with ``without``, as it would be were that recipe reverted."""
        name = self.name(path)
        if without and name in self._files and without in self._files[name].owners:
            return pieces.reverted(self._current(name), name, without).content
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise KflexError(f"cannot read: {error.strerror}", path, "is this the right tree?") from None

    def exists(self, path: str, without: str = "") -> bool:
        """Whether a file is there (``without``: were that recipe reverted)."""
        name = self.name(path)
        if without and name in self._files and self._files[name].created_by == without:
            return False
        return (self.root / name).is_file()

    def name(self, path: str) -> str:
        """The canonical relative path of a file; KflexError if it leads out of the tree."""
        if not path or PurePosixPath(path).is_absolute() or "\0" in path:
            raise KflexError("not a path inside the tree", path)
        try:
            target = (self.root / path).resolve()
        except (OSError, RuntimeError):
            raise KflexError("a symbolic link that leads nowhere", path, "replace it with a file") from None
        if not target.is_relative_to(self.root):
            raise KflexError(
                "leads out of the tree", path, "a symbolic link? replace it with the file itself"
            )
        name = target.relative_to(self.root).as_posix()
        if name.split("/")[0] == STATE_DIRECTORY:
            raise KflexError("not a source file", path)
        return name

    def applied(self) -> list[Applied]:
        """The recipes in the tree, the oldest first."""
        return list(self._applied.values())

    def get(self, name: str) -> Applied | None:
        """One applied recipe."""
        return self._applied.get(name)

    def edited(self, name: str) -> list[str]:
        """``file:line`` of each hunk of a recipe that is no longer what we wrote."""
        return [
            f"{path}:{line}"
            for path, file in self._files.items()
            if name in file.owners and file.content != (now := self._bytes(path))
            for by, line in pieces.lost(file, now)
            if by == name
        ]

    def warnings(self) -> list[str]:
        """Lines worth showing before a change: changes git does not have, an interrupted change."""
        lines = list(self._recovered)
        dirty = [path for path in _git_dirty(self.root) if not self._ours(path)]
        if dirty:
            more = f" and {len(dirty) - 1} more" if len(dirty) > 1 else ""
            lines.append(
                f"the git tree has uncommitted changes ({dirty[0]}{more});"
                f" each file we change is kept in {STATE_DIRECTORY}/backup/"
            )
        return lines

    def diff(self, edits: Iterable[Edit], without: str = "") -> str:
        """What applying would change now, as a unified diff; undecodable bytes survive as surrogates."""
        return self._diff(self._plan(without or "this recipe", edits, without))

    def planned(self, edits: Iterable[Edit], without: str = "") -> dict[str, bytes | None]:
        """The files that applying would leave, by their canonical paths; None for one that goes."""
        after = self._plan(without or "this recipe", edits, without)
        return {path: self._new(path, file) for path, file in after.items()}

    def diff_revert(self, name: str, keep_edited: bool = False) -> str:
        """What reverting would change, as a unified diff."""
        return self._diff(self._without(name, keep_edited))

    def apply(
        self, name: str, version: str, edits: Iterable[Edit], facts: Mapping[str, object] | None = None
    ) -> None:
        """Make the edits, or nothing, and remember them as recipe ``name``.

        Where ``name`` is applied already it is replaced: the edits are then of files as
        ``read(path, without=name)`` gives them. Edits of one place are made in the order given.
        """
        with self._changing():
            after = self._plan(name, edits, name if name in self._applied else "")
            when = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            applied = [item for item in self._applied.values() if item.name != name]
            self._write(after, [*applied, Applied(name, version, when, dict(facts or {}), ())])

    def revert(self, name: str, keep_edited: bool = False) -> None:
        """Put back what was there before ``name``, also under other recipes.

        KflexError naming file and line where somebody edited what we wrote; with ``keep_edited`` those places
        stay as they are.
        """
        with self._changing():
            if name not in self._applied:
                known = ", ".join(self._applied) or "nothing"
                raise KflexError(f"{name} is not applied", str(self.root), f"applied: {known}")
            after = self._without(name, keep_edited)
            self._write(after, [item for item in self._applied.values() if item.name != name])

    # -- files after a change, nothing written; one without owners and pieces is gone

    def _plan(self, name: str, edits: Iterable[Edit], without: str) -> dict[str, File]:
        after = self._without(without) if without else {}
        wanted: dict[str, list[Edit]] = {}
        for edit in edits:
            wanted.setdefault(self.name(edit.path), []).append(edit)
        for path, parts in wanted.items():
            if not any(part.create for part in parts):
                before = after[path] if path in after else self._current(path)
                after[path] = pieces.edited(before, path, name, [(e.start, e.end, e.new) for e in parts])
                continue
            if len(parts) > 1:
                raise KflexError("a new file is made by one edit", path)
            if self.exists(path, without):
                raise KflexError("the file to make is already there", path, "move it away")
            known = self._files.get(path)
            above = [
                str(parent) for parent in PurePosixPath(path).parents if not (self.root / parent).exists()
            ]
            made = known.made if known else tuple(reversed(above))
            after[path] = File((Piece(b""), Piece(parts[0].new, name), Piece(b"")), name, made)
        return after

    def _without(self, name: str, keep_edited: bool = False) -> dict[str, File]:
        touched = [path for path, file in self._files.items() if name in file.owners]
        after = {}
        for path in touched:
            file = self._current(path, name if keep_edited else "")
            after[path] = pieces.reverted(file, path, name) if name in file.owners else file
        return after

    def _current(self, path: str, keep: str = "") -> File:
        """A file's pieces in its content of now; edits inside a hunk are refused, unless it is ``keep``'s."""
        now = self._bytes(path)
        known = self._files.get(path)
        if known is None:
            if now is None:
                raise KflexError("there is no such file", path, "is this the right tree?")
            return File((Piece(now),))
        if known.content == now:
            return known
        lost = pieces.lost(known, now)
        for by, line in lost:
            if by != keep:
                raise KflexError(
                    f"edited since {by} was applied",
                    f"{path}:{line}",
                    f"undo that edit, or keep it with `kflex-repro patch revert {by} --keep-edited`",
                )
        if now is None:
            return File(())
        return File((Piece(now),)) if known.created_by else pieces.rebased(known, now)

    # -- the files themselves

    def _bytes(self, name: str) -> bytes | None:
        target = self.root / name
        return target.read_bytes() if target.is_file() else None

    def _check_writable(self, path: str) -> None:
        target = self.root / path
        stage = journal.temporary(target)
        if stage.is_symlink() or stage.is_dir():
            raise KflexError("in the way", str(stage), "remove it")
        directory = target.parent
        while not directory.exists():
            directory = directory.parent
        if not os.access(directory, os.W_OK | os.X_OK) or not directory.stat().st_mode & 0o222:
            raise KflexError("the directory is read-only", str(directory), "chmod u+w it, or work on a copy")
        # root may write anything, but a file nobody may write was made so on purpose.
        if target.exists() and not (os.access(target, os.W_OK) and target.stat().st_mode & 0o222):
            raise KflexError("the file is read-only", path, "chmod u+w it, or work on a copy")

    def _new(self, path: str, file: File) -> bytes | None:
        known = self._files.get(path)
        absent = not file.owners and (not file.pieces or (known is None and not self.exists(path)))
        return None if absent else file.content

    def _diff(self, after: Mapping[str, File]) -> str:
        parts = [
            pieces.unified(path, self._bytes(path), self._new(path, after[path])) for path in sorted(after)
        ]
        return b"".join(parts).decode("utf-8", "surrogateescape")

    def _ours(self, path: str) -> bool:
        """Whether a file is exactly as we left it."""
        return path in self._files and self._bytes(path) == self._files[path].content

    # -- what we keep

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """The lock of one change, over the state read again under it."""
        with self._store.locked():
            if self._store.interrupted():
                self._recovered += self._store.recover()
            self._load()
            yield

    def _load(self) -> None:
        raw = self._store.state()
        self._applied, self._files = {}, {}
        if raw is None:
            return
        path = self._store.directory / journal.STATE
        try:
            state = json.loads(raw)
            if state["schema"] != _SCHEMA:
                raise KflexError(
                    "changed by another version of kflex-repro", str(path), "revert with that one"
                )
            for item in state["applied"]:
                self._applied[item["name"]] = Applied(**{**item, "files": tuple(item["files"])})
            for name, item in state["files"].items():
                self._files[name] = pieces.unpacked(item, self._store.get(item["written"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise journal.damaged(path, "it cannot be read") from None

    def _write(self, after: Mapping[str, File], applied: Iterable[Applied]) -> None:
        writes = []
        for path, file in after.items():
            old, new = self._bytes(path), self._new(path, file)
            if old == new:
                continue
            self._check_writable(path)
            known = self._files.get(path)
            writes.append(Write(path, old, new, known.made if known and new is None else file.made))
        files = {path: file for path, file in sorted({**self._files, **after}.items()) if file.owners}
        records = [
            replace(item, files=tuple(path for path, file in files.items() if item.name in file.owners))
            for item in applied
        ]
        contents = {path: journal.digest(file.content) for path, file in files.items()}
        state = {
            "schema": _SCHEMA,
            "applied": [asdict(item) for item in records],
            "files": {path: pieces.packed(file, contents[path]) for path, file in files.items()},
        }
        keep = [file.content for file in files.values()]
        try:
            self._store.commit(writes, json.dumps(state, indent=1).encode(), keep)
        finally:
            if not self._store.interrupted():
                self._load()
                now = {path: journal.digest(file.content) for path, file in self._files.items()}
                self._store.tidy(set(now.values()), set(now))


def _git_dirty(root: Path) -> list[str]:
    """Tracked files that differ from HEAD, relative to ``root``; none where there is no git tree."""
    # Whoever owns the tree, and whatever its configuration would run.
    settings = ["-c", "safe.directory=*", "-c", "core.fsmonitor=false"]
    what = ["diff", "HEAD", "--name-only", "--relative", "-z", "--ignore-submodules", "--no-ext-diff"]
    try:
        out = subprocess.run(
            ["git", "-C", str(root), *settings, *what],
            check=False,
            capture_output=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [os.fsdecode(name) for name in out.stdout.split(b"\0") if name] if out.returncode == 0 else []
