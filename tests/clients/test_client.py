from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from lattice_serve.clients import wire
from lattice_serve.clients.client import AsyncClient, Client
from lattice_serve.clients.errors import APIError, ConnectionFailed
from lattice_serve.clients.streams import AsyncStream, Stream
from lattice_serve.clients.transport import LeanTransport
from lattice_serve.clients.types import ChatCompletion, Completion

if TYPE_CHECKING:
    from tests.clients.conftest import PlayedServer

TEXT = "Once upon\u2028 é!"


def _ask(url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    with Client(url, **options or {}) as client:
        answer = getattr(client, method)(*args, **kwargs)
        return list(answer) if isinstance(answer, Stream) else answer


def _ask_async(url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, **options or {}) as client:
            answer = await getattr(client, method)(*args, **kwargs)
            return [chunk async for chunk in answer] if isinstance(answer, AsyncStream) else answer

    return asyncio.run(ask())


def _ask_lean(*args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return _ask_async(*args, options={"transport": LeanTransport(), **(options or {})}, **kwargs)


@pytest.fixture(params=[_ask, _ask_async, _ask_lean], ids=["sync", "async", "lean"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls one method of a client and returns its answer, a stream as a list."""
    result: Callable[..., Any] = request.param
    return result


def test_a_whole_answer(ask: Callable[..., Any], played: PlayedServer) -> None:
    answer = ask(played.url, "completions", "Once", max_tokens=5, stop=["x"])
    assert isinstance(answer, Completion)
    assert answer.text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert played.bodies == [{"prompt": "Once", "stream": False, "max_tokens": 5, "stop": ["x"]}]


def test_a_stream(ask: Callable[..., Any], played: PlayedServer) -> None:
    chunks = ask(played.url, "completions", [1, 2], stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert [len(chunk.choices) for chunk in chunks] == [1, 1, 1, 1, 1, 0]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 5


def test_a_chat(ask: Callable[..., Any], played: PlayedServer) -> None:
    answer = ask(played.url, "chat", "Who?", max_tokens=5)
    assert isinstance(answer, ChatCompletion)
    assert (answer.text, answer.choices[0].finish_reason) == (TEXT, "stop")
    said = [{"role": "user", "content": "Who?"}]
    assert played.bodies == [{"messages": said, "stream": False, "max_tokens": 5}]
    chunks = ask(played.url, "chat", said, stream=True, stream_options={"include_usage": True}, model="a")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 5
    assert played.bodies[-1]["model"] == "a"


MODELS = [({}, {}, None), ({"model": "a"}, {}, "a"), ({"model": "a"}, {"model": "b"}, "b")]


@pytest.mark.parametrize(("options", "params", "sent"), MODELS)
def test_the_model_asked_for(
    ask: Callable[..., Any], played: PlayedServer, options: Any, params: Any, sent: str | None
) -> None:
    ask(played.url, "completions", "Once", options=options, **params)
    assert played.bodies[0].get("model") == sent


def test_the_other_routes(ask: Callable[..., Any], played: PlayedServer) -> None:
    assert [model.id for model in ask(played.url, "models")] == ["tiny"]
    assert ask(played.url, "tokenize", "five six") == [5, 6]
    assert ask(played.url, "detokenize", (5, 6)) == "five six"
    assert played.bodies[1:] == [{"prompt": "five six"}, {"tokens": [5, 6]}]


def test_health_and_readiness(ask: Callable[..., Any], played: PlayedServer) -> None:
    assert ask(played.url, "health")
    assert ask(played.url, "ready")
    played.refusals.append((503, "30"))
    assert not ask(played.url, "ready")


def test_nobody_there(ask: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert not ask(url, "health")
    with pytest.raises(ConnectionFailed, match=url):
        ask(url, "models")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://127.0.0.1:many"])
def test_an_address_that_is_none(ask: Callable[..., Any], url: str) -> None:
    with pytest.raises(ConnectionFailed):
        ask(url, "models")


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_retried_after_the_time_asked_for(
    ask: Callable[..., Any], played: PlayedServer, status: int
) -> None:
    played.refusals.append((status, "1"))
    start = time.monotonic()
    assert ask(played.url, "completions", "Once", stream=True)[0].text == "Once"
    assert time.monotonic() - start >= 1
    assert len(played.bodies) == 2


def test_retries_are_bounded(ask: Callable[..., Any], played: PlayedServer) -> None:
    played.refusals.extend([(429, "0")] * 9)
    with pytest.raises(APIError, match="refused") as caught:
        ask(played.url, "completions", "Once", options={"max_retries": 3})
    assert (caught.value.status, caught.value.message, caught.value.param) == (429, "refused", "prompt")
    assert len(played.bodies) == 4


def test_other_errors_are_not_retried(ask: Callable[..., Any], played: PlayedServer) -> None:
    played.refusals.append((400, "0"))
    with pytest.raises(APIError) as caught:
        ask(played.url, "completions", "Once", stream=True)
    assert caught.value.status == 400
    assert len(played.bodies) == 1


def test_an_answer_that_is_not_json(ask: Callable[..., Any], played: PlayedServer) -> None:
    with pytest.raises(APIError, match="Bad gateway") as caught:
        ask(played.url, "completions", "page")
    assert caught.value.status == 502


SCENES = [("error", APIError, "500: engine died"), ("drop", ConnectionFailed, "http://127")]


@pytest.mark.parametrize(("scene", "error", "message"), SCENES)
def test_a_stream_that_fails_gives_its_chunks_and_raises(
    played: PlayedServer, scene: str, error: type[Exception], message: str
) -> None:
    with Client(played.url) as client:
        stream = client.completions(scene, stream=True)
        assert [next(stream).text, next(stream).text] == ["Once", " upon"]
        with pytest.raises(error, match=message):
            next(stream)


@pytest.mark.parametrize("transport", [lambda: None, LeanTransport], ids=["httpx", "lean"])
@pytest.mark.parametrize(("scene", "error", "message"), SCENES)
async def test_an_async_stream_that_fails_gives_its_chunks_and_raises(
    played: PlayedServer, scene: str, error: type[Exception], message: str, transport: Callable[[], Any]
) -> None:
    async with AsyncClient(played.url, transport=transport()) as client:
        stream = await client.completions(scene, stream=True)
        assert [(await anext(stream)).text, (await anext(stream)).text] == ["Once", " upon"]
        with pytest.raises(error, match=message):
            await anext(stream)


@pytest.mark.parametrize("read", [0, 3])
@pytest.mark.parametrize("way", ["drop", "close"])
def test_a_stream_let_go_closes_its_connection(played: PlayedServer, read: int, way: str) -> None:
    with Client(played.url) as client:
        stream = client.completions("slow", stream=True)
        for _ in range(read):
            assert next(stream).text == "x"
        if way == "close":
            stream.close()
        else:
            del stream
        assert played.left.wait(5)
        assert client.completions("Once").text == TEXT


@pytest.mark.parametrize("read", [0, 3])
@pytest.mark.parametrize("way", ["drop", "close", "cancel"])
@pytest.mark.parametrize("transport", [lambda: None, LeanTransport], ids=["httpx", "lean"])
async def test_an_async_stream_let_go_closes_its_connection(
    played: PlayedServer, read: int, way: str, transport: Callable[[], Any]
) -> None:
    async with AsyncClient(played.url, transport=transport()) as client:
        stream = await client.completions("slow", stream=True)
        for _ in range(read):
            assert (await anext(stream)).text == "x"
        if way == "cancel":

            async def drain() -> None:
                async for _ in stream:
                    pass

            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(drain(), 0.1)
        elif way == "close":
            await stream.close()
        else:
            del stream
        assert await asyncio.to_thread(played.left.wait, 5)
        assert (await client.completions("Once")).text == TEXT


@pytest.mark.parametrize(
    ("given", "environment", "sent"),
    [(None, None, None), ("a", "b", "Bearer a"), (None, "b", "Bearer b"), (None, "b, c", "Bearer b"), ("", "b", None)],
)
def test_the_api_key(
    ask: Callable[..., Any],
    played: PlayedServer,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    environment: str | None,
    sent: str | None,
) -> None:
    if environment is not None:
        monkeypatch.setenv("LATTICE_API_KEY", environment)
    ask(played.url, "models", options={"api_key": given})
    assert played.keys == [sent]


def _refusal(status: int, retry_after: str | None) -> httpx.Response:
    return httpx.Response(status, headers={} if retry_after is None else {"retry-after": retry_after})


@pytest.mark.parametrize(
    ("status", "retry_after", "attempt", "low", "high"),
    [
        (429, "7", 0, 7, 7),
        (503, None, 0, 0.25, 0.5),
        (503, "Sun, 22 Nov 2026 00:00:00 GMT", 2, 1, 2),
        (429, None, 9, 15, 30),
    ],
)
def test_how_long_a_retry_waits(status: int, retry_after: str | None, attempt: int, low: float, high: float) -> None:
    wait = wire.retry_wait(_refusal(status, retry_after), attempt, max_retries=10)
    assert wait is not None
    assert low <= wait <= high


@pytest.mark.parametrize(("status", "retry_after", "attempt"), [(429, "31", 0), (500, "1", 0), (429, "1", 10)])
def test_when_there_is_no_retry(status: int, retry_after: str, attempt: int) -> None:
    assert wire.retry_wait(_refusal(status, retry_after), attempt, max_retries=10) is None


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"])
def test_an_openai_base_url_is_understood(url: str) -> None:
    assert str(wire.origin(url)) == "http://a:1"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_may_be_cut_anywhere(size: int) -> None:
    chunk = '{"id":"a","created":1,"model":"m","choices":[{"index":0,"text":"é\u2028"}]}'
    body = f": hi\n\nevent: x\ndata:{chunk}\n\ndata: {chunk}\r\n\r\ndata: [DONE]\n\n".encode()
    decoder = wire.ChunkDecoder(Completion)
    got = [chunk for i in range(0, len(body), size) for chunk in decoder.feed(body[i : i + size])]
    assert [chunk.text for chunk in got] == ["é\u2028"] * 2
    decoder.finish()


def test_a_stream_without_its_end_is_broken() -> None:
    with pytest.raises(ConnectionFailed, match="broke off"):
        wire.ChunkDecoder(Completion).finish()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "nothing"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_stands_before_a_server_of_this_machine(
    ask: Callable[..., Any], played: PlayedServer, proxy: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set_proxy(monkeypatch, proxy)
    assert ask(played.url.replace("127.0.0.1", host), "health")
    assert ask(played.url, "completions", "Once").text == TEXT


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("proxy", "message"), [("socks5://127.0.0.1:9", r"SOCKS proxy .*install httpx\[socks\]"), ("x://y", "that is none")]
)
def test_a_proxy_that_cannot_be_used_is_told(
    kind: Callable[..., Any], proxy: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    _set_proxy(monkeypatch, proxy)
    with pytest.raises(ConnectionFailed, match=message):
        kind("http://server.example")
    monkeypatch.setenv("NO_PROXY", "server.example")
    kind("http://server.example")


def test_others_are_reached_through_the_proxy(played: PlayedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_proxy(monkeypatch, played.url)
    with Client("http://server.example") as client:
        assert client.models()


def _set_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.9.0.1", True), ("::1", True), ("a.localhost", True), ("0.0.0.0", True), ("10.0.0.1", False), ("x", False)],
)
def test_addresses_of_this_machine(host: str, loopback: bool) -> None:
    assert wire.is_direct(host) == loopback
