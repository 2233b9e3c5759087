"""Guessing ahead: the same tokens as without it, in fewer steps where a text repeats itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.engine.drafter import Drafter
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.weights import bundled_model
from tests.engine.harness import Visit, complete, drive, make_engine, submit


def draft(drafter: Drafter, tokens: list[int], limit: int = 8) -> list[int]:
    return drafter.draft(lambda start, end: tokens[start:end], len(tokens), limit)


def test_what_followed_last_time() -> None:
    drafter = Drafter(4)
    text = [1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3, 8, 8, 1, 2]
    assert draft(drafter, text) == []
    assert draft(drafter, [*text, 3]) == [8, 8, 1, 2]
    assert draft(drafter, [*text, 3]) == [8, 8, 1, 2]
    assert draft(drafter, [*text, 3], limit=1) == [8]
    assert draft(drafter, [*text, 3, 4]) == [5, 6, 7, 9]


def test_a_short_period_goes_on() -> None:
    assert draft(Drafter(7), [5, 1, 2, 1, 2, 1]) == [2, 1, 2, 1, 2, 1, 2]
    assert draft(Drafter(3), [4] * 4) == [4, 4, 4]


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 9), st.lists(st.integers(1, 6)))
def test_a_draft_is_what_a_search_finds(tokens: list[int], most: int, steps: list[int]) -> None:
    drafter = Drafter(most)
    end = 0
    for step in [*steps, len(tokens)]:
        end = min(len(tokens), end + step)
        seen = tokens[:end]
        earlier = [i for i in range(3, end) if seen[i - 3 : i] == seen[-3:]]
        expected = list(seen)
        for _ in range(most if earlier else 0):
            expected.append(expected[earlier[-1] + len(expected) - end])
        assert draft(drafter, seen, limit=9) == expected[end:]


def test_wrong_guesses_make_it_careful() -> None:
    drafter = Drafter(8)
    drafter.learn(8, 2)
    assert len(draft(drafter, [4] * 9)) == 2
    drafter.learn(2, 0)
    assert len(draft(drafter, [4] * 9)) == 1
    for length in (2, 4, 8, 8):
        drafter.learn(1, 1)
        assert len(draft(drafter, [4] * 9)) == length


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattice_serve.engine.drafter._REMEMBERED", 10)
    drafter = Drafter(3)
    tokens = [1, 2, 3, 7, *range(10, 20)]
    draft(drafter, tokens)
    assert draft(drafter, [*tokens, 1, 2, 3]) == []
    assert draft(drafter, [*tokens, 1, 2, 3, 17, 18, 19]) == [1, 2, 3]


PROMPT = [40, 41, 42, 43, 44, 45] * 4


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def engines(request: pytest.FixtureRequest, tiny_model: Path) -> tuple[Engine, Engine]:
    model = tiny_model if request.param == "tiny" else bundled_model()
    return make_engine(model), make_engine(model, speculative_tokens=6)


def steps_of(engine: Engine, **params: Any) -> tuple[Completion, int]:
    before = engine.stats().steps_total
    completion = complete(engine, submit("r", PROMPT, **params))
    return completion, engine.stats().steps_total - before


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, "max_tokens": 60, "logprobs": 2, "ignore_eos": True},
        {"temperature": 0, "max_tokens": 60, "min_tokens": 40},
        {"seed": 4, "temperature": 0.3, "max_tokens": 60, "logprobs": 2},
        {"seed": 5, "top_k": 1, "max_tokens": 1},
        {"temperature": 0, "max_tokens": 60, "repetition_penalty": 1.3},
    ],
    ids=lambda params: ",".join(params),
)
def test_the_same_tokens(engines: tuple[Engine, Engine], params: dict[str, Any]) -> None:
    plain, speculative = engines
    expected, steps = steps_of(plain, **params)
    given, fewer = steps_of(speculative, **params)
    assert given == expected
    assert fewer <= steps


def test_fewer_steps(engines: tuple[Engine, Engine]) -> None:
    plain, speculative = engines
    params = {"temperature": 0, "max_tokens": 120, "ignore_eos": True}
    _, steps = steps_of(plain, **params)
    before = speculative.stats()
    _, fewer = steps_of(speculative, **params)
    after = speculative.stats()
    assert fewer < 0.9 * steps
    accepted = after.accepted_tokens_total - before.accepted_tokens_total
    assert 0 < accepted <= after.draft_tokens_total - before.draft_tokens_total
    assert fewer + accepted == steps


@pytest.mark.parametrize("where", [9, 10, 11, 12, 13])
def test_an_answer_may_end_within_a_draft(engines: tuple[Engine, Engine], where: int) -> None:
    plain, speculative = engines
    whole = complete(plain, submit("r", PROMPT, temperature=0, max_tokens=40, ignore_eos=True))
    stop = {"stop_token_ids": (whole.token_ids[where],), "min_tokens": where}
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, **stop}
    assert steps_of(speculative, **params)[0] == steps_of(plain, **params)[0]


def test_states_kept_after_drafts_are_right(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, speculative_tokens=6, prefix_cache_memory=1 << 20)
    plain = make_engine(tiny_model)
    request = submit("r", PROMPT, temperature=0, max_tokens=30, ignore_eos=True)
    ids = [*PROMPT, *complete(engine, request).token_ids]
    for cut in range(len(PROMPT), len(ids) + 1):
        again = submit("s", [*ids[:cut], 9], seed=1, max_tokens=3, logprobs=1)
        assert complete(engine, again) == complete(plain, again)
    assert engine.stats().accepted_tokens_total > 0


def test_parked_in_the_middle(tiny_model: Path) -> None:
    requests = [submit(f"r{i}", PROMPT[i:], temperature=0, max_tokens=30, ignore_eos=True) for i in range(4)]
    plain = make_engine(tiny_model)
    alone = {request.request_id: complete(plain, request) for request in requests}
    engine = make_engine(tiny_model, speculative_tokens=4, max_rows=2, quantum=2)
    assert drive(engine, [Visit(request) for request in requests]) == alone
    assert engine.scheduler.preemptions > 5
    assert engine.stats().accepted_tokens_total > 0
