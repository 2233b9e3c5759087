"""Answers that keep to grammars: of the bundled model, at any temperature, beside others that are free."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.llm import LLM, Completion
from lattice_serve.engine.messages import RequestFailed, StepOutputs
from lattice_serve.engine.sampling import Grammar, SamplingParams
from lattice_serve.engine.shares import ANYBODY
from lattice_serve.engine.weights import bundled_model
from tests.engine.harness import Visit, assert_idle, complete, drive, make_engine, submit, take_in
from tests.tiny import init_tiny_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "pets": {"type": "array", "items": {"enum": ["cat", "d\u00f6g", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]"
CHOICES = ["yes", "no", "no idea", "\u00e9t\u00e9", "\U0001f600!"]
SUM = 'root ::= term (" + " term){0,3}\nterm ::= [0-9]{1,3} | "(" [0-9] " * " [0-9] ")"'
SUM_REGEX = r"(\d{1,3}|\(\d \* \d\))( \+ (\d{1,3}|\(\d \* \d\))){0,3}"
GRAMMARS = [Grammar.json_schema(PERSON), Grammar.regex(DATE), Grammar.choice(CHOICES), Grammar.ebnf(SUM)]
PROMPT = "Once upon a time"


def keeps_to(grammar: Grammar, text: str) -> bool:
    if grammar is GRAMMARS[0]:
        jsonschema.validate(json.loads(text), PERSON)
        return True
    if grammar is GRAMMARS[2]:
        return text in CHOICES
    return re.fullmatch(DATE if grammar is GRAMMARS[1] else SUM_REGEX, text) is not None


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(bundled_model(), max_rows=8, threads=1)


@pytest.fixture
def inner(llm: LLM) -> Iterator[Engine]:
    yield llm._engine
    assert_idle(llm._engine)


def ask(llm: LLM, *params: SamplingParams) -> list[Completion]:
    return llm.generate([PROMPT] * len(params), params, progress=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_every_answer_keeps_to_its_grammar_and_free_ones_do_not_notice(llm: LLM, temperature: float) -> None:
    free = [SamplingParams(max_tokens=40, seed=seed, temperature=temperature) for seed in range(4)]
    bound = [
        SamplingParams(max_tokens=400, seed=seed, temperature=temperature, grammar=grammar, logprobs=2)
        for seed in range(4)
        for grammar in GRAMMARS
    ]
    answers = ask(llm, *free, *bound)
    assert answers[:4] == ask(llm, *free)
    for params, answer in zip(bound, answers[4:], strict=True):
        assert answer.finish_reason == "stop"
        assert params.grammar is not None
        assert keeps_to(params.grammar, answer.text), answer.text
    assert [ask(llm, params)[0] for params in bound[:5]] == answers[4:9], "the same alone"


def test_any_json_object(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=300, seed=seed, grammar=Grammar.json()) for seed in range(8)]
    ended = [answer.text for answer in ask(llm, *params) if answer.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -5, "maximum": 5},
            {"enum": ["a", 1, None, '\u00e9"\\']},
            {"const": {"k": [1]}},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"type": "string", "format": "date"},
        ]
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda items: {"anyOf": items}),
        inner.map(lambda item: {"type": "array", "items": item, "minItems": 1, "maxItems": 2}),
        st.dictionaries(st.sampled_from("xyz"), inner, min_size=1).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:1],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=25)
@given(schema=schemas, seed=st.integers(0, 99))
def test_answers_to_any_small_schema_are_valid(llm: LLM, schema: dict[str, Any], seed: int) -> None:
    (answer,) = ask(llm, SamplingParams(max_tokens=600, seed=seed, grammar=Grammar.json_schema(schema)))
    if answer.finish_reason == "stop":  # not all white space
        jsonschema.validate(json.loads(answer.text), schema)


class TestTheEnd:
    @pytest.mark.parametrize(
        "fields",
        [{}, {"ignore_eos": True}, {"min_tokens": 20}, {"stop_token_ids": (1, 5)}, {"logit_bias": {1: 100.0}}],
        ids=str,
    )
    def test_it_comes_where_nothing_could_follow(self, llm: LLM, fields: dict[str, Any]) -> None:
        (answer,) = ask(llm, SamplingParams(max_tokens=20, seed=1, grammar=Grammar.regex("ab[01]{3}"), **fields))
        assert re.fullmatch("ab[01]{3}", answer.text)
        assert (answer.finish_reason, answer.stop_reason) == ("stop", None)

    def test_end_of_text_where_more_could_follow(self, llm: LLM) -> None:
        params: dict[str, Any] = {
            "max_tokens": 12,
            "seed": 1,
            "grammar": Grammar.regex("x{2,}"),
            "logit_bias": {1: 100.0},
        }
        ended, least, ignored = ask(
            llm,
            SamplingParams(**params),
            SamplingParams(**params, min_tokens=5),
            SamplingParams(**params, ignore_eos=True),
        )
        assert (ended.text, ended.finish_reason, ended.token_ids[-1]) == ("xx", "stop", 1)
        assert len(least.token_ids) == 6
        assert (least.finish_reason, least.token_ids[-1]) == ("stop", 1)
        assert (len(ignored.token_ids), ignored.finish_reason) == (12, "length")
        assert 1 not in ignored.token_ids

    def test_a_stop_token_waits_for_a_complete_text(self, llm: LLM) -> None:
        (x,), (y,) = llm.tokenizer.encode("x"), llm.tokenizer.encode("y")
        grammar = Grammar.regex("[xy]{3}z*")
        fields: dict[str, Any] = {"logit_bias": {x: 100.0}, "stop_token_ids": (x, y), "ignore_eos": True}
        (answer,) = ask(llm, SamplingParams(max_tokens=9, grammar=grammar, **fields))
        assert re.fullmatch("[xy]{3}", answer.text)
        assert (answer.finish_reason, answer.stop_reason) == ("stop", x)

    def test_a_model_without_end_of_text(self, tmp_path: Path) -> None:
        llm = LLM(init_tiny_model(tmp_path / "tiny", eos_token_id=None), max_rows=2, threads=1)
        ended, cut = ask(
            llm,
            SamplingParams(max_tokens=20, seed=1, grammar=Grammar.regex("[ab]{4}")),
            SamplingParams(max_tokens=6, seed=1, grammar=Grammar.regex("[ab]+")),
        )
        assert re.fullmatch("[ab]{4}", ended.text)
        assert (ended.finish_reason, cut.finish_reason) == ("stop", "length")

    def test_a_stop_string_cuts(self, llm: LLM) -> None:
        (answer,) = ask(llm, SamplingParams(max_tokens=20, grammar=Grammar.regex("aXbYc"), stop=("bY",)))
        assert (answer.text, answer.finish_reason, answer.stop_reason) == ("aX", "stop", "bY")


class TestEngine:
    def test_parked_sequences_keep_their_place(self, tiny_model: Path) -> None:
        grammars = [*GRAMMARS, None]
        visits = [
            Visit(
                submit(f"r{i}", [5 + i, 17], max_tokens=30, seed=i, grammar=grammars[i % 5], ignore_eos=True),
                comes=i % 4,
            )
            for i in range(10)
        ]
        whole = make_engine(tiny_model, max_rows=1, max_step_tokens=512)
        for grammar in GRAMMARS:
            compiled(whole, grammar)
        alone = {visit.request.request_id: complete(whole, visit.request) for visit in visits}
        engine = make_engine(tiny_model, max_rows=2, quantum=3)
        for grammar in GRAMMARS:
            compiled(engine, grammar)
        assert drive(engine, visits) == alone
        assert engine.stats().preemptions_total > 5

    def test_others_go_on_while_a_grammar_is_compiled(self, inner: Engine) -> None:
        inner.submit(submit("free", [5], max_tokens=30, ignore_eos=True))
        blocked: Future[Any] = Future()
        inner.grammars._cache[ANYBODY, "regex", "later"] = blocked
        inner.submit(submit("bound", [5], max_tokens=30, grammar=Grammar.regex("later")))
        inner.submit(submit("left", [5], max_tokens=30, grammar=Grammar.regex("later")))
        inner.abort("left")
        running = {"free": Completion([5]), "bound": Completion([5])}
        results: dict[str, Completion | RequestFailed] = {}
        while "free" not in results:
            step = inner.step()
            take_in(step, running, results)
            assert step.stats.waiting == 1
        began = time.monotonic()
        assert inner.step().outputs == []
        assert 0.005 < time.monotonic() - began < 1, "it does not spin"
        del inner.grammars._cache[ANYBODY, "regex", "later"]
        blocked.set_result(inner.grammars.compile(Grammar.regex("later")).result(60))
        while inner.has_work:
            take_in(inner.step(), running, results)
        answer = results["bound"]
        assert isinstance(answer, Completion)
        assert answer.text == "later"

    def test_a_bad_grammar_fails_alone(self, inner: Engine) -> None:
        bad = {
            "syntax": Grammar.regex("(a", "guided_regex"),
            "later": Grammar.regex(r"[a-z]{40}(\w{1,500}\d{1,500}){1,500}", "guided_regex"),
        }
        requests = [submit(name, [5], max_tokens=3000, grammar=bad[name], ignore_eos=True) for name in bad]
        requests.append(submit("good", [5], max_tokens=30, seed=2, grammar=GRAMMARS[1]))
        for request in requests:
            inner.submit(request)
        results = run(inner, [request.request_id for request in requests])
        for name in bad:
            failed = results[name]
            assert isinstance(failed, RequestFailed)
            assert (failed.error, failed.param) == ("InvalidParameter", "guided_regex")
        good = results["good"]
        assert isinstance(good, Completion)
        assert re.fullmatch(DATE, good.text)
        assert (ANYBODY, "regex", bad["later"].text) not in inner.grammars._cache

    def test_the_embedded_engine_raises_it(self, llm: LLM) -> None:
        with pytest.raises(InvalidParameter, match="unclosed group"):
            ask(llm, SamplingParams(grammar=Grammar.regex("(a")))


def compiled(engine: Engine, grammar: Grammar) -> None:
    assert not engine.grammars.compile(grammar).result(60).error


def run(engine: Engine, names: list[str]) -> dict[str, Completion | RequestFailed]:
    running, results = {name: Completion([5]) for name in names}, dict[str, Completion | RequestFailed]()
    while engine.has_work:
        step: StepOutputs = engine.step()
        take_in(step, running, results)
    return results
