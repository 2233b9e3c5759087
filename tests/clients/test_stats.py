from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.clients.stats import Spread, percentile

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(values, st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 99, 7.0), ([3.0, 1.0, 2.0], 50, 2.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0], 0, 1.0), ([4.0, 1.0], 100, 4.0)],
)
def test_percentiles_by_hand(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_what_has_no_percentile(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile(values, percent)


def test_a_spread() -> None:
    assert Spread.of([]) is None
    assert Spread.of([float(n) for n in range(101)]) == Spread(mean=50.0, p50=50.0, p99=99.0)
