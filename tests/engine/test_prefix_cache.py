"""The prefix cache: what is kept, what is found, what goes first; and what an engine saves by it."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import RequestFailed, Submit
from lattice_serve.engine.prefix_cache import PrefixCache, cache_budgets, intervals
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.shares import Shares
from tests.engine.harness import Visit, assert_idle, complete, drive, make_engine, submit

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


def test_a_row_that_is_lent_is_copied_later() -> None:
    cache = PrefixCache([("cpu", 1000)])
    state = row(1)
    snapshot = cache.put("", [1, 2], state, torch.ones(3), lent=True)
    assert snapshot is not None
    assert snapshot.row is state
    assert found(cache, [1, 2]) == 2
    cache.settle(snapshot)
    state.zero_()
    assert snapshot.row.tolist() == row(1).tolist()
    cache.settle(snapshot)
    assert snapshot.row.all()
    cache.check()


@pytest.mark.parametrize("tiers", [1, 2])
def test_a_row_that_is_lent_may_be_pushed_out(tiers: int) -> None:
    """To the next tier, which has a copy then; or for good, and then nothing is copied any more."""
    cache = PrefixCache([("cpu", ROW + 8)] * tiers)
    state = row(1)
    first = cache.put("", [1], state, lent=True)
    cache.put("", [2], row(2))
    assert first is not None
    assert (first in cache, first.row is state) == ((tiers == 2), (tiers == 1))
    cache.settle(first)
    state.zero_()
    assert (found(cache, [1, 0]) == 1) == (tiers == 2)
    assert first.row.all() == (tiers == 2)


def test_what_follows_a_snapshot_is_enough() -> None:
    cache = PrefixCache([("cpu", 1000)])
    first = cache.put("", [1, 2], row(1))
    second = cache.put("", [3], row(2), after=first)
    assert second is not None
    assert second.length == 3
    assert cache.put("", [1, 2, 3], row(3)) is second
    assert cache.put("", [], row(3), torch.ones(3), after=second) is not second, "it has logits now"
    assert [found(cache, ids) for ids in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 4], [3, 4])] == [3, 3, 2, None]


def test_memory_of_what_went_is_used_again() -> None:
    """What was held of it shows another state then, and cannot be found."""
    cache = PrefixCache([("cpu", ROW + 4)])
    snapshot = cache.put("", [1], row(1))
    assert snapshot is not None
    place = snapshot.row.data_ptr()
    for token in range(2, 20):
        snapshot = cache.put("", [token], row(token))
        assert snapshot is not None
        assert snapshot.row.data_ptr() == place
        assert snapshot.row.tolist() == row(token).tolist()
        assert (found(cache, [token, 0]), found(cache, [token - 1, 0])) == (1, None)


@pytest.mark.parametrize("tiers", [[1000], [400, 600]])
def test_a_tenant_pushes_out_its_own(tiers: list[int]) -> None:
    """Whatever one puts in, and under however many salts: another keeps its share, and uses what is free."""
    cache = PrefixCache([("cpu", budget) for budget in tiers])
    for i in range(9):
        cache.put("polite/", [1, i], row(i))
    for i in range(300):
        cache.put(f"greedy/{i % 7}", [2, i, i + 1], row(i))
        cache.check()
    # 44 bytes each, and more for the greedy one's tokens: half of 1000 bytes.
    assert [found(cache, [1, i, 9], "polite/") for i in range(9)] == [2] * 9
    assert len(cache) > 17
    for i in range(300):
        cache.put("polite/", [1, i], row(i))
    assert sum(found(cache, [1, i, 9], "polite/") == 2 for i in range(300)) in range(10, 13)
    cache.clear()
    for i in range(300):
        cache.put("greedy/", [2, i], row(i))
    assert len(cache) > 20, "alone it may have everything"
    cache.check()


def test_weights_part_the_cache() -> None:
    shares = Shares()
    shares.weigh("heavy", 3)
    cache = PrefixCache([("cpu", 1000)], shares=shares)
    for i in range(100):
        for tenant in ("heavy", "light"):
            cache.put(f"{tenant}/", [1, i], row(i))
    kept = [sum(found(cache, [1, i, 9], f"{t}/") == 2 for i in range(100)) for t in ("heavy", "light")]
    assert kept[0] == pytest.approx(3 * kept[1], abs=2)


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
    drive(cached, [Visit(Submit("r", array("i", [*PROMPT, 1, 1]), params, cache_points=(17, 40)))])
    assert ask(cached, [*PROMPT, 2, 2]) == (40, 2)
    assert ask(cached, [*PROMPT[:17], 2, 2]) == (17, 2)
    with pytest.raises(InvalidParameter, match="cache_points"):
        cached.submit(Submit("r", array("i", PROMPT), params, cache_points=(41,)))


def states(engine: Engine) -> dict[int, bytes]:
    """Bits of what is cached, by length."""
    found = [each for tier in engine.cache._tiers for each in tier.snapshots.values()]
    return {each.length: each.row.numpy().tobytes() for each in found}


def test_states_stay_in_their_rows_until_there_is_time(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cached.memory, "tidy", lambda idle: False)
        request = submit("r", PROMPT, max_tokens=5, temperature=0, ignore_eos=True)
        cached.submit(request)
        answer = []
        while cached.has_work:
            step = cached.step()
            answer += [output.token_id for output in step.outputs]
            assert step.stats.rows_used == step.stats.running
        cached.check_idle()
        assert cached.pool.used == 2, "the states after the prompt and after the answer"
        before = states(cached)
        assert sorted(before) == [40, 44]
        ids = [*PROMPT, *map(int, filter(None, answer)), 8, 9]
    assert_idle(cached)
    assert states(cached) == before
    assert ask(cached, ids) == (44, len(ids) - 44)


def test_rows_that_the_cache_has_are_for_those_who_come(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_model, prefix_cache_memory=1 << 20, max_rows=3)
    other = make_engine(tiny_model, max_rows=3)
    prompts = [[*PROMPT[:n], n] for n in range(1, 9)]
    requests = [submit(f"r{n}", ids, max_tokens=3, seed=n, ignore_eos=True) for n, ids in enumerate(prompts)]
    visits = [Visit(request, comes=place) for place, request in enumerate(requests)]
    expected = drive(other, visits)
    with monkeypatch.context() as patch:
        patch.setattr(engine.memory, "tidy", lambda idle: False)
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            engine.step()
        engine.check_idle()
        assert engine.pool.used > 0
    before = engine.cache.outcomes["hit"]
    assert drive(engine, visits) == expected
    assert engine.cache.outcomes["hit"] == before + len(prompts)


def test_an_answer_is_put_after_what_is_known(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the text: only new tokens are given to the tree. All of them, where what was known has gone."""
    given = []
    put = cached.cache.put

    def record(salt: str, ids: Any, *rest: Any, **options: Any) -> Any:
        given.append(len(ids))
        return put(salt, ids, *rest, **options)

    monkeypatch.setattr(cached.cache, "put", record)
    request = submit("r", PROMPT, max_tokens=5, temperature=0, ignore_eos=True)
    answer = complete(cached, request).token_ids
    assert given == [40, 4]
    given.clear()
    ids = [*PROMPT, *answer, 8, 9]
    assert ask(cached, ids) == (44, 3)
    assert given == [3, 2]
    given.clear()
    cached.submit(submit("r", ids, max_tokens=9, temperature=0, ignore_eos=True))
    cached.step()
    cached.memory.clear()
    while cached.has_work:
        cached.step()
    assert given == [55]
    assert ask(cached, [*ids, 1]) == (0, 48)


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
        drive(cached, [Visit(Submit("r", array("i", PROMPT), params, cache_salt=salt))])
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


