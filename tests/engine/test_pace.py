"""Steps are as long as they may be, and no longer."""

from __future__ import annotations

import pytest

from lattice_serve.engine.pace import Pace


def learnt(rate: float, *, step_seconds: float | None = 0.1, most: int = 512) -> Pace:
    pace = Pace(step_seconds, most)
    for _ in range(50):
        pace.record(100, 100 / rate)
    return pace


def test_before_anything_is_known_all_may_run() -> None:
    assert Pace(0.1, 512).tokens(3) == 512


def test_without_a_limit_all_may_run() -> None:
    assert learnt(10, step_seconds=None).tokens(3) == 512


@pytest.mark.parametrize(
    ("rate", "decoding", "expected"),
    [
        (1000, 3, 100),  # a tenth of a second
        (1000, 0, 400),  # nobody waits for a next token
        (1e6, 3, 512),  # never beyond the limit of tokens
        (10, 3, 19),  # those in decode and a few more, however slow
        (10, 600, 512),
    ],
)
def test_tokens_of_a_step(rate: float, decoding: int, expected: int) -> None:
    assert learnt(rate).tokens(decoding) == pytest.approx(expected, abs=1)


def test_states_that_are_kept_count() -> None:
    pace = learnt(1000)
    assert pace.kept_tokens(3) == 0
    for _ in range(50):
        pace.record_kept(0.01)
    assert pace.kept_tokens(3) == pytest.approx(10, abs=1)
    assert pace.kept_tokens(0) == 0, "nobody waits for a next token"
    unlimited = learnt(1000, step_seconds=None)
    unlimited.record_kept(1)
    assert unlimited.kept_tokens(3) == 0


def test_it_follows_a_change_and_ignores_small_steps() -> None:
    pace = learnt(1000)
    for _ in range(50):
        pace.record(1, 1)
    assert pace.tokens(1) == pytest.approx(100, abs=1)
    for _ in range(50):
        pace.record(100, 1)
    assert pace.tokens(1) == 17
