"""Durations as the counting probes keep them (bpf/trace.bpf.h): buckets, and what can be read from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """How a BPF object's buckets are laid out: TRACE_FIRST_BIT, TRACE_SUB, TRACE_BUCKETS of its BTF."""

    first_bit: int
    sub: int
    count: int

    @classmethod
    def of(cls, constants: Mapping[str, int]) -> Shape:
        """From the constants of an object's BTF."""
        return cls(*(constants[f"TRACE_{name}"] for name in ("FIRST_BIT", "SUB", "BUCKETS")))

    def low(self, index: int) -> int:
        """The smallest duration of a bucket, in ns."""
        if index == 0:
            return 0
        octave, part = divmod(index - 1, self.sub)
        base = 1 << (self.first_bit + octave)
        return base + base // self.sub * part

    def high(self, index: int) -> int:
        """The end of a bucket (its last one's too, although it has none), in ns."""
        return self.low(index + 1)


@dataclass(frozen=True)
class Times:
    """Durations in ns: their sum, the longest, and how many fell into each bucket."""

    shape: Shape
    ns: int
    max_ns: int
    buckets: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many durations."""
        return sum(self.buckets)

    def quantile(self, q: float) -> float | None:
        """The duration in ns that a share ``q`` does not exceed, interpolated; None if there is none."""
        total = self.count
        if not total:
            return None
        rank, seen = q * total, 0
        for index, number in enumerate(self.buckets):
            if number and seen + number >= rank:
                low, high = self.shape.low(index), self.shape.high(index)
                return min(low + (high - low) * (rank - seen) / number, float(self.max_ns))
            seen += number
        return float(self.max_ns)

    def as_dict(self) -> dict[str, Any]:
        """For --json: microseconds."""
        points = {f"p{q * 100:g}_us": self.quantile(q) for q in (0.5, 0.99)}
        return {
            "time_us": self.ns / 1000,
            **{name: round(ns / 1000, 3) for name, ns in points.items() if ns is not None},
            "max_us": self.max_ns / 1000,
        }


def added(shape: Shape, per_cpu: Iterable[Any]) -> Times:
    """The sum of the CPUs' ``struct trace_times``."""
    ns, longest, buckets = 0, 0, [0] * shape.count
    for one in per_cpu:
        ns += one.ns
        longest = max(longest, one.max_ns)
        if one.ns:
            buckets = [a + b for a, b in zip(buckets, one.bucket, strict=True)]
    return Times(shape, ns, longest, tuple(buckets))


def nothing(shape: Shape) -> Times:
    """No durations."""
    return Times(shape, 0, 0, (0,) * shape.count)
