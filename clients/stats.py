"""What a benchmark says about many measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of `values` do not exceed, interpolated linearly; `values` need no order.

    Raises `ValueError` without values or with a percent outside 0 to 100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"no percentile {percent} of {len(values)} values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Spread(msgspec.Struct, frozen=True):
    """Mean, median and 99th percentile, in the unit of the values."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where nothing was measured."""
        if not values:
            return None
        return cls(math.fsum(values) / len(values), percentile(values, 50), percentile(values, 99))
