"""Fair shares by themselves: of amounts, of whole places, and of rows over time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.engine.row_shares import RowShares
from lattice_serve.engine.shares import Shares, salted, tenant_of


def weighed(**weights: int) -> Shares:
    shares = Shares()
    for tenant, weight in weights.items():
        shares.weigh(tenant, weight)
    return shares


@pytest.mark.parametrize(
    ("total", "demands", "split"),
    [
        (10, {"a": 4}, {"a": 4}),
        (10, {"a": 40}, {"a": 10}),
        (10, {"a": 40, "b": 40}, {"a": 5, "b": 5}),
        (10, {"a": 40, "b": 2}, {"a": 8, "b": 2}),
        (9, {"a": 40, "b": 2, "c": 40}, {"a": 3.5, "b": 2, "c": 3.5}),
        (12, {"a": 40, "heavy": 40}, {"a": 3, "heavy": 9}),
        (12, {"a": 40, "heavy": 6}, {"a": 6, "heavy": 6}),
    ],
)
def test_shares_are_max_min_fair(total: int, demands: dict[str, float], split: dict[str, float]) -> None:
    assert weighed(heavy=3).split(total, demands) == split


demands = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), min_size=1)


@given(total=st.integers(0, 60), demands=demands, weights=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9)))
def test_nothing_is_left_that_somebody_wants(total: int, demands: dict[str, int], weights: dict[str, int]) -> None:
    shares = weighed(**weights)
    split = shares.split(total, demands)
    assert sum(split.values()) == pytest.approx(min(total, sum(demands.values())))
    level = max((split[each] / shares.weight(each) for each in split), default=0)
    for tenant, share in split.items():
        assert share <= demands[tenant]
        assert share == pytest.approx(demands[tenant]) or share / shares.weight(tenant) == pytest.approx(level)


def test_places_in_a_full_queue() -> None:
    shares = weighed(heavy=2)
    assert shares.allows("a", 8, {}, 8)
    assert not shares.allows("a", 9, {}, 8)
    assert not shares.allows("a", 1, {"a": 8}, 8)
    assert shares.allows("b", 4, {"a": 8}, 8), "half of them are its own"
    assert not shares.allows("b", 5, {"a": 8}, 8)
    assert not shares.allows("a", 1, {"a": 8, "b": 1}, 8), "it has more than its share"
    assert shares.allows("heavy", 5, {"a": 8}, 8)
    assert not shares.allows("heavy", 6, {"a": 8}, 8)


def test_who_is_most_over_its_share() -> None:
    assert weighed(heavy=4).most_over({"a": 10, "b": 20, "heavy": 60}) == "b"
    assert weighed().most_over({"a": 10, "b": 10}) == "a"


def test_salts_name_their_tenant() -> None:
    assert tenant_of(salted("key", "a/b")) == "key"
    assert tenant_of(salted("", "key/b")) == ""
    assert tenant_of("") == ""
    assert salted("a", "b") != salted("", "ab")


@pytest.mark.parametrize(("a", "b", "rows"), [(1, 1, 1), (1, 1, 5), (3, 1, 1), (3, 1, 2), (10, 1, 4)])
def test_rows_left_over_go_round(a: int, b: int, rows: int) -> None:
    """Over time everyone has its share of rows to the part, and few rows change hands for it."""
    shares = RowShares(weighed(a=a, b=b))
    held: dict[str, int] = {"a": rows}
    total, changes, quantum, steps = Counter[str](), 0, 20, 40_000
    for _ in range(steps):
        now = shares.assign(rows, held, {"a": 50, "b": 50}, quantum)
        assert sum(now.values()) == rows
        changes += sum(abs(now[each] - held.get(each, 0)) for each in now) // 2
        held = now
        total.update(now)
    assert total["a"] / steps == pytest.approx(rows * a / (a + b), rel=0.02)
    assert changes <= steps / quantum


@given(st.lists(st.tuples(st.integers(1, 12), demands), min_size=1, max_size=30))
def test_rows_are_never_idle_and_whole_shares_are_had_at_once(steps: list[tuple[int, dict[str, int]]]) -> None:
    shares, held = Shares(), dict[str, int]()
    rows_of = RowShares(shares)
    for rows, wanted in steps:
        now = rows_of.assign(rows, held, wanted, 5)
        assert sum(now.values()) == min(rows, sum(wanted.values()))
        places = shares.places(rows, wanted)
        assert all(places[tenant] <= now[tenant] <= wanted[tenant] for tenant in wanted)
        held = now
