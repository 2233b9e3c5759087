"""The official client and our own, unchanged, against the real thing."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

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


def test_openai_chat(server: RealServer) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Answer in rhyme."},
        {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
    ]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(
            model="lattice", messages=messages, max_tokens=24, seed=4, logprobs=True, top_logprobs=2
        )
        stream = client.chat.completions.create(
            model="lattice",
            messages=messages,
            max_tokens=24,
            seed=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = stream
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert last.usage is not None
        # The transcript is a prompt as any other.
        prompt = "System: Answer in rhyme.\nUser: Who are you?\nAssistant:"
        same = client.completions.create(model="lattice", prompt=prompt, max_tokens=24, seed=4, logprobs=2)
        assert whole.usage is not None
        assert same.usage is not None
        assert {usage.total_tokens for usage in (whole.usage, last.usage, same.usage)} == {last.usage.total_tokens}
        assert same.choices[0].text.removeprefix(" ") == text
        scores, logprobs = whole.choices[0].logprobs, same.choices[0].logprobs
        assert scores is not None
        assert scores.content is not None
        assert logprobs is not None
        assert [score.logprob for score in scores.content] == logprobs.token_logprobs


async def test_openai_chat_asynchronous(server: RealServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        whole = await client.chat.completions.create(
            model="lattice", messages=[{"role": "user", "content": "Hello"}], max_tokens=12, seed=4, n=2
        )
        stream = await client.chat.completions.create(
            model="lattice", messages=[{"role": "user", "content": "Hello"}], max_tokens=12, seed=4, n=2, stream=True
        )
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]


MODE = {"type": "object", "properties": {"mode": {"enum": ["day", "night"]}}, "required": ["mode"]}


def test_openai_tools(server: RealServer) -> None:
    tools: list[ChatCompletionToolParam] = [
        {"type": "function", "function": {"name": name, "parameters": {**MODE, "additionalProperties": False}}}
        for name in ("light", "alarm")
    ]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for seed in range(4):
            with client.chat.completions.stream(
                model="lattice",
                messages=[{"role": "user", "content": "Good night!"}],
                tools=tools,
                tool_choice="required",
                parallel_tool_calls=False,
                seed=seed,
            ) as stream:
                final = stream.get_final_completion().choices[0]
            assert final.finish_reason == "tool_calls"
            assert final.message.tool_calls is not None
            (call,) = final.message.tool_calls
            assert call.function.name in ("light", "alarm")
            assert json.loads(call.function.arguments)["mode"] in ("day", "night")
        named = client.chat.completions.create(
            model="lattice",
            messages=[{"role": "user", "content": "Good night!"}],
            tools=tools,
            tool_choice={"type": "function", "function": {"name": "alarm"}},
        )
        calls = named.choices[0].message.tool_calls
        assert calls is not None
        assert [call.function.name for call in calls if call.type == "function"] == ["alarm"]


def test_openai_response_format(server: RealServer) -> None:
    class Mode(pydantic.BaseModel):
        mode: Literal["day", "night"]

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.parse(
            model="lattice", messages=[{"role": "user", "content": "Which?"}], response_format=Mode
        )
        parsed = answer.choices[0].message.parsed
        assert parsed is not None
        assert parsed.mode in ("day", "night")


def test_the_best_of_several_and_scores_of_the_prompt(server: RealServer) -> None:
    several = [server.complete("Once", max_tokens=8, seed=seed, logprobs=0)["choices"][0] for seed in range(4)]
    means = [statistics.fmean(each["logprobs"]["token_logprobs"]) for each in several]
    best = server.complete("Once", max_tokens=8, seed=0, best_of=4)["choices"][0]
    assert best["text"] == several[means.index(max(means))]["text"]
    scored = server.complete("Once upon", max_tokens=1, prompt_logprobs=1, echo=True, logprobs=1)["choices"][0]
    assert [None if each is None else next(iter(each.values()))["logprob"] for each in scored["prompt_logprobs"]] == (
        scored["logprobs"]["token_logprobs"][:-1]
    )


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
