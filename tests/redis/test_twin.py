"""The same random commands to an offloaded and to a plain redis-server: the same bytes, data and AOF."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis import twin
from tests.redis.harness import Sut, eventually, offloaded_server, plain_server

SOAK_COMMANDS = int(os.environ.get("KFLEX_SOAK_COMMANDS", "1200000"))
# With appendfsync no replies come after the write() to the AOF: the copy of a quiet server is whole.
AOF = ("--appendonly", "yes", "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0")

pytestmark = pytest.mark.bpf


@pytest.fixture(scope="module")
def with_aof() -> Iterator[Sut]:
    with offloaded_server(AOF) as sut:
        yield sut


def empty_twins(offloaded: Sut, plain: Sut) -> twin.Twins:
    for each in (offloaded, plain):
        with each.connect() as conn:
            assert conn.do("FLUSHALL") == b"OK"
    return twin.Twins(offloaded, plain)


def play(offloaded: Sut, plain: Sut, seed: object, commands: int) -> twin.Played:
    """A script from empty servers: the same replies, nothing more, and the same data afterwards."""
    twins = empty_twins(offloaded, plain)
    played = twins.play(twin.Writer(seed).script_of(commands))
    assert not played.difference, f"seed {seed}: {played}"
    assert twins.nothing_more()
    offloaded.hang_up()
    plain.hang_up()
    same_data(offloaded, plain)
    return played


def same_data(left: Sut, right: Sut) -> None:
    if twin.digest(left) != twin.digest(right):
        raise AssertionError("\n".join(["the data differ", *twin.differing_keys(left, right)]))


def aof_replays(sut: Sut, place: Path) -> None:
    """A server without module makes of the AOF what the offloaded one holds."""
    shutil.copytree(sut.server.dir / "appendonlydir", place / "appendonlydir")
    with plain_server(["--appendonly", "yes"], dir=place) as replayed:
        same_data(sut, replayed)


def test_scripts(with_aof: Sut, plain: Sut, tmp_path: Path) -> None:
    before = with_aof.served()
    total = 0
    for seed in range(4):
        total += play(with_aof, plain, seed, 8000).commands
        aof_replays(with_aof, tmp_path / f"aof{seed}")
    served = with_aof.served() - before
    print(f"{total} commands, {served} of them served in the kernel")
    if with_aof.offloaded:
        assert served > total / 10
        assert with_aof.broken_promises() == {}


def test_scripts_with_a_replica(offloaded: Sut, plain: Sut) -> None:
    """It comes in the middle of a script, when the table is in use, and sees what the rest of it does."""
    twins = empty_twins(offloaded, plain)
    steps = twin.Writer("replica").script_of(9000)
    with plain_server() as replica, replica.connect() as copy:
        for part in range(3):
            played = twins.play(step for step, _ in zip(steps, range(250), strict=False))
            assert not played.difference, str(played)
            if part == 0:
                copy.do("REPLICAOF", "127.0.0.1", str(offloaded.port))
        with offloaded.connect() as master:
            offset = field(master.do("INFO", "replication"), b"master_repl_offset")
        eventually(
            lambda: field(copy.do("INFO", "replication"), b"slave_repl_offset") >= offset,
            timeout=20,
            what="the replica at the master's offset",
        )
        same_data(offloaded, replica)
        same_data(offloaded, plain)
    offloaded.hang_up()
    plain.hang_up()


def field(info: object, name: bytes) -> int:
    """A number of an INFO reply, -1 where it is not there."""
    assert isinstance(info, bytes)
    return next(
        (int(line[len(name) + 1 :]) for line in info.splitlines() if line.startswith(name + b":")), -1
    )


def test_a_table_that_forgets_nothing_is_found_out(plain: Sut) -> None:
    """The comparison itself: without invalidation the first scripts differ."""
    with offloaded_server(defines={"KFLEX_BREAK_NO_INVALIDATE": "1"}) as broken:
        twins = empty_twins(broken, plain)
        played = twins.play(twin.Writer("broken").script_of(20_000))
        broken.hang_up()
    plain.hang_up()
    assert "replies differ" in played.difference, str(played)


@pytest.mark.soak
def test_soak(with_aof: Sut, plain: Sut, tmp_path: Path) -> None:
    total, seed, before = 0, 1000, with_aof.served()
    while total < SOAK_COMMANDS:
        total += play(with_aof, plain, seed, 100_000).commands
        seed += 1
    aof_replays(with_aof, tmp_path / "aof")
    served = with_aof.served() - before
    print(f"{total} commands, {served} of them served in the kernel, no difference")
    if with_aof.offloaded:
        assert served > total / 10
        assert with_aof.broken_promises() == {}
