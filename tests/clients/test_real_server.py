"""The clients against the server itself, in its own process; only the model is played."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from lattice_serve.clients.cli import main
from lattice_serve.clients.client import AsyncClient, Client
from lattice_serve.clients.errors import APIError
from tests.server.harness import ServerProcess, wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server"), max_waiting=0) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_whole_and_streamed_answers_agree(client: Client) -> None:
    whole = client.completions(["one", "two"], max_tokens=8, seed=1, logprobs=2)
    chunks = list(client.completions(["one", "two"], max_tokens=8, seed=1, logprobs=2, stream=True))
    assert len(chunks) == 16
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason == "length"
        assert choice.logprobs is not None
        probabilities = [part.logprobs.token_logprobs[0] for part in parts if part.logprobs is not None]
        assert probabilities == choice.logprobs.token_logprobs
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16


def test_a_chat_with_tools(client: Client) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    said = '!say <tool_call>{"name": "weather", "arguments": {"hot": true}}</tool_call>'
    (choice,) = client.chat(said, tools=[tool], max_tokens=99).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0]["function"] == {"name": "weather", "arguments": '{"hot": true}'}
    chunks = list(client.chat("!say Good day.", stream=True, max_tokens=99))
    assert "".join(chunk.text for chunk in chunks) == client.chat("!say Good day.", max_tokens=99).text == "Good day."


async def test_asked_asynchronously_it_answers_the_same(server: ServerProcess, client: Client) -> None:
    wanted = client.completions("one", max_tokens=8, seed=1).text
    async with AsyncClient(server.url + "/v1") as asynchronous:
        assert (await asynchronous.completions("one", max_tokens=8, seed=1)).text == wanted
        chunks = [chunk async for chunk in await asynchronous.completions("one", max_tokens=8, seed=1, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == wanted


def test_the_other_routes(client: Client) -> None:
    assert client.health()
    assert client.ready()
    assert [model.id for model in client.models()] == ["lattice"]
    assert client.detokenize(client.tokenize("It was a dark\nnight\u2028é")) == "It was a dark\nnight\u2028é"


@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_their_field(client: Client, stream: bool) -> None:
    with pytest.raises(APIError) as caught:
        client.completions("one", temperature=-1, stream=stream)
    assert (caught.value.status, caught.value.param) == (400, "temperature")


def test_an_error_in_the_middle_of_a_stream(client: Client) -> None:
    stream = client.completions("!fail-late NumericalError", max_tokens=8, stream=True)
    assert [len(next(stream).choices), len(next(stream).choices)] == [1, 1]
    with pytest.raises(APIError) as caught:
        next(stream)
    assert caught.value.status == 500


def test_a_full_server_refuses_and_a_stream_let_go_makes_room(server: ServerProcess, client: Client) -> None:
    streams = [client.completions(f"!slow {i}", max_tokens=500, stream=True) for i in range(8)]
    with Client(server.url, max_retries=0) as hasty, pytest.raises(APIError) as caught:
        hasty.completions("one")
    assert caught.value.status == 429
    del streams
    # The client asks again until there is room.
    assert client.completions("one", max_tokens=3).choices[0].finish_reason == "length"
    assert wait_for(lambda: server.metrics()["num_requests_running"] == 0)


def test_the_benchmark(server: ServerProcess) -> None:
    arguments = ["--concurrency", "2", "--requests", "4", "--prompt-tokens", "5", "--output-tokens", "6"]
    result = CliRunner().invoke(main, ["bench", "http", "--url", server.url, *arguments])
    assert result.exit_code == 0, result.output
    run = json.loads(result.stdout.splitlines()[-1])["runs"][0]
    assert (run["failed"], run["output_tokens"]) == (0, 24)
