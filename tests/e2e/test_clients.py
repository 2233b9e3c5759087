"""The official client and our own, unchanged, against the real thing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lattice_serve.clients.client import AsyncClient, Client
from lattice_serve.engine.llm import LLM
from tests.e2e.harness import RealServer, random_ids

SAMPLING: dict[str, Any] = {"max_tokens": 24, "seed": 4, "temperature": 0.8}


@pytest.fixture
def text(server: RealServer) -> str:
    """What every client has to get for "Once" with `SAMPLING`."""
    answer: str = server.complete("Once", **SAMPLING)["choices"][0]["text"]
    return answer


@pytest.fixture
def client(server: RealServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_openai(server: RealServer, text: str) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        [model] = client.models.list()
        whole = client.completions.create(model=model.id, prompt="Once", max_tokens=24, seed=4, temperature=0.8)
        assert whole.choices[0].text == text
        *chunks, last = client.completions.create(
            model=model.id,
            prompt="Once",
            max_tokens=24,
            seed=4,
            temperature=0.8,
            stream=True,
            stream_options={"include_usage": True},
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert last.usage == whole.usage
        with pytest.raises(openai.BadRequestError, match="prompt"):
            client.completions.create(model=model.id, prompt=[4096])


async def test_openai_asynchronous(server: RealServer, text: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        whole = await client.completions.create(
            model="lattice", prompt="Once", max_tokens=24, seed=4, temperature=0.8, logprobs=2, echo=True
        )
        choice = whole.choices[0]
        assert choice.text == "Once" + text
        assert whole.usage is not None
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.token_logprobs) == whole.usage.total_tokens
        stream = await client.completions.create(
            model="lattice", prompt="Once", max_tokens=24, seed=4, temperature=0.8, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in stream]) == text


def test_client(client: Client, text: str) -> None:
    ids = client.tokenize("Once")
    assert client.detokenize(ids) == "Once"
    assert client.ready()
    assert client.completions("Once", **SAMPLING).text == text
    assert client.completions(ids, **SAMPLING).text == text
    assert "".join(chunk.text for chunk in client.completions("Once", stream=True, **SAMPLING)) == text


async def test_client_asynchronous(server: RealServer, text: str) -> None:
    async with AsyncClient(server.url) as client:
        assert (await client.completions("Once", **SAMPLING)).text == text
        stream = await client.completions("Once", stream=True, **SAMPLING)
        assert "".join([chunk.text async for chunk in stream]) == text


def test_scores_of_a_prompt_are_those_of_the_engine_in_process(client: Client, model: Path) -> None:
    ids = random_ids(random.Random(1), 300)
    scored = client.completions(ids, echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert scored is not None
    assert scored.token_logprobs == [None, *LLM(model).score(ids)]
