"""`LLM`: the engine in the caller's process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import CheckpointError, ConfigError, InvalidParameter, NumericalError
from lattice_serve.engine.llm import LLM, Completion, Prompt
from lattice_serve.engine.sampling import Grammar, SamplingParams
from lattice_serve.engine.weights import bundled_model
from tests.engine.harness import assert_idle, complete, submit

PARAMS = SamplingParams(max_tokens=6, seed=3, logprobs=1, ignore_eos=True)
PROMPTS: list[Prompt] = ["Once upon a time", [5, 4095, 17], "It was", " a longer one: " * 9, [8], "\u00e9", [1, 2]]


@pytest.fixture(scope="module")
def made(tiny_model: Path) -> LLM:
    """Takes three requests at a time, one of them waiting, and answers them out of order."""
    return LLM(tiny_model, max_rows=2, max_waiting=1, max_step_tokens=8)


@pytest.fixture
def inner(made: LLM) -> Engine:
    return made._engine


@pytest.fixture
def llm(made: LLM, inner: Engine) -> Any:
    yield made
    assert_idle(inner)


@pytest.fixture(scope="module")
def alone(shared_engine: Engine) -> list[Completion]:
    """The answers to `PROMPTS` with `PARAMS`, one at a time."""
    encode = shared_engine.tokenizer.encode
    ids = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in PROMPTS]
    return [complete(shared_engine, submit("r", i, **_fields(PARAMS))) for i in ids]


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def test_answers_come_in_the_order_of_the_prompts(llm: LLM, alone: list[Completion]) -> None:
    assert llm.generate(PROMPTS, PARAMS) == alone
    assert llm.generate(PROMPTS[::-1], PARAMS) == alone[::-1], "and a second time, with the same engine"


@pytest.mark.parametrize("place", [0, 1])
def test_one_prompt_is_one_answer(llm: LLM, alone: list[Completion], place: int) -> None:
    assert llm.generate(PROMPTS[place], PARAMS) == [alone[place]]


def test_text_is_its_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Once upon")
    assert llm.generate("Once upon", PARAMS) == llm.generate(ids, PARAMS) == llm.generate([ids], PARAMS)


def test_params_for_all_for_each_and_for_nobody(llm: LLM, alone: list[Completion]) -> None:
    each = [SamplingParams(max_tokens=n, seed=3, logprobs=1, ignore_eos=True) for n in (2, 6, 1)]
    answers = llm.generate(PROMPTS[:3], each)
    assert [answer.token_ids for answer in answers] == [alone[i].token_ids[:n] for i, n in enumerate((2, 6, 1))]
    assert len(llm.generate("x")[0].token_ids) <= SamplingParams().max_tokens
    with pytest.raises(InvalidParameter, match="2 params for 3 prompts") as caught:
        llm.generate(PROMPTS[:3], each[:2])
    assert caught.value.param == "params"


def test_more_grammars_than_may_wait_to_be_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattice_serve.engine.grammar.MAX_PENDING", 1)
    params = [SamplingParams(max_tokens=9, grammar=Grammar.choice([word])) for word in ("one", "two", "three", "four")]
    assert [answer.text for answer in llm.generate(["x"] * 4, params)] == ["one", "two", "three", "four"]


def test_nothing_to_do(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_the_progress_bar_can_be_left_out(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS[:3], PARAMS, progress=False)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS[:3], PARAMS)
    assert "generate: 100%" in (bar := capsys.readouterr().err)
    assert "3/3" in bar


@pytest.mark.parametrize("bad", [[], [4096], "\ud800"], ids=ascii)
@pytest.mark.parametrize("place", [0, 6])
def test_a_bad_prompt_is_said_before_anything_runs(llm: LLM, inner: Engine, bad: Any, place: int) -> None:
    prompts = list(PROMPTS)
    prompts[place] = bad
    before = inner.stats()
    with pytest.raises(InvalidParameter) as caught:
        llm.generate(prompts, PARAMS)
    assert caught.value.param == "prompt"
    assert inner.stats() == before


def test_texts_and_single_ids_are_no_list_of_prompts(llm: LLM) -> None:
    prompts: Any = ["Once", 5]
    with pytest.raises(InvalidParameter):
        llm.generate(prompts, PARAMS)


def test_a_request_that_fails_raises_and_leaves_the_engine_usable(
    llm: LLM, inner: Engine, alone: list[Completion]
) -> None:
    stream = llm.stream(PROMPTS[0], PARAMS)
    next(stream)
    inner.pool.memory[0].fill_(math.nan)
    with pytest.raises(NumericalError, match="not finite"):
        next(stream)
    assert_idle(inner)
    assert llm.generate(PROMPTS, PARAMS) == alone


def test_a_stream_is_the_answer_token_by_token(llm: LLM, alone: list[Completion]) -> None:
    completion = Completion(alone[0].prompt_ids)
    for output in llm.stream(PROMPTS[0], PARAMS):
        assert completion.finish_reason is None
        completion.add(output)
    assert completion == alone[0]


def test_a_stream_that_is_dropped_frees_its_state(llm: LLM, inner: Engine) -> None:
    stream = llm.stream("Once", SamplingParams(max_tokens=10**6))
    next(stream)
    assert inner.stats().rows_used == 1
    stream.close()  # type: ignore[attr-defined]
    assert_idle(inner)


def test_nothing_else_runs_beside_an_open_stream(llm: LLM, alone: list[Completion]) -> None:
    stream = llm.stream(PROMPTS[0], PARAMS)
    completion = Completion(alone[0].prompt_ids)
    completion.add(next(stream))
    with pytest.raises(RuntimeError, match="close it"):
        llm.generate(PROMPTS, PARAMS)
    for output in stream:
        completion.add(output)
    assert completion == alone[0], "none of its tokens went elsewhere"


def test_score_is_the_logprob_of_each_token_after_the_first(llm: LLM) -> None:
    ids = [5, 17, 4000, 9, 9, 300, 2, 77, 1, 60]
    entries = llm.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=0))[0].prompt_logprobs
    assert entries is not None
    assert llm.score(ids) == [entry.logprob for entry in entries[1:] if entry]
    assert len(llm.score(ids)) == 9
    assert llm.score([7]) == []


def test_a_likely_text_scores_higher_with_the_bundled_model() -> None:
    llm = LLM()
    assert llm.info.model_name == bundled_model().name
    ids = llm.tokenizer.encode("She looked at him, and said nothing for a long time.")
    shuffled = [ids[i] for i in torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()]
    assert sum(llm.score(ids)) > sum(llm.score(shuffled)) + 10


@pytest.mark.parametrize(
    ("settings", "param"), [({"max_rows": 0}, "max_rows"), ({"rows": 3}, "rows"), ({"dtype": "int8"}, "dtype")]
)
def test_a_wrong_setting_is_named(tiny_model: Path, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError, match=param) as caught:
        LLM(tiny_model, **settings)
    assert caught.value.param == param


def test_fewer_tokens_a_step_than_rows_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_step_tokens \(3\) must be at least max_rows \(4\)"):
        LLM(tiny_model, max_rows=4, max_step_tokens=3)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM(tmp_path / "nothing")


def test_embed(llm: LLM) -> None:
    one, two = llm.embed(["It was a dark night", "She said"], progress=False)
    assert len(one) == len(two) == 32
    assert llm.embed("She said", progress=False) == [two]
    assert llm.embed("She said", "last", progress=False) != [two]
