"""What was built of which tree, for ``run --artifact``: one small file for each tree, in the cache."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kflex_repro.build import artifact_source, cache
from kflex_repro.build.artifact import OBJECTS, PROGRAM, PROGRAM_NAME, Artifact
from kflex_repro.errors import KflexError

_KIND = "artifact-builds"
_SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """A finished build: the tree, a digest of what it was then, the recipes in it, and where it is."""

    schema: int
    source: str
    content: str
    recipes: tuple[str, ...]
    objects: str
    program: str

    @property
    def executable(self) -> Path:
        """The artifact's program."""
        return Path(self.program) / PROGRAM_NAME

    def object(self, name: str) -> Path:
        """One of its BPF objects (``ffkx_redis.bpf.o``)."""
        return Path(self.objects) / name

    @property
    def intact(self) -> bool:
        """Whether what was built is still there, unchanged."""
        return cache.intact(Path(self.objects)) and cache.intact(Path(self.program))

    @property
    def stale(self) -> bool:
        """Whether the tree is another than the one that was built."""
        root = Path(self.source)
        return not root.is_dir() or _content(root) != self.content


def _content(root: Path) -> str:
    return cache.digest(artifact_source.content(root))


def _file(root: Path) -> Path:
    return cache.root() / _KIND / f"{cache.digest([str(root)])}.json"


def keep(artifact: Artifact, recipes: Sequence[str]) -> Record:
    """Remember a finished build."""
    record = Record(
        schema=_SCHEMA,
        source=str(artifact.source),
        content=_content(artifact.source),
        recipes=tuple(recipes),
        objects=str(artifact.step(OBJECTS).path),
        program=str(artifact.step(PROGRAM).path),
    )
    path = _file(artifact.source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as stream:
        try:
            json.dump(asdict(record), stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
            Path(stream.name).replace(path)
        except BaseException:
            Path(stream.name).unlink(missing_ok=True)
            raise
    return record


def _read(path: Path) -> Record | None:
    try:
        data = json.loads(path.read_text())
        if data.pop("schema") != _SCHEMA:
            return None
        return Record(schema=_SCHEMA, **{**data, "recipes": tuple(data["recipes"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def find(root: Path | None) -> Record:
    """The last build of a tree, or of any. KflexError where there is none, or where it is damaged."""
    paths = [_file(root)] if root else list((cache.root() / _KIND).glob("[!.]*.json"))
    built = [(path.stat().st_mtime_ns, record) for path in paths if path.exists() and (record := _read(path))]
    where = f"--source {root or 'DIR'}"
    if not built:
        raise KflexError(
            "the artifact is not built", str(root or ""), f"kflex-repro build --artifact {where}"
        )
    record = max(built, key=lambda pair: pair[0])[1]
    if not record.intact:
        fix = f"kflex-repro build --artifact --source {record.source}"
        raise KflexError("what was built is gone or damaged", record.program, fix)
    return record
