"""Servers for the Redis tests, and the rule that every module of tests leaves the machine as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.redis.harness import Conn, Snapshot, Sut, offloaded_server, plain_server


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[Snapshot]:
    """Programs, maps, links, pins, cgroups, network namespaces and processes: as before the module."""
    before = Snapshot.take()
    yield before
    before.must_return()


@pytest.fixture(scope="module")
def offloaded() -> Iterator[Sut]:
    """One offloaded server for the module."""
    with offloaded_server() as sut:
        yield sut


@pytest.fixture
def sut(offloaded: Sut) -> Iterator[Sut]:
    """The module's offloaded server, empty; afterwards the promises it must keep are looked at."""
    with Conn(offloaded.port) as conn:
        assert conn.do("FLUSHALL") == b"OK"
    yield offloaded
    offloaded.hang_up()
    assert offloaded.broken_promises() == {}


@pytest.fixture(scope="module")
def plain() -> Iterator[Sut]:
    """A redis-server alone, to compare with."""
    with plain_server() as twin:
        yield twin


@pytest.fixture
def conn(sut: Sut) -> Conn:
    """A connection to the server under test that has been answered once."""
    made = sut.connect()
    sut.warm(made)
    return made
