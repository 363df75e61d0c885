"""Linearizability under load: one order explains every reply of every connection, served and passing
together. Builds with one mistake each have none."""

from __future__ import annotations

import os

import pytest

from tests.redis import linear_load
from tests.redis.harness import PLAIN_ONLY, Sut, offloaded_server

SOAK_OPS = int(os.environ.get("KFLEX_SOAK_OPS", "1000000"))
IO_THREADS = ("--io-threads", "2", "--io-threads-do-reads", "yes")

pytestmark = pytest.mark.bpf


def check(sut: Sut, ops: int, seconds: float, seed: int = 1) -> linear_load.Report:
    before = sut.stats()
    report = linear_load.run(linear_load.Config(port=sut.port, ops=ops, seconds=seconds, seed=seed))
    print(report)
    assert not report.violations, str(report)
    assert not report.undecided, str(report)
    assert report.connections >= 50
    if sut.offloaded:
        after = sut.stats()
        served = after["served_get"] + after["served_set"] - before["served_get"] - before["served_set"]
        plain = report.by_name["GET"] + report.by_name["SET"]
        print(f"{served} served in the kernel: {served / plain:.0%} of {plain} GETs and SETs")
        assert served > plain * 0.2, after
        assert after["served_set"] > before["served_set"]
        assert after["lost"] == 0
        assert sut.broken_promises() == {}
    return report


def test_a_plain_server_is_linearizable(plain: Sut) -> None:
    """Else the model would be wrong, not the server."""
    report = check(plain, 20_000, seconds=20.0, seed=2)
    # And everything that can go wrong has been there.
    for name in ("SET PX", "PEXPIRE", "EXEC", "EVAL exchange", "BLPOP", "FLUSHALL", "SWAPDB", "COPY"):
        assert report.by_name[name], report
    assert report.lost
    assert report.messages


@pytest.mark.parametrize("arguments", [(), IO_THREADS], ids=["one thread", "io-threads"])
def test_it_is_linearizable(arguments: tuple[str, ...]) -> None:
    with offloaded_server(arguments) as sut:
        check(sut, 60_000, seconds=8.0)


BROKEN: dict[str, dict[str, float]] = {
    "KFLEX_BREAK_NO_DRAIN": {},
    "KFLEX_BREAK_NO_INVALIDATE": {},
    "KFLEX_BREAK_NO_REPLY_COUNT": {},
    # Shows in commands of unblocked clients.
    "KFLEX_BREAK_EARLY_GATE": {"blocked": 0.25},
}


@pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no broken build")
@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_build_is_not(mistake: str) -> None:
    """Otherwise the silence of the tests above would say nothing."""
    with offloaded_server(defines={mistake: "1"}) as sut:
        settings = BROKEN[mistake]
        config = linear_load.Config(port=sut.port, ops=400_000, seconds=60.0, reply_timeout=4.0, **settings)
        report = linear_load.run(config)
        print(report)
        assert report.violations, f"{mistake}: not found. {report}"
        assert "the load itself failed" not in str(report.violations)


@pytest.mark.soak
@pytest.mark.parametrize("arguments", [(), IO_THREADS], ids=["one thread", "io-threads"])
@pytest.mark.parametrize("seed", [101, 102])
def test_soak(arguments: tuple[str, ...], seed: int) -> None:
    with offloaded_server(arguments) as sut:
        report = check(sut, SOAK_OPS, seconds=3600.0, seed=seed)
        assert report.ops >= SOAK_OPS
