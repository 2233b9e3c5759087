"""Hard grammars: what is taken in beside the steps, what comes of it, and that others do not wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from lattice_serve.engine import grammar_steps
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.grammar import Compiled, Matcher
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import RequestFailed
from lattice_serve.engine.sampling import Grammar
from tests.engine.harness import Visit, assert_idle, drive, make_engine, submit, take_in
from tests.tiny import init_tiny_model

LETTERS = Grammar.regex("[a-z]{5,200}")
DATE = Grammar.regex("[0-9]{4}-[0-9]{2}-[0-9]{2}")


@pytest.fixture(scope="module")
def module_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    engine = make_engine(init_tiny_model(tmp_path_factory.mktemp("tiny")), max_rows=4, max_step_tokens=64)
    for grammar in (LETTERS, DATE):
        assert not engine.grammars.compile(grammar).result(60).error
    return engine


@pytest.fixture
def engine(module_engine: Engine) -> Iterator[Engine]:
    yield module_engine
    assert_idle(module_engine)
    assert not module_engine.grammar_steps._pending


def visits(count: int = 8) -> list[Visit]:
    grammars = [LETTERS, None, DATE]
    return [
        Visit(submit(f"r{i}", [5 + i, 17], max_tokens=20, seed=i, grammar=grammars[i % 3]), comes=i % 4)
        for i in range(count)
    ]


def drain(engine: Engine, names: list[str]) -> dict[str, Completion | RequestFailed]:
    running, results = {name: Completion([5]) for name in names}, dict[str, Completion | RequestFailed]()
    end = time.monotonic() + 60
    while engine.has_work:
        assert time.monotonic() < end
        take_in(engine.step(), running, results)
    return results


@pytest.mark.parametrize("quantum", [256, 3])
def test_answers_are_the_same_beside_the_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch, quantum: int) -> None:
    """Some of them parked meanwhile."""
    monkeypatch.setattr(engine.scheduler, "quantum", quantum)
    inside = drive(engine, visits())
    monkeypatch.setattr(grammar_steps, "EASY_SECONDS", -1.0)
    monkeypatch.setattr(grammar_steps, "_GATHER_SECONDS", 0.0)
    requests = [visit.request for visit in visits()]
    for request in requests:
        engine.submit(request)
    running = {request.request_id: Completion(request.prompt_ids.tolist()) for request in requests}
    results: dict[str, Completion | RequestFailed] = {}
    while engine.has_work:
        take_in(engine.step(), running, results)
    assert results == inside


def test_others_go_on_beside_a_hard_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask takes as long as it takes; another grammar's, an easy one, is made between steps."""
    release, push, matcher_of = threading.Event(), Matcher.push, engine.grammars.matcher

    def made(compiled: Compiled, ends: Sequence[int], param: str) -> Matcher:
        matcher = matcher_of(compiled, ends, param)
        matcher.seconds = float(param == "hard")
        return matcher

    def hard(matcher: Matcher, token_id: int) -> None:
        if matcher._param == "hard":
            release.wait(30)
        push(matcher, token_id)
        matcher.seconds = 1.0 if matcher._param == "hard" else 0.0

    monkeypatch.setattr(Matcher, "push", hard)
    monkeypatch.setattr(engine.grammars, "matcher", made)
    letters = Grammar.regex("[a-z]{5,200}", "hard")
    engine.submit(submit("hard", [5, 6], max_tokens=5, grammar=letters))
    engine.submit(submit("easy", [5, 8], max_tokens=40, grammar=LETTERS, ignore_eos=True))
    engine.submit(submit("free", [5, 7], max_tokens=40, ignore_eos=True))
    running = {name: Completion([5]) for name in ("hard", "easy", "free")}
    results: dict[str, Completion | RequestFailed] = {}
    while len(results) < 2:
        take_in(engine.step(), running, results)
    assert len(running["hard"].token_ids) <= 1
    began = time.process_time()
    for _ in range(5):
        assert not engine.step().outputs
    assert time.process_time() - began < 0.09, "it does not spin"
    release.set()
    results |= drain(engine, ["hard"])
    assert isinstance(results["hard"], Completion)


def test_what_is_too_complex_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_steps, "EASY_SECONDS", -1.0)
    push = Matcher.push

    def fails(matcher: Matcher, token_id: int) -> None:
        if matcher._param == "guided_regex":
            raise InvalidParameter("guided_regex is too complex: a token takes too long", param="guided_regex")
        push(matcher, token_id)

    monkeypatch.setattr(Matcher, "push", fails)
    engine.submit(submit("bad", [5], max_tokens=30, grammar=Grammar.regex("[a-z]{5,200}", "guided_regex")))
    engine.submit(submit("good", [5], max_tokens=30, grammar=DATE))
    results = drain(engine, ["bad", "good"])
    assert results["bad"] == RequestFailed(
        "bad", "InvalidParameter", "guided_regex is too complex: a token takes too long", "guided_regex"
    )
    assert isinstance(results["good"], Completion)


def test_a_sequence_may_leave_meanwhile(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_steps, "EASY_SECONDS", -1.0)
    for name in "abc":
        engine.submit(submit(name, [5], max_tokens=30, grammar=LETTERS, ignore_eos=True))
    while not engine.grammar_steps._pending:
        engine.step()
    for name in "abc":
        engine.abort(name)
    assert not engine.has_work


def test_surprises_have_a_budget(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that turns out to be hard is taken in at once, and with it what may be as hard is not any more."""
    monkeypatch.setattr(grammar_steps, "SURPRISE_SHARE", 1e-6)
    main, inside = threading.get_ident(), list[str]()
    push = Matcher.push

    def surprising(matcher: Matcher, token_id: int) -> None:
        push(matcher, token_id)
        if threading.get_ident() == main:
            inside.append(matcher._param)
            matcher.seconds = 0.02

    monkeypatch.setattr(Matcher, "push", surprising)
    engine.grammar_steps._budget = 0.0
    names = list("abcd")
    for name in names:
        engine.submit(submit(name, [5, ord(name)], max_tokens=10, grammar=LETTERS, ignore_eos=True))
    assert all(isinstance(result, Completion) for result in drain(engine, names).values())
    assert len(inside) == 1


def test_an_easy_grammar_is_taken_in_between_steps(engine: Engine) -> None:
    """No thread is asked: what does not try to be hard costs others nothing to speak of."""
    drain_first = submit("a", [5], max_tokens=15, grammar=LETTERS, ignore_eos=True)
    engine.submit(drain_first)
    drain(engine, ["a"])  # what is found out of a grammar once is known then
    engine.grammar_steps._budget = 0.005
    steps = engine.stats().steps_total
    engine.submit(submit("b", [5], max_tokens=15, grammar=LETTERS, ignore_eos=True))
    drain(engine, ["b"])
    assert engine.stats().steps_total - steps <= 16
