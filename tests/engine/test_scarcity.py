"""Want of memory: what is optional stops growing, and what fails fails alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lattice_serve.engine import engine as engine_module
from lattice_serve.engine import runner, sampler, slab, tier
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import OutOfMemory
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import RequestFailed
from lattice_serve.engine.pooled import Pooled
from lattice_serve.engine.prefix_cache import PrefixCache
from lattice_serve.engine.scarcity import is_out_of_memory, reported
from lattice_serve.engine.scheduler import Scheduler
from lattice_serve.engine.state_pool import StatePool
from lattice_serve.engine.taken import Taken
from tests.engine.harness import Visit, assert_idle, complete, drive, make_engine, submit

TOO_MUCH = 1 << 50


def torch_error() -> RuntimeError:
    """As torch itself says it."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_MUCH)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch_error(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_how_want_of_memory_shows(error: Exception) -> None:
    assert is_out_of_memory(error)
    told = reported(error)
    assert (type(told), told.status, told.retry_after) == (OutOfMemory, 503, 2)


def test_what_is_no_want_of_memory_is_raised() -> None:
    for error in (RuntimeError("shape mismatch"), TypeError("out of memory")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)):
            reported(error)


class Scarce:
    """Raises in place of a call, as often as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.met = 0

    def __call__(self, owner: Any, name: str, when: Callable[..., bool], times: int = 1) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if self.met < times and when(*arguments):
                self.met += 1
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
            return real(*arguments, **named)

        self._monkeypatch.setattr(owner, name, call)


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Scarce:
    return Scarce(monkeypatch)


REQUESTS = {
    "greedy": submit("greedy", [8, 9], max_tokens=12, temperature=0, ignore_eos=True),
    "sampled": submit("sampled", [5, 17, 400], max_tokens=12, seed=1, top_p=0.8, ignore_eos=True),
    "penalised": submit("penalised", [9, 9, 9], max_tokens=12, seed=3, repetition_penalty=1.3, ignore_eos=True),
    "scored": submit("scored", range(40), max_tokens=3, seed=2, prompt_logprobs=2, logprobs=3),
    "vector": submit("vector", range(9), max_tokens=0, pooling="mean"),
}


@pytest.fixture(scope="module")
def alone(tiny_model: Path, shared_engine: Engine) -> dict[str, Completion]:
    return {name: complete(shared_engine, request) for name, request in REQUESTS.items()}


def always(*_: Any) -> bool:
    return True


def of(name: str) -> Callable[..., bool]:
    """Whether a call is about that request."""

    def about(*arguments: Any) -> bool:
        return any(
            getattr(each, "request_id", getattr(getattr(each, "sequence", None), "request_id", None)) == name
            for each in arguments
        )

    return about


def few(rows: int) -> Callable[..., bool]:
    return lambda _, chosen: len(chosen) == rows


FAULTS: list[tuple[str, Any, str, Callable[..., bool], int, set[str]]] = [
    ("taken in", engine_module, "TokenCounts", always, 1, {"penalised"}),
    ("queued", Scheduler, "add", of("sampled"), 1, {"sampled"}),
    ("scored", runner, "prompt_logprobs", always, 1, {"scored"}),
    ("pooled", Pooled, "add", always, 1, {"vector"}),
    ("sampled together", runner, "start", always, 1, set()),
    ("advanced", Engine, "_advance", of("greedy"), 1, {"greedy"}),
    ("told", Taken, "output", of("sampled"), 1, {"sampled"}),
    ("kept", PrefixCache, "put", always, 9, set()),
    ("kept in memory", slab.Slab, "prepare", always, 9, set()),
]


@pytest.mark.parametrize(
    ("owner", "name", "when", "times", "fail"), [pytest.param(*rest, id=id) for id, *rest in FAULTS]
)
def test_an_allocation_that_fails_fails_its_request_alone(
    tiny_model: Path,
    alone: dict[str, Completion],
    scarce: Scarce,
    owner: Any,
    name: str,
    when: Callable[..., bool],
    times: int,
    fail: set[str],
) -> None:
    engine = make_engine(tiny_model, max_rows=8, prefix_cache_memory=1 << 20)
    scarce(owner, name, when, times)
    results: dict[str, Any] = {}
    for request in REQUESTS.values():
        try:
            engine.submit(request)
        except OutOfMemory:
            results[request.request_id] = None
    running = {name: Completion(list(REQUESTS[name].prompt_ids)) for name in REQUESTS if name not in results}
    while engine.has_work:
        step = engine.step()
        for output in step.outputs:
            running[output.request_id].add(output)
        results |= {failed.request_id: failed for failed in step.failures}
    assert set(results) == fail
    assert all(each is None or each.error == "OutOfMemory" for each in results.values())
    assert {name: answer for name, answer in running.items() if name not in fail} == {
        name: answer for name, answer in alone.items() if name not in fail
    }
    assert scarce.met
    assert_idle(engine)
    for name, request in REQUESTS.items():
        assert complete(engine, request) == alone[name]


def test_of_those_sampled_one_by_one_one_fails(
    tiny_model: Path, alone: dict[str, Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all at once took too much memory, and so does one of them."""
    engine = make_engine(tiny_model, max_rows=8)
    real, failed = sampler.sample, list[bool]()

    def sample(logits: Any, rows: Any) -> Any:
        if rows[0].params.top_p < 1 and not failed:
            failed.append(True)
            raise MemoryError
        return real(logits, rows)

    def none(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(runner, "sample", sample)
    monkeypatch.setattr(runner, "start", none)
    results = drive(engine, [Visit(request) for request in REQUESTS.values()])
    failure = results.pop("sampled")
    assert isinstance(failure, RequestFailed)
    assert failure.error == "OutOfMemory"
    assert results == {name: answer for name, answer in alone.items() if name != "sampled"}


@pytest.mark.parametrize("times", [1, 2])
def test_a_state_that_cannot_be_parked(
    tiny_model: Path, alone: dict[str, Completion], scarce: Scarce, times: int
) -> None:
    """Once: the cache gives way. Twice: its sequence fails."""
    engine = make_engine(tiny_model, max_rows=1, quantum=3, prefix_cache_memory=1 << 20)
    scarce(StatePool, "park", always, times)
    results = drive(engine, [Visit(REQUESTS["greedy"]), Visit(REQUESTS["sampled"])])
    failures = [result for result in results.values() if isinstance(result, RequestFailed)]
    assert [failed.error for failed in failures] == ["OutOfMemory"] * (times - 1)
    assert all(result == alone[name] for name, result in results.items() if isinstance(result, Completion))


def test_a_draft_without_memory_is_none(tiny_model: Path, scarce: Scarce, shared_engine: Engine) -> None:
    engine = make_engine(tiny_model, speculative_tokens=4)
    repeating = submit("r", [7, 8, 9] * 5, max_tokens=20, temperature=0, ignore_eos=True)
    expected = complete(shared_engine, repeating)
    scarce(torch.Tensor, "clone", always, 5)
    assert complete(engine, repeating) == expected


def test_a_step_without_memory_fails_its_sequences_and_no_other(tiny_model: Path, scarce: Scarce) -> None:
    engine = make_engine(tiny_model)
    scarce(engine.runner, "backend", always)
    results = drive(engine, [Visit(REQUESTS["greedy"]), Visit(REQUESTS["sampled"], comes=3)])
    assert isinstance(results["greedy"], RequestFailed)
    assert isinstance(results["sampled"], Completion)


def test_the_cache_stops_growing_and_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was used last is there, as much of it as there was memory for, and it is said once."""
    monkeypatch.setattr(slab, "_BLOCK_BYTES", 1)  # a row each
    cache, rows = PrefixCache([("cpu", 100 * 40)]), []

    def room(nbytes: int) -> None:
        rows.append(nbytes)
        if len(rows) > 5:
            raise MemoryError

    monkeypatch.setattr(slab, "check_room", room)
    for id in range(1, 30):
        cache.put("", [id], torch.full((10,), float(id)))
        cache.check()
    assert [snapshot.row[0].item() for snapshot in cache.snapshots()] == [25, 26, 27, 28, 29]
    assert capfd.readouterr().err.count("out of memory: the prefix cache on cpu does not grow beyond") == 1
    assert cache.ready(8), "it asks for more"
    monkeypatch.setattr("time.monotonic", lambda: 1e12)  # later
    rows.clear()
    cache.put("", [50], torch.ones(10))
    assert len(cache) == 6


def test_logits_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, scarce: Scarce) -> None:
    cache = PrefixCache([("cpu", 4000)])
    scarce(tier.Tier, "copy", lambda _, tensor: tensor.numel() == 3, 9)
    real = tier.Tier.copy

    def copy(self: tier.Tier, tensor: Any) -> Any:
        try:
            return real(self, tensor)
        except RuntimeError as error:
            raise MemoryError from error

    monkeypatch.setattr(tier.Tier, "copy", copy)
    snapshot = cache.put("", [1, 2], torch.ones(10), torch.ones(3))
    assert snapshot is not None
    assert snapshot.logits is None
    assert cache.put("", [1, 2], torch.ones(10), torch.ones(3)) is snapshot
    cache.check()


def test_a_cache_that_gives_way_begins_again(tiny_model: Path, alone: dict[str, Completion]) -> None:
    engine = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    complete(engine, REQUESTS["greedy"])
    engine.memory.give_way()
    assert len(engine.cache) == 0
    assert_idle(engine)
    assert complete(engine, REQUESTS["greedy"]) == alone["greedy"]
