"""The engine step by step: how answers end, what they carry, and that what goes wrong with one stays with it."""

from __future__ import annotations

import dataclasses
import gc
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import torch

from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import CheckpointError, ConfigError, InvalidParameter, Overloaded
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import EngineStats, Pooling, RequestFailed
from lattice_serve.engine.models.lattice.model import DenseOps, LatticeForCausalLM
from lattice_serve.engine.sequence import Sequence, Status
from lattice_serve.engine.state_pool import MAX_ROWS
from lattice_serve.engine.weights import load_model
from lattice_serve.kernels.decoder import cpu as decoder
from tests.engine.harness import Visit, assert_idle, complete, drive, live, make_engine, submit
from tests.tiny import VOCAB_SIZE, init_tiny_model

THE = 693
"""Token of "the"."""
EOS = 1
PROMPT = [5, 300, 17, 4000, 8]


def only(*token_ids: int) -> dict[int, float]:
    """A logit_bias that leaves no other choice than these."""
    return dict.fromkeys(token_ids, 100.0)


def answer(engine: Engine, **params: Any) -> Completion:
    return complete(engine, submit("r", PROMPT, **params))


def test_nothing_is_held_of_a_request_that_has_ended(engine: Engine) -> None:
    complete(engine, submit("held", PROMPT, max_tokens=4, ignore_eos=True))
    gc.collect()
    held = [each for each in gc.get_objects() if type(each) is Sequence and each.request_id == "held"]
    assert not held


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_end_with_a_character_that_is_never_complete(engine: Engine, include: bool) -> None:
    (part,) = (i for i in range(engine.tokenizer.pieces) if engine.tokenizer.token_bytes(i) == b"\xe2")
    params = {"logit_bias": only(part), "max_tokens": 1, "include_stop": include}
    assert answer(engine, **params).finish_reason == "length"
    stopped = answer(engine, **params, stop=("\ufffd",))
    assert (stopped.finish_reason, stopped.stop_reason, stopped.text) == ("stop", "\ufffd", "\ufffd" * include)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> LatticeForCausalLM:
    model = load_model(tiny_model, dtype=torch.float32).double()
    assert isinstance(model, LatticeForCausalLM)
    return model


@pytest.fixture(scope="module")
def exact_engine(tiny_model: Path) -> Engine:
    """One that rounds no activation, whatever this processor multiplies with."""
    with patch.object(decoder, "available_products", lambda _: ("float32",)):
        return make_engine(tiny_model)


class TestEnds:
    def test_length(self, engine: Engine) -> None:
        completion = answer(engine, max_tokens=7, ignore_eos=True)
        assert len(completion.token_ids) == 7
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert completion.text == engine.tokenizer.decode(completion.token_ids)

    def test_end_of_text(self, engine: Engine) -> None:
        completion = answer(engine, max_tokens=7, logit_bias=only(EOS))
        assert completion.token_ids == [EOS]
        assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", None)

    def test_end_of_text_ignored(self, engine: Engine) -> None:
        completion = answer(engine, max_tokens=3, logit_bias=only(EOS), ignore_eos=True)
        assert completion.token_ids == [EOS] * 3
        assert (completion.text, completion.finish_reason) == ("", "length")

    def test_stop_token(self, engine: Engine) -> None:
        completion = answer(engine, max_tokens=7, logit_bias=only(THE), stop_token_ids=(9, THE))
        assert completion.token_ids == [THE]
        assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", THE)

    @pytest.mark.parametrize("end", [{}, {"stop_token_ids": (THE,)}], ids=["end-of-text", "stop token"])
    def test_min_tokens_come_first(self, engine: Engine, end: dict[str, Any]) -> None:
        bias = only(THE if end else EOS)
        completion = answer(engine, max_tokens=9, min_tokens=4, logit_bias=bias, **end)
        *before, last = completion.token_ids
        assert len(before) == 4
        assert last in bias
        assert not {EOS, last} & set(before)
        assert completion.finish_reason == "stop"

    @pytest.mark.parametrize(
        ("fields", "tokens", "text"),
        [({}, 2, "th"), ({"include_stop": True}, 2, "theth"), ({"min_tokens": 3}, 3, "theth")],
    )
    def test_stop_string_over_tokens(self, engine: Engine, fields: dict[str, Any], tokens: int, text: str) -> None:
        completion = answer(engine, max_tokens=9, logit_bias=only(THE), stop=("zz", "eth"), **fields)
        assert completion.token_ids == [THE] * tokens
        assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", "eth")

    def test_text_held_back_comes_with_the_last_token(self, engine: Engine) -> None:
        completion = answer(engine, max_tokens=2, logit_bias=only(THE), stop=("hethezz",))
        assert (completion.text, completion.finish_reason) == ("thethe", "length")

    def test_half_a_character_is_a_replacement_character(self, engine: Engine) -> None:
        first, _ = engine.tokenizer.encode("é")
        completion = answer(engine, max_tokens=1, logit_bias=only(first))
        assert completion.text == "\ufffd"


