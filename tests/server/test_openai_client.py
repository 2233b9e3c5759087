"""The official client, unchanged."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.server.harness import ServerProcess


@pytest.fixture
def url(server: ServerProcess) -> str:
    return f"{server.url}/v1"


def test_sync(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["lattice"]
        assert client.models.retrieve("lattice").id == "lattice"
        answer = client.completions.create(model="lattice", prompt=["a", "b"], max_tokens=4, logprobs=1, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.token_logprobs == [-0.5] * 4
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16


def test_sync_stream(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        whole = client.completions.create(model="lattice", prompt="a", seed=1).choices[0].text
        stream = client.completions.create(
            model="lattice", prompt="a", seed=1, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = stream
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole
        assert len(chunks) == 16
        assert last.usage is not None
        assert last.usage.completion_tokens == 16


def test_chat(url: str) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "!eos"}]
    with openai.OpenAI(base_url=url, api_key="none") as client:
        answer = client.chat.completions.create(
            model="lattice", messages=messages, n=2, seed=1, logprobs=True, top_logprobs=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        choice = answer.choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(entry.token for entry in choice.logprobs.content[:-1]) == choice.message.content
        # Its own reading of the stream, which checks each event.
        with client.chat.completions.stream(
            model="lattice", messages=messages, seed=1, stream_options={"include_usage": True}
        ) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert kinds.count("content.delta") == 5  # of them one with the role
        assert final.choices[0].message.content == choice.message.content
        assert final.usage is not None
        assert final.usage.completion_tokens == 4


async def test_streamed_tool_calls(url: str) -> None:
    add: ChatCompletionToolParam = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "add", "arguments": {"a": [1, 2]}}</tool_call>'
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        async with client.chat.completions.stream(
            model="lattice", messages=[{"role": "user", "content": f"!say {call}{call}"}], tools=[add]
        ) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert kinds.count("tool_calls.function.arguments.done") == 2
        assert final.choices[0].finish_reason == "tool_calls"
        calls = final.choices[0].message.tool_calls
        assert calls is not None
        assert [each.function.arguments for each in calls] == ['{"a": [1, 2]}'] * 2
        assert len({each.id for each in calls}) == 2


def test_it_does_not_repeat_what_timed_out(server: ServerProcess, url: str) -> None:
    submits = len(server.records("submit"))
    with openai.OpenAI(base_url=url, api_key="none") as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="lattice", prompt="!stall", extra_body={"timeout": 0.1})
    assert caught.value.status_code == 408
    assert len(server.records("submit")) == submits + 1


async def test_async_and_stream(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        whole = await client.completions.create(model="lattice", prompt=[5, 6, 7], seed=1)
        stream = await client.completions.create(model="lattice", prompt=[5, 6, 7], seed=1, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


def test_errors_become_its_own(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="lattice", prompt="a", temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="a")
        with pytest.raises(openai.APIError, match="told to"):
            list(client.completions.create(model="lattice", prompt="!fail-late NumericalError", stream=True))


def test_it_outlives_the_engine(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        with pytest.raises(openai.APIError):
            list(client.completions.create(model="lattice", prompt="!exit-late", stream=True))
        # 503 with Retry-After until the engine is back: the client waits and tries again by itself.
        assert client.completions.create(model="lattice", prompt="a").choices[0].text


def test_its_api_key_is_the_server_s(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(api_key="secret")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
        assert client.completions.create(model="lattice", prompt="a").choices
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
