"""Embeddings of a real engine, over HTTP."""

from __future__ import annotations

import math

from lattice_serve.engine.llm import LLM
from lattice_serve.engine.weights import bundled_model
from tests.e2e.harness import RealServer


def test_vectors_are_the_models(server: RealServer) -> None:
    texts = ["It was a dark night", "She said", "It was a dark night"]
    data = server.http.post("/v1/embeddings", json={"input": texts}).raise_for_status().json()["data"]
    vectors = [entry["embedding"] for entry in data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-6) for vector in vectors)


def test_a_long_list_is_as_each_alone(server: RealServer) -> None:
    """Of texts, and of prompts: many more than there are rows."""
    texts = [f"Text {index % 40}" for index in range(200)]
    data = server.http.post("/v1/embeddings", json={"input": texts}).raise_for_status().json()["data"]
    assert [entry["index"] for entry in data] == list(range(200))
    assert [entry["embedding"] for entry in data[:40]] * 5 == [entry["embedding"] for entry in data]
    choices = server.complete(texts[:60], max_tokens=3, seed=1)["choices"]
    alone = [server.complete(text, max_tokens=3, seed=1)["choices"][0]["text"] for text in texts[:60:7]]
    assert [choice["text"] for choice in choices[::7]] == alone


def test_like_texts_are_nearer() -> None:
    """The bundled model has learned something of what texts are about."""
    a, b, c = LLM(bundled_model()).embed(
        [
            "The ship sailed over the sea, and the sailors sang.",
            "The sailors of the vessel looked at the waves of the ocean.",
            "The judge asked the lawyer for the papers of the court.",
        ],
        progress=False,
    )

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(map(float.__mul__, x, y)) / math.hypot(*x) / math.hypot(*y)

    assert cosine(a, b) > cosine(a, c)