class TestSampling:
    def test_an_answer_is_its_seeds(self, engine: Engine) -> None:
        one, same, other = (answer(engine, max_tokens=8, seed=seed) for seed in (1, 1, 2))
        assert one == same
        assert one.token_ids != other.token_ids

    def test_without_a_seed_every_answer_is_another(self, engine: Engine) -> None:
        assert answer(engine, max_tokens=8).token_ids != answer(engine, max_tokens=8).token_ids

    def test_greedy_follows_the_model(self, engine: Engine) -> None:
        completion = answer(engine, max_tokens=6, temperature=0, ignore_eos=True, logprobs=1)
        assert completion.token_ids == [entry.top[0][0] for entry in completion.logprobs]

    def test_penalties_see_prompt_and_answer(self, engine: Engine) -> None:
        bias = {THE: 80.0, 9: 60.0, PROMPT[0]: 100.0}
        completion = answer(engine, max_tokens=3, temperature=0, repetition_penalty=100, logit_bias=bias)
        assert completion.token_ids[:2] == [THE, 9], "the token of the prompt is punished from the start"
        assert completion.token_ids[2] not in bias

    def test_logprobs_are_those_of_the_chosen_and_the_likeliest(self, engine: Engine) -> None:
        completion = answer(engine, max_tokens=5, seed=3, ignore_eos=True, logprobs=4)
        assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
        for entry in completion.logprobs:
            values = [value for _, value in entry.top]
            assert len(values) == 4
            assert values == sorted(values, reverse=True)
            assert entry.logprob <= values[0] < 0
        assert answer(engine, max_tokens=5).logprobs == []


class TestScoring:
    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
    def test_a_prompt_is_scored_as_the_model_says(
        self, exact_engine: Engine, reference: LatticeForCausalLM, length: int
    ) -> None:
        """Against the dense torch forward pass in float64; more tokens than a step takes come in pieces."""
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        completion = complete(exact_engine, submit("r", ids, max_tokens=0, prompt_logprobs=2))
        assert (completion.token_ids, completion.text, completion.finish_reason) == ([], "", "length")
        assert completion.prompt_logprobs is not None
        first, *rest = completion.prompt_logprobs
        assert first is None
        assert [entry.token_id for entry in rest if entry] == ids[1:]
        truth = reference(torch.tensor([ids]))[0][0].log_softmax(dim=-1)
        for place, entry in enumerate(rest):
            assert entry is not None
            assert entry.logprob == pytest.approx(truth[place, ids[place + 1]].item(), abs=1e-4)
            assert len(entry.top) == 2
            assert entry.top[0][1] == pytest.approx(truth[place].max().item(), abs=1e-4)

    def test_echo_scores_and_goes_on(self, engine: Engine) -> None:
        scored = answer(engine, max_tokens=0, prompt_logprobs=1).prompt_logprobs
        plain = answer(engine, max_tokens=4, seed=1)
        both = answer(engine, max_tokens=4, seed=1, prompt_logprobs=1)
        assert both == dataclasses.replace(plain, prompt_logprobs=scored)

    def test_scores_of_an_answer_are_its_logprobs(self, engine: Engine) -> None:
        """Decode and prefill compute the same."""
        completion = answer(engine, max_tokens=20, seed=4, logprobs=0, ignore_eos=True)
        scored = complete(
            engine, submit("r", PROMPT + completion.token_ids, max_tokens=0, prompt_logprobs=0)
        ).prompt_logprobs
        assert scored is not None
        assert scored[len(PROMPT) :] == completion.logprobs


class TestEmbedding:
    @pytest.mark.parametrize("length", [1, 16, 50])
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_a_text_is_what_the_model_makes_of_it(
        self, exact_engine: Engine, reference: LatticeForCausalLM, length: int, pooling: Pooling
    ) -> None:
        """Against the dense torch forward pass in float64; more tokens than a step takes come in pieces."""
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        completion = complete(exact_engine, submit("r", ids, max_tokens=0, pooling=pooling))
        assert (completion.token_ids, completion.finish_reason) == ([], "length")
        tokens = torch.tensor([ids])
        hidden = reference.hidden(tokens, DenseOps(reference, reference.initial_state(1)))[0]
        truth = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
        assert completion.embedding == pytest.approx(truth.tolist(), abs=1e-4)

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_neither_the_cut_nor_the_company_shows(self, tiny_model: Path, pooling: Pooling) -> None:
        request = submit("r", range(37), max_tokens=0, pooling=pooling)
        whole = complete(make_engine(tiny_model, max_step_tokens=64), request)
        assert len(whole.embedding or []) == 32
        for size in (4, 5, 23):
            engine = make_engine(tiny_model, max_step_tokens=size, prefix_cache_memory=1 << 20)
            for _ in range(2):  # the second finds the prompt in the cache, and must not use it
                results = drive(engine, [Visit(submit("other", range(9), max_tokens=9)), Visit(request)])
                assert results["r"] == whole

    def test_with_an_answer_and_scores(self, engine: Engine) -> None:
        embedded = answer(engine, max_tokens=0, pooling="mean").embedding
        both = answer(engine, max_tokens=4, seed=1, prompt_logprobs=1, pooling="mean")
        assert both.embedding == embedded
        assert dataclasses.replace(both, embedding=None) == answer(engine, max_tokens=4, seed=1, prompt_logprobs=1)


