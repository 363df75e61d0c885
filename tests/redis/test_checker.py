"""The checker against the server: no violations. Against builds with one mistake each: found every time."""

from __future__ import annotations

import os

import pytest

from tests.redis import checker
from tests.redis.harness import PLAIN_ONLY, Sut, offloaded_server

SOAK_OPS = int(os.environ.get("KFLEX_SOAK_OPS", "1000000"))

pytestmark = pytest.mark.bpf


def check(sut: Sut, profile: str, ops: int, **settings: object) -> checker.Report:
    before = sut.stats()
    report = checker.run(checker.configure(profile, port=sut.port, ops=ops, **settings))
    print(report)
    assert not report.violations, str(report)
    assert report.ops >= ops, str(report)
    if sut.offloaded:
        stats = sut.stats()
        served = stats["served_get"] + stats["served_set"] - before["served_get"] - before["served_set"]
        print(f"{served} served in the kernel ({served / report.ops:.0%})")
        assert served > ops * 0.05, stats
        assert sut.broken_promises() == {}
        assert stats["lost"] == 0
    return report


@pytest.mark.parametrize("profile", ["own", "registers", "blocked", "tug", "whole_server"])
def test_a_plain_server_has_no_violations(plain: Sut, profile: str) -> None:
    """Else the checker would be wrong, not the server."""
    check(plain, profile, 8_000)


def test_mixed(offloaded: Sut) -> None:
    """At least 50 connections: fast, slow, pipelined, split, transactional and demoting commands."""
    report = check(offloaded, "mixed", 200_000, seconds=25.0)
    assert report.connections >= 50


def test_over_ipv6(offloaded: Sut) -> None:
    check(offloaded, "mixed", 20_000, host="::1", seed=6)


def test_what_changes_the_whole_server(offloaded: Sut) -> None:
    """FLUSHALL, FLUSHDB, SWAPDB and DEBUG RELOAD, right after SETs and right before GETs of the same keys."""
    check(offloaded, "whole_server", 25_000, seconds=25.0)


def test_long_messages_of_sets_against_rewriting_commands(offloaded: Sut) -> None:
    check(offloaded, "tug", 40_000, seconds=25.0)


def test_commands_of_unblocked_clients(offloaded: Sut) -> None:
    """These are executed after the server has said that it is about to sleep."""
    check(offloaded, "blocked", 40_000, seconds=25.0)


def test_a_table_too_small_for_all() -> None:
    """Entries are thrown out and their memory used for other keys while others read them."""
    with offloaded_server(table_bytes=4 << 20) as sut:
        check(sut, "crowded", 60_000, seconds=25.0)
        if sut.offloaded:
            stats = sut.stats()
            assert stats["evicted"] + stats["why_full"] > 0, stats


BROKEN = {
    "KFLEX_BREAK_NO_DRAIN": "own",
    "KFLEX_BREAK_NO_INVALIDATE": "own",
    "KFLEX_BREAK_NO_REPLY_COUNT": "own",
    "KFLEX_BREAK_NO_WAIT": "tug",
    "KFLEX_BREAK_EARLY_GATE": "blocked",
}


@pytest.mark.skipif(PLAIN_ONLY, reason="a plain server has no broken build")
@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_build_is_found(mistake: str) -> None:
    """Otherwise the silence of the tests above would say nothing."""
    with offloaded_server(defines={mistake: "1"}) as sut:
        config = checker.configure(
            BROKEN[mistake], port=sut.port, ops=400_000, seconds=25.0, reply_timeout=4.0
        )
        report = checker.run(config)
        print(report)
        assert report.violations, f"{mistake}: not found. {report}"
        assert "the checker itself failed" not in str(report.violations)


@pytest.mark.soak
def test_soak_of_a_small_table() -> None:
    with offloaded_server(table_bytes=4 << 20) as sut:
        check(sut, "crowded", SOAK_OPS, seconds=1800.0)


@pytest.mark.soak
@pytest.mark.parametrize("profile", ["mixed", "own", "tug", "blocked", "whole_server"])
@pytest.mark.parametrize("seed", [101, 102])
def test_soak(offloaded: Sut, profile: str, seed: int) -> None:
    check(offloaded, profile, SOAK_OPS, seed=seed, connections=64, seconds=1800.0)
