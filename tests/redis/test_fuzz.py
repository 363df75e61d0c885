"""The same byte streams to an offloaded and a plain server: the same bytes back, the same ends."""

from __future__ import annotations

import os

import pytest

from tests.redis import fuzz
from tests.redis.harness import Sut

SOAK_STREAMS = int(os.environ.get("KFLEX_SOAK_STREAMS", "100000"))

pytestmark = pytest.mark.bpf


def compare(offloaded: Sut, plain: Sut, streams: int, seed: int, **settings: object) -> fuzz.Report:
    before = offloaded.served()
    targets = [fuzz.Target(each.port, each.server.pid) for each in (offloaded, plain)]
    report = fuzz.run(*targets, streams=streams, seed=seed, **settings)
    print(report)
    assert not report.differences, str(report)
    assert report.streams >= streams, str(report)
    if offloaded.offloaded:
        served = offloaded.served() - before
        print(f"{served} requests served in the kernel")
        assert served > streams / 4
        assert offloaded.broken_promises() == {}
    return report


def test_streams_are_answered_as_by_a_plain_server(offloaded: Sut, plain: Sut) -> None:
    """Random mixes, lies about lengths, damage, and every truncation and split of a few short streams."""
    compare(offloaded, plain, 4000, seed=1)


def test_over_ipv6(offloaded: Sut, plain: Sut) -> None:
    targets = [fuzz.Target(each.port, each.server.pid, "::1") for each in (offloaded, plain)]
    report = fuzz.run(*targets, streams=400, seed=6, every_byte=False)
    assert not report.differences, str(report)


@pytest.mark.soak
def test_soak(offloaded: Sut, plain: Sut) -> None:
    compare(offloaded, plain, SOAK_STREAMS, seed=1000)
