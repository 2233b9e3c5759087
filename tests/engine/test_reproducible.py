"""The same seed and prompt give the same tokens and the same log-probabilities, to the bit, whatever else goes on.

Each request is run alone first, its prompt in one piece; then with others, with prompts cut into pieces, with too few
rows, in another order, beside requests that are aborted.
"""

from __future__ import annotations

from array import array
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from lattice_serve.engine import memory as memory_module
from lattice_serve.engine import prefix_cache
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import Submit
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.weights import bundled_model
from lattice_serve.kernels.decoder import cpu as decoder
from lattice_serve.kernels.numba.features import Products, available_products
from tests.engine.harness import Visit, complete, drive, make_engine, submit
from tests.tiny import VOCAB_SIZE


@cache
def whole_engine(model: Path, dtype: str) -> Engine:
    """One that takes any prompt of these tests in one step."""
    return make_engine(model, dtype=dtype, max_rows=1, max_step_tokens=512)


def check(model: Path, visits: list[Visit], dtype: str = "auto", **options: Any) -> Engine:
    """Assert that each answer is what it is alone. Returns the engine that gave them."""
    engine = make_engine(model, dtype=dtype, **options)
    results = drive(engine, visits)
    for visit in visits:
        request_id = visit.request.request_id
        if visit.leaves is None or request_id in results:
            assert results[request_id] == alone(model, dtype, visit.request)
    return engine


_answers: dict[tuple[Path, str, bytes, bytes], Completion] = {}


def alone(model: Path, dtype: str, request: Submit) -> Completion:
    key = model, dtype, request.prompt_ids.tobytes(), msgspec.msgpack.encode(request.params)
    if key not in _answers:
        _answers[key] = complete(whole_engine(model, dtype), request)
    return _answers[key]


sampling: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 10),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "temperature": st.sampled_from([0.0, 0.6, 1.0, 1.0, 3.0]),
        "logprobs": st.sampled_from([0, 0, 3]),
        "ignore_eos": st.just(True),
    },
    optional={
        "prompt_logprobs": st.integers(0, 2),
        "top_p": st.sampled_from([0.3, 0.9]),
        "top_k": st.integers(1, 50),
        "min_p": st.sampled_from([0.01, 0.3]),
        "presence_penalty": st.sampled_from([-1.0, 2.0]),
        "frequency_penalty": st.sampled_from([-1.0, 2.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
        "logit_bias": st.just({300: 4.0, 301: 4.0}),
        "stop": st.just(("e", "th")),
    },
)
prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=45)


parts = st.sampled_from([[5], [9, 9], list(range(20, 31)), [7] * 6])
related = st.lists(parts, min_size=1, max_size=4).map(lambda chosen: [token for part in chosen for token in part])
"""Prompts that often begin alike."""


@st.composite
def visit(draw: st.DrawFn, prompts: st.SearchStrategy[list[int]] = prompts) -> Visit:
    params = SamplingParams(**draw(sampling))
    comes = draw(st.integers(0, 12))
    leaves = draw(st.none() | st.none() | st.integers(comes, comes + 12))
    return Visit(Submit("", array("i", draw(prompts)), params, draw(st.integers(-1, 1))), comes, leaves)


@st.composite
def crowds(draw: st.DrawFn, prompts: st.SearchStrategy[list[int]] = prompts) -> list[Visit]:
    visits = draw(st.lists(visit(prompts), min_size=1, max_size=5))
    return [
        Visit(msgspec.structs.replace(visit.request, request_id=f"r{i}"), visit.comes, visit.leaves)
        for i, visit in enumerate(visits)
    ]


@st.composite
def engine_options(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.integers(1, 4))
    return {
        "max_rows": rows,
        "max_step_tokens": draw(st.integers(rows, 24)),
        "quantum": draw(st.integers(1, 6)),
        "dtype": draw(st.sampled_from(["bfloat16", "float32"])),
        "speculative_tokens": draw(st.sampled_from([0, 1, 5])),
    }


