"""The model that ships, on as many threads as there are cores."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lattice_serve.engine.weights import bundled_model
from tests.e2e.harness import RealServer, choices, random_request


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with RealServer(tmp_path_factory.mktemp("bundled"), bundled_model(), threads=None) as server:
        yield server


def test_its_first_token_comes_within_a_second_and_the_text_is_english(bundled: RealServer) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 100, "temperature": 0.7, "seed": 1, "ignore_eos": True}
    asked = time.monotonic()
    bundled.chunks(body, cut_after=1)
    assert time.monotonic() - asked < 1
    words = bundled.complete(**body)["choices"][0]["text"].lower().split()
    assert len({"the", "and", "of", "a", "to", "in", "was", "i", "it", "he", "she", "that"} & set(words)) >= 4


def test_it_chats_in_turns(bundled: RealServer) -> None:
    """It knows nothing, but keeps to its part of the transcript."""
    messages = [{"role": "system", "content": "A talk in a garden."}]
    for question in ("Who is there?", "And where is the key?", "Good night!"):
        messages.append({"role": "user", "content": question})
        body = {"messages": messages, "max_tokens": 60, "temperature": 0.7, "seed": 3}
        answer = bundled.post("/v1/chat/completions", **body).json()
        text = answer["choices"][0]["message"]["content"]
        assert text.strip()
        assert "\nUser:" not in text
        messages.append({"role": "assistant", "content": text})


def test_its_answers_are_the_same_alone_and_together(bundled: RealServer, pool: ThreadPoolExecutor) -> None:
    draw = random.Random(12)
    bodies = [random_request(draw) for _ in range(16)]
    together = list(pool.map(bundled.chunks, bodies, timeout=120))
    for body, chunks in zip(bodies, together, strict=True):
        assert choices(bundled.chunks(body)) == choices(chunks), body
