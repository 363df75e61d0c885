"""Figures, ratios, the order of pairs, and when a burst counts as over."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kflex_repro.bench.stats import (
    Figure,
    ShareSample,
    figure,
    pair_order,
    percentile,
    ratios,
    recovery_seconds,
)

numbers = st.floats(min_value=1e-6, max_value=1e9)


@given(st.lists(numbers, min_size=1, max_size=20))
def test_a_figure_holds_its_runs(values: list[float]) -> None:
    found = figure(values)
    assert found is not None
    assert found.min <= found.median <= found.max
    assert found.runs == tuple(values)
    assert set(found.to_json()) == {"median", "min", "max", "runs"}


def test_a_figure_with_a_gap_is_none() -> None:
    assert figure([]) is None
    assert figure([1.0, None]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_of_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        figure([1.0, bad])


def test_ratios_are_taken_pair_by_pair() -> None:
    # The medians alone would say 1.0; each pair says 2 or 0.5.
    found = ratios([2.0, 1.0, 4.0], [1.0, 2.0, 2.0])
    assert found == Figure(2.0, 0.5, 2.0, (2.0, 0.5, 2.0))


def test_ratios_without_a_counterpart_are_none() -> None:
    assert ratios([1.0], []) is None
    assert ratios([1.0, 2.0], [1.0, 0.0]) is None
    assert ratios([1.0, None], [1.0, 1.0]) is None


def test_pairs_alternate() -> None:
    arms = ("baseline", "unix", "offload")
    order = [arm for pair in range(4) for arm in pair_order(arms, pair)]
    assert order[:6] == ["baseline", "unix", "offload", "offload", "unix", "baseline"]
    # Over an even number of pairs no arm has a better place than another.
    for arm in arms:
        places = [index % 3 for index, name in enumerate(order) if name == arm]
        assert sum(places) == 4


@given(st.lists(st.integers(0, 10**9), min_size=1), st.floats(0.01, 0.999))
def test_percentile_is_a_value_that_enough_do_not_exceed(values: list[int], fraction: float) -> None:
    values.sort()
    found = percentile(values, fraction)
    assert found in values
    assert sum(value <= found for value in values) >= fraction * len(values)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def series(*shares: float) -> list[ShareSample]:
    return [
        ShareSample(round(0.1 * (i + 1), 3), int(s * 1000), int((1 - s) * 1000)) for i, s in enumerate(shares)
    ]


def test_recovery_is_the_first_of_three_good_windows() -> None:
    samples = series(0.98, 0.98, 0.5, 0.5, 0.6, 0.95, 0.4, 0.96, 0.97, 0.98)
    found = recovery_seconds(samples, 0.2, 0.4)
    assert found == pytest.approx(0.4)


def test_no_recovery_is_none() -> None:
    assert recovery_seconds(series(0.98, 0.98, 0.5, 0.5, 0.5, 0.5, 0.5), 0.2, 0.4) is None


def test_nothing_served_before_is_nothing_to_come_back_to() -> None:
    assert recovery_seconds(series(0.0, 0.0, 0.5, 0.9, 0.9, 0.9), 0.2, 0.3) is None
