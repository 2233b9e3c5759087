"""Engines of a tiny model, driven step by step."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import Pooling, RequestFailed, StepOutputs, Submit
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.sequence import Sequence


@dataclass(frozen=True)
class Visit:
    """A request, the step before which it comes, and the one before which its client leaves."""

    request: Submit
    comes: int = 0
    leaves: int | None = None


def submit(
    request_id: str,
    prompt_ids: AbstractSequence[int],
    *,
    priority: int = 0,
    pooling: Pooling | None = None,
    **params: Any,
) -> Submit:
    return Submit(request_id, array("i", prompt_ids), SamplingParams(**params), priority, pooling=pooling)


def make_engine(model: Path, *, quantum: int | None = None, **settings: Any) -> Engine:
    """With 4 rows, small steps and no prefix cache, unless `settings` say otherwise."""
    engine = Engine(
        EngineConfig(**{"model": model, "max_rows": 4, "max_step_tokens": 16, "prefix_cache_memory": 0, **settings})
    )
    if quantum is not None:
        engine.scheduler.quantum = quantum
    return engine


def drive(
    engine: Engine, visits: AbstractSequence[Visit], meddle: Callable[[int], object] = lambda number: None
) -> dict[str, Completion | RequestFailed]:
    """What came of each request whose client did not leave before; run until nothing is left, every step checked.

    `meddle` is called before each step, before anyone comes or leaves, with the step's number, counted from 0.
    """
    running: dict[str, Completion] = {}
    results: dict[str, Completion | RequestFailed] = {}
    last = max(visit.comes for visit in visits)
    work = sum(len(visit.request.prompt_ids) + visit.request.params.max_tokens for visit in visits)
    waited = 0
    for number in itertools.count():
        assert number <= last + work + waited, "steps are run that run no token"
        meddle(number)
        for visit in visits:
            request_id = visit.request.request_id
            if visit.comes == number:
                engine.submit(visit.request)
                running[request_id] = Completion(list(visit.request.prompt_ids))
            if visit.leaves == number:
                engine.abort(request_id)
                running.pop(request_id, None)
        if not engine.has_work and number >= last:
            break
        step = engine.step()
        assert step.stats.step_tokens <= engine.config.max_step_tokens
        waited += not step.stats.step_tokens and bool(engine.grammar_steps._pending)
        assert step.stats.rows_used == step.stats.running <= engine.pool.rows
        assert step.stats.running + step.stats.waiting == len(engine.scheduler)
        take_in(step, running, results)
    assert not running, "a request was forgotten"
    assert_idle(engine)
    return results


def complete(engine: Engine, request: Submit) -> Completion:
    """The answer to one request that is alone."""
    result = drive(engine, [Visit(request)])[request.request_id]
    assert isinstance(result, Completion), result
    return result


def live(engine: Engine, request_id: str) -> Sequence:
    return next(sequence for sequence in engine.scheduler if sequence.request_id == request_id)


def assert_idle(engine: Engine) -> None:
    """Nothing runs or waits, and nothing is left of what has run."""
    assert not engine.has_work
    assert len(engine.scheduler) == 0
    engine.check_idle()
    while engine.tidy():
        pass
    assert engine.pool.used == 0
    engine.check_idle()
    assert not engine.pool.memory.any()


def take_in(step: StepOutputs, running: dict[str, Completion], results: dict[str, Completion | RequestFailed]) -> None:
    """What a step says of the `running`; those that end move to `results`."""
    for output in step.outputs:
        running[output.request_id].add(output)
        if output.finish_reason is not None:
            results[output.request_id] = running.pop(output.request_id)
    for failed in step.failures:
        del running[failed.request_id]
        results[failed.request_id] = failed
