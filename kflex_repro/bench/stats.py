"""Figures over repeated runs: median with its range, and ratios taken pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Figure:
    """One measured quantity over several runs; ``runs`` in the order they were made."""

    median: float
    min: float
    max: float
    runs: tuple[float, ...]

    def to_json(self) -> dict[str, float | list[float]]:
        return {
            "median": _tidy(self.median),
            "min": _tidy(self.min),
            "max": _tidy(self.max),
            "runs": [_tidy(run) for run in self.runs],
        }


def _tidy(value: float) -> float:
    """Six significant digits: more would be noise in the file."""
    return float(f"{value:.6g}")


def figure(values: Sequence[float | None]) -> Figure | None:
    """The figure of ``values``; None if there is none, or if any run lacks it (a driver that cannot say).

    Raises ValueError for a value that is not finite.
    """
    if not values or any(value is None for value in values):
        return None
    runs = tuple(float(value) for value in values if value is not None)
    if not all(math.isfinite(run) for run in runs):
        raise ValueError(f"not finite: {runs}")
    return Figure(float(median(runs)), min(runs), max(runs), runs)


def ratios(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> Figure | None:
    """``numerator[i] / denominator[i]`` for every pair ``i``.

    None if a side lacks a value, the lengths differ, or a denominator is zero.
    """
    if len(numerator) != len(denominator):
        return None
    quotients: list[float | None] = []
    for top, bottom in zip(numerator, denominator, strict=True):
        quotients.append(None if top is None or not bottom else top / bottom)
    return figure(quotients)


def pair_order(arms: Sequence[str], pair: int) -> tuple[str, ...]:
    """The order of the arms in pair number ``pair`` (0 …): A B, B A, A B … so that drift favours neither
    side.
    """
    return tuple(arms) if pair % 2 == 0 else tuple(reversed(arms))


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least ``fraction`` of the (sorted, non-empty) values do not exceed."""
    if not sorted_values:
        raise ValueError("no values")
    rank = math.ceil(fraction * len(sorted_values))
    return sorted_values[max(0, min(len(sorted_values), rank) - 1)]


@dataclass(frozen=True)
class ShareSample:
    """Served and passed requests in one short window that ended at ``t`` seconds after the start of the
    run.
    """

    t: float
    served: int
    passed: int

    @property
    def share(self) -> float:
        total = self.served + self.passed
        return self.served / total if total else 0.0


def recovery_seconds(
    samples: Sequence[ShareSample],
    burst_start: float,
    burst_end: float,
    *,
    of_before: float = 0.9,
    hold: int = 3,
) -> float | None:
    """Seconds from ``burst_end`` until the served share is back at ``of_before`` of its level before the
    burst.

    Back means: ``hold`` windows in a row reach it; the first of them counts. None if it never is, or if there
    was nothing to come back to (no window before the burst, or nothing served in them).
    """
    before = [sample.share for sample in samples if sample.t <= burst_start and sample.served + sample.passed]
    if not before or median(before) == 0:
        return None
    level = of_before * median(before)
    after = [sample for sample in samples if sample.t > burst_end]
    for index in range(len(after) - hold + 1):
        if all(sample.share >= level for sample in after[index : index + hold]):
            return max(0.0, after[index].t - burst_end)
    return None