LONG = submit("long", range(100), max_tokens=30, seed=5, ignore_eos=True)
OTHERS = [submit(f"other-{i}", PROMPT[i:], max_tokens=12 + i, seed=i, logprobs=1, ignore_eos=True) for i in range(3)]


@pytest.fixture(scope="module")
def alone(shared_engine: Engine) -> dict[str, Completion]:
    """The answers to `OTHERS`, each without the rest."""
    return {request.request_id: complete(shared_engine, request) for request in OTHERS}


class TestAbort:
    @pytest.mark.parametrize(
        ("settings", "leaves", "phase", "computed"),
        [
            ({"max_rows": 3}, 3, Status.WAITING, range(1)),
            ({"max_rows": 4}, 3, Status.RUNNING, range(1, 99)),
            ({"max_rows": 4}, 20, Status.RUNNING, range(100, 130)),
            ({"max_rows": 1, "quantum": 2}, 9, Status.PARKED, range(1, 99)),
        ],
        ids=["waiting", "prefill", "decode", "parked"],
    )
    def test_in_any_phase_frees_the_row_and_bothers_nobody(
        self,
        tiny_model: Path,
        alone: dict[str, Completion],
        settings: dict[str, Any],
        leaves: int,
        phase: Status,
        computed: range,
    ) -> None:
        engine = make_engine(tiny_model, **settings)

        def check_phase(number: int) -> None:
            if number == leaves:
                sequence = live(engine, "long")
                assert sequence.status is phase
                assert sequence.computed in computed

        visits = [*map(Visit, OTHERS), Visit(LONG, comes=1, leaves=leaves)]
        assert drive(engine, visits, check_phase) == alone

    def test_frees_at_once(self, engine: Engine) -> None:
        engine.submit(LONG)
        engine.step()
        assert engine.pool.used == 1
        engine.abort("long")
        assert_idle(engine)
        engine.submit(LONG)  # the id is free again
        engine.abort("long")

    def test_of_an_unknown_request_is_nothing(self, engine: Engine) -> None:
        engine.abort("nobody")


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "fields", "param", "message"),
        [
            ([], {}, "prompt", "prompt is empty"),
            ([3, -1], {}, "prompt", "token id -1: give ids from 0 to 4095"),
            ([3, VOCAB_SIZE], {}, "prompt", "token id 4096"),
            ([2**31 - 1], {}, "prompt", "token id"),
            ([3], {"stop_token_ids": (3, VOCAB_SIZE)}, "stop_token_ids", "token id 4096"),
            ([3], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias", "token id 4096"),
            ([3], {"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ],
        ids=str,
    )
    def test_the_field_at_fault_is_named(
        self, engine: Engine, prompt: list[int], fields: dict[str, Any], param: str, message: str
    ) -> None:
        with pytest.raises(InvalidParameter, match=message) as caught:
            engine.submit(submit("r", prompt, **fields))
        assert caught.value.param == param
        assert_idle(engine)

    def test_a_second_request_of_the_same_id(self, engine: Engine) -> None:
        expected = complete(engine, OTHERS[0])
        engine.submit(OTHERS[0])
        with pytest.raises(InvalidParameter, match="other-0 runs already"):
            engine.submit(OTHERS[0])
        engine.abort(OTHERS[0].request_id)
        assert complete(engine, OTHERS[0]) == expected

    def test_more_than_may_wait(self, tiny_model: Path, alone: dict[str, Completion]) -> None:
        engine = make_engine(tiny_model, max_rows=1, max_waiting=2)

        def one_more(number: int) -> None:
            if number == 1:
                with pytest.raises(Overloaded):
                    engine.submit(LONG)

        assert drive(engine, [Visit(request) for request in OTHERS], one_more) == alone


class TestNumbersThatGoWrong:
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    @pytest.mark.parametrize(
        ("scored", "step", "computed"),
        [(False, 3, range(1, 99)), (True, 3, range(1, 99)), (False, 20, range(100, 130))],
    )
    def test_fail_one_request_alone(
        self, engine: Engine, alone: dict[str, Completion], poison: float, scored: bool, step: int, computed: range
    ) -> None:
        params = msgspec.structs.replace(LONG.params, prompt_logprobs=0 if scored else None)
        long = msgspec.structs.replace(LONG, params=params)
        rows = []

        def spoil(number: int) -> None:
            if number == step:
                sequence = live(engine, "long")
                assert sequence.row is not None
                assert sequence.computed in computed
                engine.pool.memory[sequence.row, 0] = poison
                rows.append(sequence.row)

        results = drive(engine, [Visit(long), *map(Visit, OTHERS)], spoil)
        failed = results.pop("long")
        assert isinstance(failed, RequestFailed)
        assert failed.error == "NumericalError"
        assert "not finite" in failed.message
        assert results == alone
        # `drive` has found every row scrubbed; what runs in that one next is none the worse.
        again = {request.request_id: complete(engine, request) for request in OTHERS}
        assert again == alone

    def test_a_poisoned_neighbour_that_is_parked_and_restored(
        self, tiny_model: Path, alone: dict[str, Completion]
    ) -> None:
        engine = make_engine(tiny_model, max_rows=2, quantum=2)

        def spoil(number: int) -> None:
            if number == 2:
                row = live(engine, "long").row
                assert row is not None
                engine.pool.memory[row].fill_(math.nan)

        results = drive(engine, [Visit(LONG), *map(Visit, OTHERS)], spoil)
        assert isinstance(results.pop("long"), RequestFailed)
        assert results == alone
        assert engine.stats().preemptions_total > 0


class TestRows:
    def test_come_from_a_budget_of_memory(self, tiny_model: Path) -> None:
        row = make_engine(tiny_model).info.bytes_per_row

        def rows(state_memory: int, **settings: Any) -> int:
            engine = make_engine(tiny_model, max_rows=None, state_memory=state_memory, **settings)
            assert engine.pool.nbytes == engine.info.rows * row <= state_memory
            return engine.info.rows

        assert rows(row) == 1
        assert rows(3 * row - 1) == 2
        assert rows(3 * row) == 3
        assert rows(1000 * row) == 16, "each may decode a token in a step"
        assert rows(1000 * row, max_step_tokens=512) == MAX_ROWS
        with pytest.raises(
            ConfigError, match=f"state_memory is {row - 1:,} bytes, but one state row takes {row:,}"
        ) as e:
            rows(row - 1)
        assert e.value.param == "state_memory"

    def test_a_step_of_one_token_is_enough(self, tiny_model: Path, alone: dict[str, Completion]) -> None:
        engine = make_engine(tiny_model, max_rows=1, max_step_tokens=1)
        assert_idle(engine)
        assert drive(engine, [Visit(request) for request in OTHERS]) == alone

    def test_a_tokenizer_of_another_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="4096 pieces"):
            make_engine(init_tiny_model(tmp_path / "other", vocab_size=VOCAB_SIZE - 1))


class TestStats:
    def test_start_at_nothing(self, tiny_model: Path) -> None:
        assert make_engine(tiny_model).stats() == EngineStats(rows=4)

    def test_add_up(self, tiny_model: Path) -> None:
        engine = make_engine(tiny_model, max_rows=2, quantum=3)
        seen: list[EngineStats] = []
        results = drive(
            engine, [Visit(LONG), *map(Visit, OTHERS)], lambda number: seen.append(engine.stats()) if number else None
        )
        requests = [LONG, *OTHERS]
        generated = sum(request.params.max_tokens for request in requests)
        prompts = sum(len(request.prompt_ids) for request in requests)
        assert results.keys() == {request.request_id for request in requests}
        end = engine.stats()
        assert (end.running, end.waiting, end.rows_used, end.preempted) == (0, 0, 0, 0)
        assert (end.prompt_tokens_total, end.generation_tokens_total) == (prompts, generated)
        assert end.steps_total == len(seen)
        # The last token of an answer is not run.
        assert sum(stats.step_tokens for stats in seen) == prompts + generated - len(requests)
        assert {(stats.running, stats.rows_used) for stats in seen} == {(0, 0), (1, 1), (2, 2)}
        assert {stats.preempted for stats in seen} == {0, 1, 2}
        assert end.preemptions_total > 4
        totals = [
            (stats.steps_total, stats.prompt_tokens_total, stats.generation_tokens_total, stats.preemptions_total)
            for stats in seen
        ]
        assert totals == sorted(totals)

    def test_the_first_output_says_how_long_it_took(self, engine: Engine) -> None:
        engine.submit(OTHERS[0])
        outputs = [output for _ in range(12) for output in engine.step().outputs]
        for name in ("queue_seconds", "prefill_seconds"):
            first, *rest = [getattr(output, name) for output in outputs]
            assert first >= 0
            assert rest == [None] * 11
