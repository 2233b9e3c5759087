"""Compiling grammars, keeping them, and the masks that matchers make of them."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.engine import compiler, grammar
from lattice_serve.engine.errors import EngineUnavailable, InvalidParameter, Overloaded
from lattice_serve.engine.grammar import Compiled, Grammars, Matcher, restrict
from lattice_serve.engine.sampler import SampleRow, sample
from lattice_serve.engine.sampling import Grammar, SamplingParams
from lattice_serve.engine.shares import ANYBODY, salted
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import bundled_model

EOS = 1
PADDED = 4096 + 37
CHAIN = "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(3000)) + 'a3000: "a"\n'
HOSTILE = {
    "nested repetition": Grammar.regex("(a{1,1000}){1,1000}"),
    "optionals": Grammar.regex("a?" * 5000 + "a" * 5000),
    "a huge number": Grammar.regex("a{1000000000}"),
    "parentheses": Grammar.regex("(" * 20_000 + "a" + ")" * 20_000),
    "alternatives": Grammar.regex("|".join(rf"\w{{{i}}}" for i in range(1, 5000))),
    "a deep schema": Grammar(kind="json_schema", text='{"items":' * 5000 + "{}" + "}" * 5000),
    "references in a circle": Grammar.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "a large product": Grammar.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "null"}}} for j in range(4)]} for i in range(12)]}
    ),
    "names of a slow pattern": Grammar.json_schema(
        {"type": "object", "properties": {"a" * 40 + "!": {}}, "propertyNames": {"pattern": "^(a+)+$"}}
    ),
    "many patterns of names": Grammar.json_schema(
        {"type": "object", "patternProperties": {f"^x{i}[a-z]{{1,50}}$": {} for i in range(600)}}
    ),
    "a multiple": Grammar.json_schema({"type": "integer", "multipleOf": 1_000_003, "minimum": 1}),
    "a rule of itself": Grammar.ebnf("root ::= root"),
    "rules in a chain": Grammar.ebnf(CHAIN),
    "doubling": Grammar.ebnf(
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60 ::= "a"'
    ),
    "ambiguity": Grammar.ebnf("root ::= s\ns ::= s s s s | s s s | s s | [a-z] | [a-z] [a-z] |"),
}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """As strict mode has it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def nested(levels: int, width: int) -> dict[str, Any]:
    properties: dict[str, Any] = {f"level {levels} property {i}": {"type": "boolean"} for i in range(width)}
    if levels > 1:
        properties["deeper"] = nested(levels - 1, width)
    return closed(properties)


