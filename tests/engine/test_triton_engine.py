"""The real engine on Triton's kernels: the answers of the torch reference, alone and in any company."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.shares import ANYBODY
from tests.engine.backends import engine_of, torch_backend, triton_backend
from tests.engine.harness import Visit, complete, drive, submit
from tests.tiny import init_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_tiny_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


REQUESTS = [
    submit("greedy", range(2, 13), max_tokens=3, temperature=0, ignore_eos=True),
    submit("drawn", [7, 300, 9], max_tokens=4, seed=5, ignore_eos=True),
    submit("scored", range(40, 46), max_tokens=2, seed=6, top_p=0.9, logprobs=2, prompt_logprobs=1, ignore_eos=True),
]


def test_answers_are_those_of_torch_alone_and_together(model: Path) -> None:
    reference = engine_of(model, torch_backend)
    engine = engine_of(model, triton_backend, max_rows=3, max_step_tokens=12)
    visits = [Visit(request, comes=place) for place, request in enumerate(REQUESTS)]
    together = drive(engine, visits)
    for request in REQUESTS:
        truth, mine = complete(reference, request), together[request.request_id]
        assert isinstance(mine, Completion)
        assert mine.token_ids == truth.token_ids
        assert mine.text == truth.text
        assert [entry.logprob for entry in mine.logprobs] == pytest.approx(
            [entry.logprob for entry in truth.logprobs], abs=1e-4
        )
        assert [entry and entry.logprob for entry in mine.prompt_logprobs or []] == pytest.approx(
            [entry and entry.logprob for entry in truth.prompt_logprobs or []], abs=1e-4
        )
        assert complete(engine, request) == mine, "the company of others changed a bit"


def test_a_parked_sequence_goes_on_as_if_nothing_had_been(model: Path) -> None:
    engine = engine_of(model, triton_backend, max_rows=1, max_step_tokens=8)
    first, second = (submit(name, range(2, 8), max_tokens=3, seed=1, ignore_eos=True, logprobs=0) for name in "ab")
    engine.scheduler.quantum = 2
    results = drive(engine, [Visit(first), Visit(second, comes=1)])
    assert engine.scheduler.preemptions > 0
    assert results["a"] == results["b"] == complete(engine, first)


def test_what_is_cached_has_the_bits_of_what_is_not(model: Path) -> None:
    """A prompt again, one that leaves it in the middle of a chunk, and the next turn of a conversation."""
    first = submit("first", range(2, 13), max_tokens=2, seed=1, logprobs=1, ignore_eos=True)
    prompts = {"again": [*range(2, 13)], "other": [*range(2, 11), 7, 7, 7], "third": [*range(2, 11), 8, 8]}
    cold, warm = (engine_of(model, triton_backend, prefix_cache_memory=size) for size in (0, 1 << 20))
    turn = [*range(2, 13), *complete(warm, first).token_ids, 5, 6]
    for name, ids in (prompts | {"turn": turn}).items():
        request = submit(name, ids, max_tokens=2, seed=1, logprobs=1, ignore_eos=True)
        truth, mine = complete(cold, request), complete(warm, request)
        assert (mine.token_ids, mine.logprobs) == (truth.token_ids, truth.logprobs), name
    assert warm.cache.outcomes == {"new": 1, "hit": 3, "no_snapshot": 1}


def test_a_point_to_cache_is_the_multiple_before_it(model: Path) -> None:
    engine = engine_of(model, triton_backend, prefix_cache_memory=1 << 20)
    request = msgspec.structs.replace(submit("a", range(2, 13), max_tokens=0), cache_points=[3, 7])
    drive(engine, [Visit(request)])
    snapshot, _ = engine.cache.find(ANYBODY, [*range(2, 9), 90, 91])
    assert snapshot is not None
    assert snapshot.length == 4


def test_drafts_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="speculative_tokens"):
        engine_of(model, triton_backend, speculative_tokens=4)


def test_steps_too_small_for_a_chunk_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="max_step_tokens is 6: give 7 or more"):
        engine_of(model, triton_backend, max_rows=4, max_step_tokens=6)