def test_what_was_read_for_a_vector_takes_no_room(cached: Engine) -> None:
    complete(cached, submit("r", PROMPT, max_tokens=0, pooling="mean"))
    assert cached.stats().cache_entries == 0


def test_without_memory_nothing_is_kept(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, prefix_cache_memory=0)
    assert [ask(engine, PROMPT) for _ in range(2)] == [(0, 40), (0, 40)]
    assert engine.stats().cache_entries == 0


def test_a_request_for_no_tokens_warms_the_cache(cached: Engine) -> None:
    warm = Submit("w", array("i", PROMPT), SamplingParams(max_tokens=0), cache_points=(40,))
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


def test_all_that_tokens_begin_with_is_discarded() -> None:
    cache = PrefixCache([("cpu", 1000)])
    for ids in ([1], [1, 2], [1, 2, 3], [1, 9], [1, 2, 3, 4]):
        cache.put("", ids, row(1))
    cache.put("salt", [1, 2], row(1))
    cache.discard("", [1, 2, 3, 7])
    assert [found(cache, [*ids, 0]) for ids in ([1, 2], [1, 2, 3], [1, 9], [1, 2, 3, 4])] == [None, None, 2, 4]
    cache.discard("nobody's", [1])
    cache.discard("salt", [1, 2])
    assert len(cache) == 2
    cache.check()