LARGE = {
    "properties": closed({f"property {i:014}": {"type": "string"} for i in range(5000)}),
    "levels": nested(10, 499),
    "values": closed({"a": {"enum": [f"{i:0118}" for i in range(1000)]}}),
    "long names": closed({f"{i:01000}": {"type": "integer"} for i in range(120)}),
    "a description": closed({"a": {"type": "string", "description": "x" * 1_000_000}}),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(bundled_model(), PADDED)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(bundled_model(), tokenizer)


def matcher_of(grammars: Grammars, wanted: Grammar, ends: tuple[int, ...] = (EOS,)) -> Matcher:
    return grammars.matcher(grammars.compile(wanted).result(60), ends, wanted.param)


def allowed_ids(matcher: Matcher) -> set[int]:
    return set(matcher.allowed.nonzero()[:, 0].tolist())


texts = st.text(st.sampled_from('ab \u00e9\u4e2d\U0001f600"\\<\n'), min_size=1, max_size=6)


class TestMatcher:
    @given(st.lists(texts, min_size=1, max_size=5), st.data())
    def test_the_tokens_allowed_are_those_that_begin_a_rest(
        self, grammars: Grammars, tokenizer: Tokenizer, choices: list[str], data: st.DataObject
    ) -> None:
        """Of bytes: characters in pieces, tokens over several of them, and none without text.

        Where only one text can follow, some of its tokens are enough: llguidance then spells as the tokenizer does.
        """
        matcher = matcher_of(grammars, Grammar.choice(choices))
        spellings = {choice.encode() for choice in choices}
        done = b""
        while not matcher.complete:
            rests = {spelling.removeprefix(done) for spelling in spellings if spelling.startswith(done)}
            expected = {
                token_id
                for token_id in range(PADDED)
                if (text := tokenizer.token_bytes(token_id)) and any(rest.startswith(text) for rest in rests)
            }
            allowed = allowed_ids(matcher) - {EOS}
            forced = len({rest[:1] for rest in rests}) == 1
            assert allowed and allowed <= expected if forced else allowed == expected
            assert (EOS in allowed_ids(matcher)) == (done in spellings)
            token_id = data.draw(st.sampled_from(sorted(allowed)))
            done += tokenizer.token_bytes(token_id)
            matcher.push(token_id)
        assert done in spellings

    def test_ends_are_allowed_where_the_text_is_complete_and_nowhere_else(
        self, grammars: Grammars, tokenizer: Tokenizer
    ) -> None:
        (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
        matcher = matcher_of(grammars, Grammar.regex("[ab]{2,3}"), (a, PADDED - 1))
        assert {a, b, PADDED - 1} & allowed_ids(matcher) == {b}
        matcher.push(b)
        matcher.push(b)
        assert {a, b, PADDED - 1} & allowed_ids(matcher) == {a, b, PADDED - 1}
        matcher.push(b)
        assert matcher.complete

    def test_a_text_that_only_an_end_could_continue_is_refused(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        spellings = tuple(token_id for token_id in range(PADDED) if tokenizer.token_bytes(token_id) == b"a")
        assert len(spellings) == 2, "a piece and a byte"
        with pytest.raises(InvalidParameter, match="no token of the model continues the text"):
            matcher_of(grammars, Grammar.regex("a"), spellings)

    def test_matchers_of_one_grammar_know_nothing_of_each_other(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        first, second = (matcher_of(grammars, Grammar.regex("[ab]x")) for _ in range(2))
        before = second.allowed.clone()
        first.push(tokenizer.encode("a")[0])
        assert torch.equal(second.allowed, before)
        assert not torch.equal(first.allowed, before)

    def test_a_grammar_that_grows_too_complex_fails(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        matcher = matcher_of(grammars, Grammar.regex(r"x{80}(\w{1,500}\d{1,500}){1,500}", "guided_regex"))
        (x,) = tokenizer.encode("x")

        def go_on() -> None:
            for _ in range(20_000):
                matcher.push(x if matcher.allowed[x] else min(allowed_ids(matcher) - {EOS}))

        with pytest.raises(InvalidParameter, match="guided_regex is too complex: ") as caught:
            go_on()
        assert caught.value.param == "guided_regex"


class TestRestrict:
    VOCAB = 8

    def row(self, allowed: set[int], **params: object) -> SampleRow:
        matcher = Matcher.__new__(Matcher)
        matcher.allowed = torch.tensor([i in allowed for i in range(self.VOCAB)])
        return SampleRow(SamplingParams(**params), 3, 0, matcher=matcher)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 0},
            {"temperature": 1},
            {"temperature": 100},
            {"top_k": 1},
            {"top_p": 0.01},
            {"min_p": 1},
            {"logit_bias": {0: 100.0}},
        ],
        ids=str,
    )
    def test_every_way_to_choose_obeys(self, params: dict[str, object]) -> None:
        logits = torch.randn(64, self.VOCAB, generator=torch.Generator().manual_seed(1)) * 4
        rows = [self.row({2, 5}, seed=i, **params) for i in range(64)]
        for i, row in enumerate(rows):
            row.seed = i
        assert {sampled.token_id for sampled in sample(logits, rows)} == {2, 5}

    def test_other_rows_are_as_they_were_and_logprobs_the_models(self) -> None:
        logits = torch.randn(2, self.VOCAB, generator=torch.Generator().manual_seed(2))
        free = SampleRow(SamplingParams(logprobs=3), 9, 0)
        bound = self.row({4}, logprobs=3)
        alone = sample(logits[1:], [free])
        first, second = sample(logits, [bound, free])
        assert [second] == alone
        assert first.token_id == 4
        assert first.logprob is not None
        assert first.logprob.logprob == pytest.approx(float(logits[0].log_softmax(-1)[4]), abs=1e-6)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_what_the_model_rules_out_is_still_all_there_is(self, temperature: float) -> None:
        logits = torch.zeros(1, self.VOCAB)
        logits[0, [2, 5]] = -math.inf
        (sampled,) = sample(logits, [self.row({2, 5}, temperature=temperature)])
        assert sampled.token_id in {2, 5}

    def test_masked_scores_are_minus_infinity(self) -> None:
        scores = torch.zeros(2, self.VOCAB, dtype=torch.float64)
        restrict(scores, [None, self.row({1}).matcher])
        assert scores[0].tolist() == [0.0] * self.VOCAB
        assert scores[1].tolist() == [0.0 if i == 1 else -math.inf for i in range(self.VOCAB)]


class TestGrammars:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_ones_are_refused_in_time(self, grammars: Grammars, name: str) -> None:
        grammars.compile(Grammar.regex("a")).result(60)  # The process has started.
        began = time.monotonic()
        future = grammars.compile(HOSTILE[name])
        with pytest.raises(InvalidParameter, match=r"^grammar: ") as caught:
            grammars.matcher(future.result(20), (EOS,), "grammar")
        # A second of processor time at most, on a machine that may be busy.
        assert time.monotonic() - began < 5
        assert len(caught.value.message) < 400
        assert not grammars.compile(Grammar.choice(["fine"])).result(20).error

    @pytest.mark.parametrize("name", LARGE)
    def test_what_openai_takes_is_taken(self, grammars: Grammars, name: str) -> None:
        """5,000 properties, 10 levels, 1,000 values of enums, 120,000 characters of names and values."""
        compiled = grammars.compile(Grammar.json_schema(LARGE[name])).result(60)
        assert not compiled.error
        matcher = grammars.matcher(compiled, (EOS,), "grammar")
        for _ in range(500):
            if not matcher.complete:
                matcher.push(max(allowed_ids(matcher) - {EOS}))

    def test_the_same_grammar_is_compiled_once(self, grammars: Grammars) -> None:
        first = grammars.compile(Grammar.regex("[a-f]+"))
        assert grammars.compile(Grammar.regex("[a-f]+", "guided_regex")) is first
        assert grammars.compile(Grammar.ebnf("start: /[a-f]+/")) is not first
        grammars.discard(Grammar.regex("[a-f]+"))
        assert grammars.compile(Grammar.regex("[a-f]+")) is not first

    def test_the_least_recently_used_goes(self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grammar, "MAX_CACHED", 3)
        futures = {}
        for text in ["one", "two", "three", "one", "four"]:
            futures[text] = grammars.compile(Grammar.regex(text))
            futures[text].result(20)
        assert grammars.kept == 3
        assert grammars.compile(Grammar.regex("one")) is futures["one"]
        assert grammars.compile(Grammar.regex("two")) is not futures["two"]

    def test_memory_is_bounded(self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
        large = [Grammar.choice([f"label {i} of {n}" for i in range(2000)]) for n in range(3)]
        sizes = [grammars.compile(each).result(20).bytes for each in large]
        assert min(sizes) > 500_000
        monkeypatch.setattr(grammar, "MAX_CACHED_BYTES", 1)
        grammars.compile(Grammar.regex("small")).result(20)
        assert grammars.kept == 1

    def test_no_more_than_so_many_wait(self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grammar, "MAX_PENDING", 2)
        release = threading.Event()
        grammars._thread.submit("", lambda: Compiled(error=str(release.wait())))
        futures = [grammars.compile(Grammar.regex(f"wait{i}")) for i in range(2)]
        with pytest.raises(Overloaded):
            grammars.compile(Grammar.regex("wait2"))
        assert grammars.compile(Grammar.regex("wait1")) is futures[1]
        release.set()
        assert [future.result(20).error for future in futures] == ["", ""]

    def test_each_salt_has_its_own(self, grammars: Grammars) -> None:
        """Else the time that it takes would tell what others have used."""
        mine = grammars.compile(Grammar.regex("[k-o]+"), salted("a", ""))
        assert not mine.result(60).error
        for salt in (salted("b", ""), salted("a", "x"), ANYBODY):
            other = grammars.compile(Grammar.regex("[k-o]+"), salt)
            assert other is not mine
            assert other.result(60).root is not mine.result().root
        assert grammars.compile(Grammar.regex("[k-o]+"), salted("a", "")) is mine

    def test_one_tenant_pushes_out_its_own(self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grammar, "MAX_CACHED", 4)
        grammars._cache.clear()
        polite = [grammars.compile(Grammar.regex(f"p{i}"), "polite/") for i in range(2)]
        for i in range(6):
            grammars.compile(Grammar.regex(f"g{i}"), "greedy/").result(60)
        assert [grammars.compile(Grammar.regex(f"p{i}"), "polite/") for i in range(2)] == polite

    def test_one_tenant_does_not_fill_the_places_of_another(
        self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(grammar, "MAX_PENDING", 4)
        release, order = threading.Event(), list[str]()

        def compiled(wanted: Grammar) -> Compiled:
            release.wait()
            order.append(wanted.text)
            return Compiled(error="none")

        monkeypatch.setattr(grammars, "_compile", compiled)
        futures = [grammars.compile(Grammar.regex(f"slow{i}"), "greedy/") for i in range(4)]
        with pytest.raises(Overloaded):
            grammars.compile(Grammar.regex("slow4"), "greedy/")
        futures += [grammars.compile(Grammar.regex(f"quick{i}"), "polite/") for i in range(2)]
        with pytest.raises(Overloaded):
            grammars.compile(Grammar.regex("quick2"), "polite/")
        release.set()
        for future in futures:
            future.result(20)
        assert order.index("quick0") <= 2

    def test_a_process_that_dies_is_started_again(self, grammars: Grammars) -> None:
        grammars.compile(Grammar.regex("before")).result(60)
        process = grammars._trial._process
        assert process is not None
        process.kill()
        process.wait()
        assert not grammars.compile(Grammar.regex("after")).result(60).error

    def test_nothing_is_left_of_it(self, tokenizer: Tokenizer) -> None:
        trial = compiler.Trial(bundled_model(), PADDED)
        trial(Grammar.regex("a"))
        process = trial._process
        assert process is not None
        del trial
        assert process.returncode is not None

    def test_a_process_that_does_not_start_is_no_fault_of_the_grammar(
        self, tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
    ) -> None:
        broken = Grammars(tmp_path, tokenizer)
        first = broken.compile(Grammar.regex("a"))
        with pytest.raises(EngineUnavailable):
            broken.matcher(first.result(60), (), "grammar")
        assert broken.compile(Grammar.regex("a")) is not first, "it is tried again"
        assert "the grammar compiler died" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-ahead"),
        (Grammar.ebnf("root ::= root"), "it admits no text"),
        (Grammar.regex("[^\\s\\S]"), "it admits no text"),
        (Grammar(kind="json_schema", text="{"), "Expecting property name"),
        (Grammar.json_schema({"type": "strin"}), "Invalid type: strin"),
        (Grammar.json_schema({"not": {}}), "it admits no text"),
        (Grammar.json_schema({"$ref": "https://example.com/a"}), "https://example.com/a"),
        (Grammar.json_schema({"enum": []}), "Unsatisfiable"),
        (Grammar.ebnf("root ::= x"), "there is no rule 'x'"),
        (Grammar.ebnf("start: x"), "x"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(grammars: Grammars, wanted: Grammar, reason: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        matcher_of(grammars, wanted)
    assert caught.value.message.startswith("grammar: ")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.regex("", "guided_regex"),
        lambda: Grammar.regex("a" * 70_000, "guided_regex"),
        lambda: Grammar.regex("\ud800", "guided_regex"),
        lambda: Grammar.choice([], "guided_regex"),
        lambda: Grammar.choice(["a", ""], "guided_regex"),
    ],
)
def test_what_is_no_grammar_at_all_names_its_field(make: object) -> None:
    assert callable(make)
    with pytest.raises(InvalidParameter, match="guided_regex") as caught:
        make()
    assert caught.value.param == "guided_regex"
