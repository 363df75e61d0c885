"""Timeouts know whether the CPU is emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kflex_repro import host, patience


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    patience.emulated.cache_clear()
    yield
    patience.emulated.cache_clear()


@pytest.mark.parametrize(
    ("model", "emulated"),
    [("AMD EPYC 9354", False), ("QEMU TCG CPU version 2.5+", True), ("QEMU Virtual CPU version 2.5+", True)],
)
def test_an_emulated_cpu_is_known_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, model: str, emulated: bool
) -> None:
    monkeypatch.setattr(patience, "cpu_model", lambda: model)
    assert host.emulated() is emulated
    assert patience.patient(3.0) == (3.0 * patience.FACTOR if emulated else 3.0)
