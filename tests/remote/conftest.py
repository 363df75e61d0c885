"""One sshd for a module's tests; each test finds it, and its user's home, as new."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.remote.sshd import Host, host


@pytest.fixture(scope="module")
def _daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    require("root")
    with host(tmp_path_factory.mktemp("ssh")) as one:
        yield one


@pytest.fixture
def there(_daemon: Host) -> Iterator[Host]:
    """A host to log in to that has the toolkit; afterwards nothing of it may be left there."""
    script = _daemon.toolkit.read_text()
    yield _daemon
    _daemon.nothing_left()
    _daemon.toolkit.write_text(script)
    _daemon.trust()


@pytest.fixture
def here(there: Host, tmp_path: Path) -> Path:
    """A directory for results."""
    del there
    return tmp_path
