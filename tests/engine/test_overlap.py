"""Texts and messages made while the next step runs, as on a GPU; here the step is there at once, but not looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from lattice_serve.engine.engine import Engine
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import RequestFailed
from tests.engine.harness import assert_idle, complete, live, make_engine, submit, take_in

REQUESTS = [
    submit("greedy", range(2, 13), max_tokens=9, temperature=0, ignore_eos=True),
    submit("stops", [7, 300, 9], max_tokens=30, seed=5, ignore_eos=True, stop=("e", "a")),
    submit("scored", range(40, 46), max_tokens=4, seed=6, top_p=0.9, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    submit("pooled", range(60, 70), max_tokens=0, pooling="mean"),
    submit("ends", range(70, 75), max_tokens=5, logit_bias={1: 100.0}),
]


@pytest.fixture
def overlapping(tiny_model: Path) -> Engine:
    engine = make_engine(tiny_model)
    engine._overlaps = True
    return engine


def test_answers_are_those_of_steps_one_by_one(overlapping: Engine, engine: Engine) -> None:
    running = {request.request_id: Completion(list(request.prompt_ids)) for request in REQUESTS}
    results: dict[str, Completion | RequestFailed] = {}
    for request in REQUESTS:
        overlapping.submit(request)
    while overlapping.has_work:
        overlapping.launch()
        take_in(overlapping.emit(), running, results)
        overlapping.collect()
    assert results == {request.request_id: complete(engine, request) for request in REQUESTS}
    assert_idle(overlapping)


def test_nothing_is_emitted_before_it_is_collected(overlapping: Engine) -> None:
    overlapping.submit(REQUESTS[0])
    overlapping.launch()
    assert overlapping.emit().outputs == []
    overlapping.collect()
    assert len(overlapping.emit().outputs) == 1
    overlapping.abort("greedy")
    assert_idle(overlapping)


def test_who_fails_alone_is_told(overlapping: Engine) -> None:
    """Though nothing is left to run after it."""
    request = REQUESTS[0]
    running, results = {"greedy": Completion(list(request.prompt_ids))}, dict[str, Completion | RequestFailed]()
    overlapping.submit(request)
    overlapping.launch()
    overlapping.collect()
    row = live(overlapping, "greedy").row
    assert row is not None
    overlapping.pool.memory[row].fill_(float("nan"))
    while overlapping.has_work:
        overlapping.launch()
        take_in(overlapping.emit(), running, results)
        overlapping.collect()
    failed = results["greedy"]
    assert isinstance(failed, RequestFailed)
    assert failed.error == "NumericalError"
    assert_idle(overlapping)


@pytest.mark.parametrize("collected", [False, True])
def test_who_leaves_hears_nothing_more(overlapping: Engine, engine: Engine, collected: bool) -> None:
    """Also while a step runs that has its token, and before a token is emitted that has been collected."""
    stays, leaves = REQUESTS[0], submit("leaves", [3, 4, 5], max_tokens=50, ignore_eos=True)
    running = {"greedy": Completion(list(stays.prompt_ids))}
    results: dict[str, Completion | RequestFailed] = {}
    overlapping.submit(stays)
    overlapping.submit(leaves)
    for number in range(100):
        overlapping.launch()
        if collected:
            overlapping.collect()
        if number == 2:
            overlapping.abort("leaves")
        outputs = overlapping.emit()
        if number < 2:
            outputs.outputs[:] = [output for output in outputs.outputs if output.request_id != "leaves"]
        take_in(outputs, running, results)
        overlapping.collect()
        if not overlapping.has_work:
            break
    assert results == {"greedy": complete(engine, stays)}
    assert_idle(overlapping)
