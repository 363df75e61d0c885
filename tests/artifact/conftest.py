"""A tree to build, and a cache to build it into."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifact.building import copy_tree, require_tools


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("KFLEX_CACHE", str(path))
    return path


@pytest.fixture
def tree(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of the test's own; what building it needs is there."""
    require_tools(monkeypatch)
    return copy_tree(tmp_path / "KFlex")
