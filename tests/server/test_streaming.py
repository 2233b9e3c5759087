"""`POST /v1/completions` as server-sent events, over a real connection."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable

import httpx
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from lattice_serve.server.stream import EventStream
from tests.server.harness import ServerProcess, events, wait_for


def test_a_chunk_for_each_token_then_done(server: ServerProcess) -> None:
    *chunks, done = server.stream("hello", max_tokens=5, seed=1)
    assert done == "[DONE]"
    assert len(chunks) == 5
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["length"]
    whole = server.complete("hello", max_tokens=5, seed=1)["choices"][0]["text"]
    assert "".join(choice["text"] for choice in choices) == whole
    assert all("usage" not in chunk for chunk in chunks)


def test_headers(server: ServerProcess) -> None:
    response = server.post(prompt="a", stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"]


def test_a_token_without_text_has_a_chunk(server: ServerProcess) -> None:
    *chunks, _ = server.stream("!utf8", max_tokens=3)
    assert [chunk["choices"][0]["text"] for chunk in chunks][:2] == ["", "é"]
    *chunks, _ = server.stream("!eos", max_tokens=9)
    assert len(chunks) == 4
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }


def test_usage_has_a_chunk_of_its_own(server: ServerProcess) -> None:
    *chunks, last, _ = server.stream("hello", max_tokens=3, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_continuous_usage_counts_up(server: ServerProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = server.stream("hello", max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


def test_every_choice_streams_under_its_index(server: ServerProcess) -> None:
    fields = {"n": 2, "seed": 5, "max_tokens": 4, "echo": True, "logprobs": 1}
    whole = server.complete(["one", "two"], **fields)["choices"]
    *chunks, _ = server.stream(["one", "two"], **fields)
    assert len(chunks) == 16
    for choice in whole:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, entries in choice["logprobs"].items():
            assert [entry for part in parts for entry in part["logprobs"][name]] == entries


def test_scoring_alone_is_one_chunk(server: ServerProcess) -> None:
    chunk, done = server.stream("hello", max_tokens=0, echo=True)
    assert chunk["choices"][0]["text"] == "hello"
    assert done == "[DONE]"


def test_a_failure_before_the_first_token_has_its_status(server: ServerProcess) -> None:
    response = server.post(prompt="!fail Overloaded", stream=True)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert server.post(prompt="!fail NumericalError", stream=True).status_code == 500
    assert server.post(prompt="!fail InvalidParameter").json()["error"]["param"] == "prompt"


def test_a_failure_after_it_is_an_event_that_ends_the_stream(server: ServerProcess) -> None:
    *chunks, last = server.stream("!fail-late NumericalError")
    assert len(chunks) == 2
    assert last["error"]["code"] == 500
    assert last["error"]["message"] == "told to: NumericalError"


def test_one_failed_sequence_ends_the_others(server: ServerProcess) -> None:
    assert server.post(prompt=["!stall", "!fail NumericalError"]).status_code == 500
    wait_until_idle(server)


def test_silence_is_filled_with_comments(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(keep_alive_seconds=0.02)
    text = server.post(prompt="!slow", max_tokens=3, stream=True).text
    assert ": keep-alive\n\n" in text
    assert len(events(text)) == 4


def test_tokens_are_sent_as_they_come(server: ServerProcess) -> None:
    arrivals = []
    body = {"prompt": "!slow", "stream": True, "max_tokens": 6}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.monotonic())
    assert arrivals[-1] - arrivals[0] > 0.15


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["!slow", "!stall"])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_client_that_goes_away_frees_its_row(server: ServerProcess, route: str, prompt: str, stream: bool) -> None:
    submits, aborts = len(server.records("submit")), len(server.records("abort"))
    asked = {"prompt": prompt} if route == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    body = json.dumps({**asked, "n": 2, "stream": stream, "max_tokens": 1000})
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as connection:
        head = f"POST /v1/{route} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        wait_for(lambda: len(server.records("submit")) == submits + 2)
        if stream and prompt == "!slow":
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: len(server.records("abort")) == aborts + 2, seconds=1)
    wait_until_idle(server)


def wait_until_idle(server: ServerProcess, seconds: float = 1) -> None:
    def idle() -> bool:
        metrics = server.metrics()
        return metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0

    wait_for(idle, seconds)


async def test_comments_keep_their_place_beside_a_slow_client() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        await asyncio.sleep(0.03)
        sent.append(message)

    async def produce() -> AsyncGenerator[bytes, None]:
        for event in (b"1", b"2"):
            yield event
            await asyncio.sleep(0.1)

    await EventStream(produce(), keep_alive_seconds=0.01, stall_seconds=60)({}, forever, send)
    kinds = [message.get("body", b"start") for message in sent]
    assert kinds[:2] == [b"start", b"data: 1\n\n"]
    assert kinds[-2:] == [b"data: [DONE]\n\n", b""]
    assert 1 <= kinds.count(b": keep-alive\n\n") == len(kinds) - 5
    assert [message.get("more_body", True) for message in sent] == [True] * (len(sent) - 1) + [False]
    assert len(asyncio.all_tasks()) == 1, "nothing is left of it"


async def test_a_client_that_takes_nothing_is_gone() -> None:
    closed = asyncio.Event()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def produce() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"1"
        finally:
            closed.set()

    stream = EventStream(produce(), keep_alive_seconds=0.02, stall_seconds=0.1)
    with pytest.raises(ClientDisconnect):
        await asyncio.wait_for(stream({}, forever, send), 20)
    assert closed.is_set()
    # Where nothing is produced either, it is a comment that is not taken.
    stream = EventStream(nothing(), keep_alive_seconds=0.02, stall_seconds=0.1)
    with pytest.raises(ClientDisconnect):
        await asyncio.wait_for(stream({}, forever, send), 20)


def test_a_reader_that_stops_frees_its_row(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(request_seconds=0.3, keep_alive_seconds=0.1)
    body = json.dumps({"prompt": "hello", "stream": True, "max_tokens": 2**31 - 1, "logprobs": 20, "echo": True})
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_for(lambda: server.records("abort"))
        wait_until_idle(server, seconds=20)  # a flood of tokens is on its way: this is no test of speed
    assert [line["level"] for line in server.log_lines() if "does not take" in line["event"]] == ["warning"]


def test_a_slow_reader_pauses_its_sequence_and_loses_nothing(server: ServerProcess) -> None:
    fields = {"prompt": "hello", "max_tokens": 12_000, "seed": 3}
    whole = server.complete(**fields)["choices"][0]
    wait_until_idle(server)
    before = server.metrics()["generation_tokens_total"]
    body = json.dumps({**fields, "logprobs": 20, "stream": True})
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        counts = [-1.0, 0.0]
        while counts[-1] != counts[-2] or not counts[-1]:
            assert len(counts) < 200, "waited in vain"
            time.sleep(0.3)
            counts.append(server.metrics()["generation_tokens_total"] - before)
        assert counts[-1] < 11_000, "what the kernel's buffers hold, and the window"
        assert server.complete("hello", max_tokens=50)["usage"]["completion_tokens"] == 50, "others go on"
        with connection.makefile("rb") as stream:
            text = stream.read().decode()
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert len(chunks) == 12_000


def test_an_answer_that_is_taken_as_it_comes_is_not_paused(server: ServerProcess) -> None:
    """A whole one always is, however long: its windows are used up twice here."""
    choices = server.complete("hello", n=4, max_tokens=2000)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 4


def test_the_scores_of_a_long_prompt_come_in_pieces(server: ServerProcess) -> None:
    fields = {"prompt": list(range(300, 600)), "echo": True, "logprobs": 2, "max_tokens": 2}
    whole = server.complete(**fields)["choices"][0]
    *chunks, _ = server.stream(**fields)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [len(part["logprobs"]["tokens"]) for part in parts] == [64, 64, 64, 64, 45, 1]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, entries in whole["logprobs"].items():
        assert [entry for part in parts for entry in part["logprobs"][name]] == entries


async def forever() -> Message:
    await asyncio.sleep(60)
    raise AssertionError("nobody goes away")


async def nothing() -> AsyncGenerator[bytes, None]:
    await asyncio.sleep(60)
    yield b"1"