@settings(max_examples=40)
@given(crowds(), engine_options())
def test_an_answer_is_its_own(tiny_model: Path, visits: list[Visit], options: dict[str, Any]) -> None:
    engine = check(tiny_model, visits, **options)
    event("preempted" if engine.scheduler.preemptions else "not preempted")
    event("drafts were right" if engine.stats().accepted_tokens_total else "no draft was right")


@settings(max_examples=40)
@given(
    st.lists(crowds(related), min_size=1, max_size=3),
    engine_options(),
    st.sampled_from([12_000, 40_000, 1 << 30]),
    st.sampled_from([0.0, 1.0]),
)
def test_an_answer_does_not_depend_on_what_is_cached(
    tiny_model: Path, rounds: list[list[Visit]], options: dict[str, Any], memory: int, tidy_seconds: float
) -> None:
    """Nor on where: in rows as long as those suffice, or put away after every step."""
    engine = make_engine(tiny_model, prefix_cache_memory=memory, **options)
    with patch.object(prefix_cache, "FIRST_INTERVAL", 4), patch.object(memory_module, "_TIDY_SECONDS", tidy_seconds):
        for visits in rounds:
            results = drive(engine, visits)
            for visit in visits:
                if visit.leaves is None or visit.request.request_id in results:
                    assert results[visit.request.request_id] == alone(tiny_model, options["dtype"], visit.request)
    event("hit" if engine.cache.outcomes["hit"] else "no hit")


def requests(lengths: list[int]) -> list[Submit]:
    return [
        submit(
            f"r{i}",
            [(7 + 131 * i + 17 * k) % VOCAB_SIZE for k in range(length)],
            max_tokens=14,
            seed=i,
            temperature=0.9,
            logprobs=2,
            prompt_logprobs=1 if i % 2 else None,
            ignore_eos=True,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 4, 5, 7, 16, 17, 64])
def test_any_split_of_a_prompt(tiny_model: Path, max_step_tokens: int, dtype: str) -> None:
    request = requests([0, 37])[1]
    check(tiny_model, [Visit(request)], dtype, max_rows=1, max_step_tokens=max_step_tokens)


@pytest.mark.parametrize(
    ("quantization", "products"),
    [(None, each) for each in available_products("bfloat16")] + [("int8", each) for each in available_products("int8")],
)
def test_any_split_and_batch_by_all_that_multiplies_here(
    tiny_model: Path, quantization: str | None, products: Products
) -> None:
    with patch.object(decoder, "available_products", lambda _: (products,)):
        engines = [
            make_engine(tiny_model, max_rows=rows, max_step_tokens=n, quantization=quantization)
            for rows, n in ((1, 512), (4, 7), (2, 33))
        ]
    crowd = requests(LENGTHS)
    expected = {request.request_id: complete(engines[0], request) for request in crowd}
    for engine in engines[1:]:
        assert drive(engine, [Visit(request) for request in crowd]) == expected


LENGTHS = [1, 30, 16, 3]


@pytest.fixture(params=["tiny", "bundled"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Path:
    return tiny_model if request.param == "tiny" else bundled_model()


def test_preemption_at_every_step(model: Path) -> None:
    engine = check(model, [Visit(r) for r in requests(LENGTHS)], max_rows=2, max_step_tokens=7, quantum=1)
    assert engine.scheduler.preemptions > 20


def test_any_order_of_arrival(model: Path) -> None:
    crowd = requests(LENGTHS)
    check(model, [Visit(r) for r in crowd], max_step_tokens=64)
    check(model, [Visit(r, comes=3 * i) for i, r in enumerate(crowd[::-1])])


def test_beside_requests_that_are_aborted(model: Path) -> None:
    stay, *leave = requests(LENGTHS)
    check(model, [Visit(stay), *(Visit(r, comes=i, leaves=3 * i + 3) for i, r in enumerate(leave))], quantum=2)


def test_the_priority_does_not_show(tiny_model: Path) -> None:
    crowd = [msgspec.structs.replace(r, priority=-i) for i, r in enumerate(requests(LENGTHS))]
    engine = check(tiny_model, [Visit(r, comes=2 * i) for i, r in enumerate(crowd)], max_rows=1)
    assert engine.scheduler.preemptions == 3
