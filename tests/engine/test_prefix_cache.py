"""The prefix cache: what is kept, what is found, what goes first; and what an engine saves by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import Submit
from lattice_serve.engine.prefix_cache import PrefixCache, cache_budgets, intervals
from lattice_serve.engine.sampling import SamplingParams
from tests.engine.harness import Visit, complete, drive, make_engine, submit

ROW = 40
"""Bytes of a state row in these tests."""


def row(value: int) -> Tensor:
    return torch.full((ROW // 4,), float(value))


def found(cache: PrefixCache, ids: list[int], salt: str = "") -> int | None:
    """Length of the snapshot that `ids` could go on from."""
    snapshot, _ = cache.find(salt, ids)
    cache.check()
    return None if snapshot is None else snapshot.length


def test_the_longest_prefix_is_found() -> None:
    cache = PrefixCache([("cpu", 1000)])
    cache.put("", [1, 2], row(1))
    cache.put("", [1, 2, 3, 4], row(2))
    assert [found(cache, ids) for ids in ([1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 9], [1], [9])] == [4, 2, 2, None, None]
    assert cache.outcomes == {"hit": 3, "no_snapshot": 1, "new": 1}
    snapshot, shared = cache.find("", [1, 2, 3, 9])
    assert snapshot is not None
    assert (snapshot.row.tolist(), shared) == (row(1).tolist(), 3)


def test_the_very_end_needs_logits() -> None:
    cache = PrefixCache([("cpu", 1000)])
    cache.put("", [1, 2], row(1))
    assert found(cache, [1, 2]) is None
    cache.put("", [1, 2], row(1), torch.ones(3))
    assert found(cache, [1, 2]) == 2
    cache.put("", [1, 2], row(1))
    assert found(cache, [1, 2]) == 2, "the logits were thrown away"
    assert len(cache) == 1


def test_what_is_kept_is_a_copy() -> None:
    cache = PrefixCache([("cpu", 1000)])
    state, logits = row(1), torch.ones(3)
    cache.put("", [1, 2], state, logits)
    state.zero_(), logits.zero_()
    snapshot, _ = cache.find("", [1, 2])
    assert snapshot is not None
    assert snapshot.logits is not None
    assert snapshot.row.all()
    assert snapshot.logits.all()


def test_salts_part() -> None:
    cache = PrefixCache([("cpu", 1000)])
    cache.put("a", [1], row(1))
    assert (found(cache, [1, 2], "b"), found(cache, [1, 2], "a")) == (None, 1)


def test_the_least_recently_used_go_first() -> None:
    cache = PrefixCache([("cpu", 3 * (ROW + 4))])
    for token in (1, 2, 3):
        cache.put("", [token], row(token))
    assert found(cache, [1, 0]) == 1
    cache.put("", [3], row(3))
    cache.put("", [4], row(4))
    assert [found(cache, [token, 0]) for token in (1, 2, 3, 4)] == [1, None, 1, 1]
    assert cache.nbytes == 3 * (ROW + 4)


def test_the_device_gives_way_to_the_host() -> None:
    cache = PrefixCache([("cpu", ROW), ("cpu", 2 * ROW + 3 * 4)])
    for token in (1, 2, 3):
        cache.put("", [token], row(token))
    assert [found(cache, [token, 0]) for token in (1, 2, 3)] == [1, 1, 1]
    assert cache.nbytes == 3 * (ROW + 4)
    cache.put("", [4], row(4))
    assert [found(cache, [token, 0]) for token in (1, 2, 3, 4)] == [None, 1, 1, 1]


def test_what_does_not_fit_is_not_kept() -> None:
    cache = PrefixCache([("cpu", ROW)])
    cache.put("", [1, 2], row(1))
    cache.check()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_intervals_grow() -> None:
    assert intervals(0, 5000) == [512, 1024, 2048, 4096]
    assert intervals(1024, 4096) == [2048]
    assert intervals(0, 512) == []


@pytest.fixture
def cached(tiny_model: Path) -> Engine:
    return make_engine(tiny_model, prefix_cache_memory=1 << 20)


PROMPT = [3 + 7 * i % 100 for i in range(40)]


def ask(engine: Engine, ids: list[int], max_tokens: int = 3) -> tuple[int, int]:
    """(cached tokens, prompt tokens run) of a request that is alone."""
    before = engine.stats().prompt_tokens_total
    completion = complete(engine, submit("r", ids, max_tokens=max_tokens, temperature=0, ignore_eos=True))
    return completion.cached_tokens, engine.stats().prompt_tokens_total - before


def test_the_same_prompt_runs_no_token(cached: Engine) -> None:
    assert ask(cached, PROMPT) == (0, 40)
    steps = cached.stats().steps_total
    assert ask(cached, PROMPT) == (40, 0)
    assert cached.stats().steps_total == steps + 3
    assert cached.stats().step_tokens == 1


def test_a_longer_prompt_runs_what_is_new(cached: Engine) -> None:
    assert ask(cached, PROMPT) == (0, 40)
    assert ask(cached, [*PROMPT, 1, 2]) == (40, 2)


def test_the_next_turn_runs_what_is_new(cached: Engine) -> None:
    request = submit("r", PROMPT, max_tokens=5, temperature=0, ignore_eos=True)
    answer = complete(cached, request).token_ids
    # The last token of an answer was chosen, but never run.
    assert ask(cached, [*PROMPT, *answer, 8, 9]) == (44, 3)


def test_a_shared_beginning_is_kept_at_its_second_sight(cached: Engine) -> None:
    assert ask(cached, [*PROMPT, 1, 1]) == (0, 42)
    assert ask(cached, [*PROMPT, 2, 2]) == (0, 42)
    assert ask(cached, [*PROMPT, 3, 3]) == (40, 2)


def test_callers_mark_places(cached: Engine) -> None:
    params = SamplingParams(max_tokens=1)
    drive(cached, [Visit(Submit("r", [*PROMPT, 1, 1], params, cache_points=(17, 40)))])
    assert ask(cached, [*PROMPT, 2, 2]) == (40, 2)
    assert ask(cached, [*PROMPT[:17], 2, 2]) == (17, 2)
    with pytest.raises(InvalidParameter, match="cache_points"):
        cached.submit(Submit("r", PROMPT, params, cache_points=(41,)))


def test_answers_to_one_prompt_run_it_once(cached: Engine) -> None:
    requests = [submit(f"r{i}", PROMPT, max_tokens=3, seed=i, ignore_eos=True) for i in range(9)]
    results = drive(cached, [Visit(request) for request in requests])
    assert cached.stats().prompt_tokens_total == 40
    assert len({tuple(result.token_ids) for result in results.values() if not hasattr(result, "error")}) > 3


def test_who_follows_goes_on_when_its_leader_leaves(cached: Engine) -> None:
    requests = [submit(f"r{i}", PROMPT, max_tokens=3, seed=i, ignore_eos=True) for i in range(3)]
    results = drive(cached, [Visit(requests[0], leaves=1), *map(Visit, requests[1:])])
    assert set(results) == {"r1", "r2"}
    assert cached.stats().prompt_tokens_total == 16 + 40


def test_keys_do_not_share(cached: Engine) -> None:
    params = SamplingParams(max_tokens=1)
    for salt in ("a", "b", "a"):
        drive(cached, [Visit(Submit("r", PROMPT, params, cache_salt=salt))])
    assert cached.stats().prompt_tokens_total == 80
    assert cached.stats().cache_outcomes == {"new": 2, "hit": 1}


def test_scored_prompts_are_run(cached: Engine) -> None:
    ask(cached, PROMPT)
    before = cached.stats().prompt_tokens_total
    scored = complete(cached, submit("r", PROMPT, max_tokens=1, prompt_logprobs=0))
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == 40
    assert cached.stats().prompt_tokens_total == before + 40
    assert cached.stats().cache_outcomes["bypass"] == 1


def test_without_memory_nothing_is_kept(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, prefix_cache_memory=0)
    assert [ask(engine, PROMPT) for _ in range(2)] == [(0, 40), (0, 40)]
    assert engine.stats().cache_entries == 0


def test_a_request_for_no_tokens_warms_the_cache(cached: Engine) -> None:
    warm = Submit("w", PROMPT, SamplingParams(max_tokens=0), cache_points=(40,))
    for runs in (40, 0):
        before = cached.stats().prompt_tokens_total
        drive(cached, [Visit(warm)])
        assert cached.stats().prompt_tokens_total - before == runs
    assert ask(cached, [*PROMPT, 1, 2]) == (40, 2)


@pytest.mark.parametrize(
    ("settings", "budgets"),
    [
        ({}, [("cpu", 1 << 30)]),
        ({"device": "cuda:1"}, [("cuda:1", 256 << 20), ("cpu", 1 << 30)]),
        ({"device": "cuda:1", "prefix_cache_device_memory": 0}, [("cpu", 1 << 30)]),
        ({"device": "cuda:1", "prefix_cache_memory": 0}, [("cpu", 0)]),
    ],
)
def test_a_gpu_keeps_the_states_used_last(settings: dict[str, Any], budgets: list[tuple[str, int]]) -> None:
    assert cache_budgets(EngineConfig(model=Path("m"), **settings)) == budgets
