"""Shared by all tests: a missing kernel feature skips a test, or fails it where CI says the kernel has it.

A test marked ``bpf`` is skipped where this host refuses BPF, before its fixtures start anything. What those
tests show is not lost there: the ones marked ``emulated`` run in a VM (tests/vm). Those marked
``smoke("AREA")`` run there in any case, and on other kernels.
"""

from __future__ import annotations

import functools
import os
from typing import NoReturn

import pytest

REQUIRE_BPF = os.environ.get("KFLEX_REQUIRE_BPF") == "1"
# The tests against plain Redis need none of it.
_PLAIN_ONLY = os.environ.get("KFLEX_TEST_SERVER") == "plain"
# What the offload's programs and the toolkit's own BPF tests stand on.
BPF = ("mmapable", "sockops", "sk_msg", "tp_btf", "cgroup2")

# What the smoke tests are about: the argument of their marker, and its name in the table of kernels.
AREAS = {
    "bpf": "BPF programs",
    "serving": "serving",
    "order": "order",
    "coherence": "coherence",
    "recovery": "crash recovery",
    "gate": "gate",
}


def unavailable(reason: str) -> NoReturn:
    """Skip the running test; fail it instead under KFLEX_REQUIRE_BPF=1."""
    if REQUIRE_BPF:
        pytest.fail(f"KFLEX_REQUIRE_BPF=1, but: {reason}", pytrace=False)
    pytest.skip(reason)


def lacking(feature: str) -> str:
    """Why a fact of `kflex-repro doctor` (its key, e.g. ``sk_msg``), or ``root``, is not here; else ""."""
    if feature == "root":
        return "" if os.geteuid() == 0 else "needs root"
    from kflex_repro import host

    fact = host.fact(feature)
    return f"{feature}: {fact.value}; {fact.fix}" if fact.state == "missing" else ""


def require(*features: str) -> None:
    """Need these facts of `kflex-repro doctor`, or ``root``, for the running test."""
    for feature in features:
        if reason := lacking(feature):
            unavailable(reason)


def pytest_itemcollected(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("smoke"):
        (area,) = marker.args
        assert area in AREAS, f"{item.nodeid}: no area {area}"
        item.user_properties.append(("area", area))


@functools.cache
def refused() -> dict[str, str]:
    """Why each thing that BPF tests stand on is not here."""
    return {feature: reason for feature in ("root", *BPF, "capabilities") if (reason := lacking(feature))}


def pytest_report_header() -> list[str]:
    """Said at the start: that much is not tested here, and where it is."""
    if REQUIRE_BPF or not refused():
        return []
    from kflex_repro import host

    return [f"{host.refusal()}: tests that need it are skipped here, many of them run in a VM (tests/vm)"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [each for kind in ("passed", "failed", "skipped") for each in terminalreporter.getreports(kind)]
    in_vm = [str(value) for each in reports for name, value in each.user_properties if name == "vm"]
    reasons = {f"Skipped: {reason}" for reason in refused().values()}
    lost = sum(isinstance(each.longrepr, tuple) and each.longrepr[2] in reasons for each in reports)
    if lost:
        line = f"{lost} tests were skipped, as BPF or root is not to be had here; "
        terminalreporter.write_line(line + ("in the VM:" if in_vm else "and none ran in a VM"), yellow=True)
    for line in in_vm:
        terminalreporter.write_line(f"VM: {line}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("bpf") and not _PLAIN_ONLY:
        require("root", *BPF)
