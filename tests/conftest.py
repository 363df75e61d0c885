"""Shared by all tests: a missing kernel feature skips a test, or fails it where CI says the kernel has it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRE_BPF = os.environ.get("KFLEX_REQUIRE_BPF") == "1"


def unavailable(reason: str) -> NoReturn:
    """Skip the running test; fail it instead under KFLEX_REQUIRE_BPF=1."""
    if REQUIRE_BPF:
        pytest.fail(f"KFLEX_REQUIRE_BPF=1, but: {reason}", pytrace=False)
    pytest.skip(reason)


def require(feature: str) -> None:
    """Need a fact of `kflex-repro doctor` (its key, e.g. ``sk_msg``), or ``root``, for the running test."""
    if feature == "root":
        if os.geteuid() != 0:
            unavailable("needs root")
        return
    from kflex_repro import host

    fact = host.fact(feature)
    if fact.state == "missing":
        unavailable(f"{feature}: {fact.value}; {fact.fix}")