def spoil(engine: Engine, part: str) -> None:
    for snapshot in engine.cache.snapshots():
        spoiled = getattr(snapshot, part)
        if spoiled is not None:
            spoiled.fill_(float("nan"))


def test_a_cached_state_that_is_no_number_is_dropped_and_the_prompt_run(tiny_model: Path) -> None:
    """The request that meets it does not fail, nor does the next one."""
    engine = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    prompt = [3 + 7 * i % 100 for i in range(40)]
    asked = submit("asked", prompt, max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    longer = submit("longer", [*prompt, 9, 8], max_tokens=5, seed=3, temperature=1.0, ignore_eos=True)
    bystander = submit("bystander", [5, 6, 7], max_tokens=30, seed=4, temperature=1.0, ignore_eos=True)
    expected = {each.request_id: complete(engine, each) for each in (asked, longer, bystander)}
    for requests in ([asked], [asked, longer, bystander]):
        spoil(engine, "logits")
        results = drive(engine, [Visit(request) for request in requests])
        assert results == {each.request_id: expected[each.request_id] for each in requests}
    new = submit("new", [*prompt, 9, 8, 4], max_tokens=5, seed=3, temperature=1.0, ignore_eos=True)
    spoil(engine, "row")
    answer = complete(engine, new)
    assert (answer, answer.cached_tokens) == (complete(make_engine(tiny_model), new), 0)
    assert complete(engine, new).cached_tokens == 43


def test_who_has_had_a_token_before_it_shows_fails_alone_and_once(tiny_model: Path, shared_engine: Engine) -> None:
    engine = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    asked, bystander = submit("r", range(40), max_tokens=5, seed=1), submit("b", [5, 6], max_tokens=30, seed=4)
    expected = [complete(engine, asked), complete(shared_engine, bystander)]
    spoil(engine, "row")
    results = drive(engine, [Visit(bystander), Visit(asked, comes=20)])
    failed = results["r"]
    assert isinstance(failed, RequestFailed)
    assert failed.error == "NumericalError"
    assert results["b"] == expected[1]
    assert complete(engine, asked) == expected[0]


def test_a_request_that_goes_wrong_by_itself_leaves_nothing_of_it_in_the_cache(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    engine.submit(Submit("r", array("i", range(40)), SamplingParams(max_tokens=9), cache_points=(8, 20)))
    while engine.has_work:
        for sequence in engine.scheduler.running:
            if sequence.row is not None and sequence.computed >= 8:
                engine.pool.memory[sequence.row].fill_(float("nan"))
        failures = engine.step().failures
    assert [failed.error for failed in failures] == ["NumericalError"]
    assert len(engine.cache) == 0
    assert_idle(engine)
