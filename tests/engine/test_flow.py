"""What is not taken is not made: sequences that wait for their clients, and answers that leave in pieces."""

from __future__ import annotations

from array import array
from pathlib import Path

import msgspec
import pytest

from lattice_serve.engine.engine import Engine
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import (
    EngineStats,
    StepOutputs,
    Submit,
    TokenLogprob,
    TokenOutput,
    encode,
    output_size,
)
from tests.engine.harness import assert_idle, complete, live, make_engine, submit
from tests.engine.test_process import served

WINDOW = 4 * output_size(None, None)
SLOW = msgspec.structs.replace(submit("slow", [5, 6, 7], max_tokens=40, seed=3, ignore_eos=True), window=WINDOW)
OTHER = submit("other", [8, 9], max_tokens=60, seed=4, ignore_eos=True)


def run(engine: Engine, steps: int = 10**6) -> dict[str, list[TokenOutput]]:
    """What comes while there is something to run."""
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work and steps:
        steps -= 1
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    assert steps, "steps are run that run no token"
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int | None]:
    return [output.token_id for output in outputs]


def size_of(output: TokenOutput) -> int:
    return output_size(output.logprob, output.prompt_logprobs)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_sequence_waits_until_its_outputs_are_taken_and_loses_none(
    engine: Engine, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = complete(engine, msgspec.structs.replace(SLOW, window=None)).token_ids
    monkeypatch.setattr(engine, "_overlaps", overlaps)
    engine.submit(SLOW)
    engine.submit(OTHER)
    outputs = run(engine, 1000)
    assert len(outputs["other"]) == 60, "others go on"
    got = tokens(outputs["slow"])
    assert len(got) <= 6
    assert engine.stats().paused == 1
    assert not engine.has_work, "there is nothing to run, and nothing to spin for"
    assert not engine.idle
    while not engine.idle:
        engine.credit("slow", WINDOW // 2)
        got += tokens(run(engine, 100).get("slow", []))
    assert got == truth
    assert engine.stats().paused == 0
    assert_idle(engine)


def test_paused_sequences_give_their_rows_to_others_and_come_back(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, max_rows=2)
    truth = complete(engine, msgspec.structs.replace(SLOW, window=None)).token_ids
    slow = [msgspec.structs.replace(SLOW, request_id=f"slow {i}") for i in range(4)]
    for request in slow:
        engine.submit(request)
    got = {name: tokens(outputs) for name, outputs in run(engine, 1000).items()}
    assert {len(ids) for ids in got.values()} == {4}, "all have begun, with two rows"
    assert engine.stats().paused == 4
    engine.submit(OTHER)
    assert len(run(engine, 1000)["other"]) == 60
    while not engine.idle:
        for request in slow:
            engine.credit(request.request_id, WINDOW)
        for name, outputs in run(engine, 1000).items():
            got[name] += tokens(outputs)
    assert list(got.values()) == [truth] * 4
    assert_idle(engine)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_paused_sequence_that_is_aborted_leaves_nothing(tiny_model: Path, rows: int) -> None:
    engine = make_engine(tiny_model, max_rows=rows)
    engine.submit(SLOW)
    run(engine, 1000)
    engine.submit(OTHER)
    run(engine, 1000)
    engine.abort("slow")
    engine.credit("slow", WINDOW)
    assert engine.idle
    assert_idle(engine)


def test_nobody_waits_for_a_prompt_whose_client_does_not_take_its_scores(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    prompt = [3 + i % 7 for i in range(64)]
    scored = submit("scored", prompt, max_tokens=1, prompt_logprobs=2)
    engine.submit(msgspec.structs.replace(scored, window=1))
    engine.submit(submit("follows", prompt, max_tokens=3, ignore_eos=True))
    assert len(run(engine, 1000)["follows"]) == 3
    assert engine.stats().paused == 1
    engine.abort("scored")


def test_scores_of_a_prompt_leave_piece_by_piece(engine: Engine) -> None:
    """However long the prompt is, no message has more than a step's tokens, and the engine keeps none."""
    prompt = [3 + i % 50 for i in range(100)]
    request = submit("scored", prompt, max_tokens=1, prompt_logprobs=20)
    engine.submit(request)
    completion, most = Completion(prompt), 0
    while engine.has_work:
        step = engine.step()
        assert not engine.scheduler.running or live(engine, "scored").prompt_logprobs == []
        most = max(most, len(encode(step)))
        for output in step.outputs:
            assert len(output.prompt_logprobs or ()) <= engine.config.max_step_tokens + 1
            assert (output.queue_seconds is None) == (output.token_id is None)
            completion.add(output)
    assert len(completion.prompt_logprobs or ()) == len(prompt)
    assert len(completion.token_ids) == 1
    last = TokenOutput("scored", 1, "", prompt_logprobs=(completion.prompt_logprobs or [])[1:17])
    assert most < 2 * len(encode(StepOutputs([last], [], EngineStats())))


def test_size_counts_log_probabilities() -> None:
    entry = TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5)))
    assert output_size(None, None) < output_size(entry, None) < output_size(entry, [None, entry, entry])


def test_a_prompt_is_sent_once_for_many_answers(engine: Engine) -> None:
    prompt = array("i", [5, 6, 7])
    first = Submit("a", prompt, OTHER.params)
    again = msgspec.structs.replace(first, request_id="b", prompt_ids=array("i"), same_prompt=True)
    with served(engine) as peer:
        peer.ready()
        results = peer.answers(first, again)
    a, b = results["a"], results["b"]
    assert isinstance(a, Completion)
    assert isinstance(b, Completion)
    assert a.token_ids == b.token_ids


def test_a_served_engine_sleeps_while_all_are_paused(engine: Engine) -> None:
    with served(engine) as peer:
        peer.ready()
        peer.send(SLOW)
        peer.until(lambda step: step.stats.paused == 1)
        peer.link.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.link.recv(1)
    engine.abort("slow")
