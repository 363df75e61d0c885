"""What a result must say about where it was measured, and what of an emulated run is never shown: ratios.

All functions take the document of a ``result.json``, of ``bench redis`` or ``bench probe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]

EMULATED = "functional run under emulation, not a benchmark"
VIRTUAL = "measured in a virtual machine (KVM)"


def emulated(document: Document) -> bool:
    """Whether the CPU was emulated: what was measured then says nothing about speed."""
    return bool(document["host"].get("emulated"))


def mark(document: Document) -> str:
    """What must stand with every table and plot; "" for what was measured on the host itself."""
    if emulated(document):
        return EMULATED
    return VIRTUAL if document["host"].get("vm") else ""


def without_ratios(document: Document) -> dict[str, Any]:
    """``document``; of an emulated run without anything that divides one figure by another, and verdicts."""
    if not emulated(document):
        return dict(document)
    found = dict(document)
    if "scenarios" in found:
        found["scenarios"] = [_scenario(one) for one in document["scenarios"]]
    if "ops" in found:
        found["ops"] = [_op(one) for one in document["ops"]]
        found["goals"] = []
    return found


def _none(figures: Mapping[str, Any]) -> dict[str, None]:
    return dict.fromkeys(figures)


def _scenario(scenario: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in scenario.items() if name != "targets"}
    found["ratio"] = _none(scenario["ratio"])
    found["ratio_to"] = {peer: _none(figures) for peer, figures in scenario["ratio_to"].items()}
    return found


def _op(op: Mapping[str, Any]) -> dict[str, Any]:
    ratio = {load: {arm: _none(one) for arm, one in arms.items()} for load, arms in op["ratio"].items()}
    noise = {load: _none(one) for load, one in op["noise"].items()}
    return {**op, "ratio": ratio, "noise": noise}
