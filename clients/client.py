"""`Client` and `AsyncClient`: a lattice server's API, typed.

    with Client() as client:
        print(client.completions("Once upon a time", max_tokens=32).text)
        for chunk in client.chat("Who was there?", stream=True, max_tokens=32):
            print(chunk.text, end="", flush=True)

Both retry answers 429 and 503 up to `max_retries` times, after the seconds that the server asks for.
They raise `APIError` for the server's errors and `ConnectionFailed` where there is no whole answer.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, overload

import httpx

from lattice_serve.clients import wire
from lattice_serve.clients.errors import ConnectionFailed
from lattice_serve.clients.streams import AsyncStream, Stream
from lattice_serve.clients.types import ChatCompletion, Completion, Model, ModelList, Text, Tokens

DEFAULT_URL = "http://127.0.0.1:8000"
API_KEY_VARIABLE = "LATTICE_API_KEY"
CONNECT_SECONDS = 5.0


class Client:
    """A lattice server, for synchronous code. Usable from several threads.

    `api_key` defaults to the environment's LATTICE_API_KEY, `model` to the model that the server serves; `timeout` is
    the seconds to wait for the next bytes of an answer.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        model: str | None = None,
        max_retries: int = 2,
        timeout: float = 600.0,
    ) -> None:
        self.model = model
        self.max_retries = max_retries
        with wire.proxy_errors():
            self._http = httpx.Client(**_options(base_url, api_key, timeout, httpx.HTTPTransport))

    @overload
    def completions(self, prompt: wire.Prompt, *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    def completions(self, prompt: wire.Prompt, *, stream: Literal[True], **params: Any) -> Stream[Completion]: ...
    @overload
    def completions(self, prompt: wire.Prompt, *, stream: bool, **params: Any) -> Completion | Stream[Completion]: ...
    def completions(
        self, prompt: wire.Prompt, *, stream: bool = False, **params: Any
    ) -> Completion | Stream[Completion]:
        """Continue `prompt`: a string, token ids, or a list of either.

        `params` are fields of the request: `max_tokens`, `temperature`, `top_p`, `seed`, `stop`, `logprobs`, `n`, ...
        With `stream` the chunks come as they are made; the request has been accepted when this returns.
        """
        call = wire.completions(prompt, params.pop("model", self.model), stream, params)
        response = self._send(call, stream=stream)
        return Stream(response, Completion) if stream else wire.decode(response.content, Completion)

    @overload
    def chat(self, messages: wire.Messages, *, stream: Literal[False] = False, **params: Any) -> ChatCompletion: ...
    @overload
    def chat(self, messages: wire.Messages, *, stream: Literal[True], **params: Any) -> Stream[ChatCompletion]: ...
    @overload
    def chat(
        self, messages: wire.Messages, *, stream: bool, **params: Any
    ) -> ChatCompletion | Stream[ChatCompletion]: ...
    def chat(
        self, messages: wire.Messages, *, stream: bool = False, **params: Any
    ) -> ChatCompletion | Stream[ChatCompletion]:
        """Answer the last of `messages`, or a single one, given as a string. `params` and `stream` as above."""
        call = wire.chat(messages, params.pop("model", self.model), stream, params)
        response = self._send(call, stream=stream)
        return Stream(response, ChatCompletion) if stream else wire.decode(response.content, ChatCompletion)

    def models(self) -> list[Model]:
        return wire.decode(self._send(wire.MODELS).content, ModelList).data

    def tokenize(self, text: str) -> list[int]:
        return wire.decode(self._send(wire.tokenize(text)).content, Tokens).tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        return wire.decode(self._send(wire.detokenize(tokens)).content, Text).prompt

    def health(self) -> bool:
        """The server is there; whether it takes requests, `ready` says."""
        return self._answers(wire.HEALTH)

    def ready(self) -> bool:
        """The server takes requests now."""
        return self._answers(wire.READY)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, call: wire.Call) -> bool:
        with suppress(ConnectionFailed), wire.transport_errors():
            return self._http.request(call.method, call.path).is_success
        return False

    def _send(self, call: wire.Call, *, stream: bool = False) -> httpx.Response:
        for attempt in itertools.count():
            with wire.transport_errors():
                request = self._http.build_request(call.method, call.path, json=call.body)
                response = self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                body = response.read()
            wait = wire.retry_wait(response, attempt, self.max_retries)
            if wait is None:
                break
            time.sleep(wait)
        raise wire.error_of(response.status_code, body)


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors, awaited."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        model: str | None = None,
        max_retries: int = 2,
        timeout: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """transport: what carries the requests, in place of httpx's own."""
        self.model = model
        self.max_retries = max_retries
        options = _options(base_url, api_key, timeout, httpx.AsyncHTTPTransport)
        if transport is not None:
            options["transport"] = transport
        with wire.proxy_errors():
            self._http = httpx.AsyncClient(**options)

    @overload
    async def completions(
        self, prompt: wire.Prompt, *, stream: Literal[False] = False, **params: Any
    ) -> Completion: ...
    @overload
    async def completions(
        self, prompt: wire.Prompt, *, stream: Literal[True], **params: Any
    ) -> AsyncStream[Completion]: ...
    @overload
    async def completions(
        self, prompt: wire.Prompt, *, stream: bool, **params: Any
    ) -> Completion | AsyncStream[Completion]: ...
    async def completions(
        self, prompt: wire.Prompt, *, stream: bool = False, **params: Any
    ) -> Completion | AsyncStream[Completion]:
        """As `Client.completions`: `async for chunk in await client.completions(prompt, stream=True)`."""
        call = wire.completions(prompt, params.pop("model", self.model), stream, params)
        response = await self._send(call, stream=stream)
        return AsyncStream(response, Completion) if stream else wire.decode(response.content, Completion)

    @overload
    async def chat(
        self, messages: wire.Messages, *, stream: Literal[False] = False, **params: Any
    ) -> ChatCompletion: ...
    @overload
    async def chat(
        self, messages: wire.Messages, *, stream: Literal[True], **params: Any
    ) -> AsyncStream[ChatCompletion]: ...
    @overload
    async def chat(
        self, messages: wire.Messages, *, stream: bool, **params: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletion]: ...
    async def chat(
        self, messages: wire.Messages, *, stream: bool = False, **params: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletion]:
        """As `Client.chat`."""
        call = wire.chat(messages, params.pop("model", self.model), stream, params)
        response = await self._send(call, stream=stream)
        return AsyncStream(response, ChatCompletion) if stream else wire.decode(response.content, ChatCompletion)

    async def models(self) -> list[Model]:
        return wire.decode((await self._send(wire.MODELS)).content, ModelList).data

    async def tokenize(self, text: str) -> list[int]:
        return wire.decode((await self._send(wire.tokenize(text))).content, Tokens).tokens

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return wire.decode((await self._send(wire.detokenize(tokens))).content, Text).prompt

    async def health(self) -> bool:
        """The server is there; whether it takes requests, `ready` says."""
        return await self._answers(wire.HEALTH)

    async def ready(self) -> bool:
        """The server takes requests now."""
        return await self._answers(wire.READY)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _answers(self, call: wire.Call) -> bool:
        with suppress(ConnectionFailed), wire.transport_errors():
            return (await self._http.request(call.method, call.path)).is_success
        return False

    async def _send(self, call: wire.Call, *, stream: bool = False) -> httpx.Response:
        for attempt in itertools.count():
            with wire.transport_errors():
                request = self._http.build_request(call.method, call.path, json=call.body)
                response = await self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                body = await response.aread()
            wait = wire.retry_wait(response, attempt, self.max_retries)
            if wait is None:
                break
            await asyncio.sleep(wait)
        raise wire.error_of(response.status_code, body)


def _options(base_url: str, api_key: str | None, timeout: float, direct: Callable[..., Any]) -> dict[str, Any]:
    """Of httpx's clients. direct: the transport for a server before which no proxy stands."""
    # A server reads the same variable, and there it may name several keys.
    key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE, "").split(",")[0].strip()
    origin = wire.origin(base_url)
    # Who opens a thousand streams means it; the server bounds what it takes.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return {
        "base_url": origin,
        "headers": wire.headers(key),
        "timeout": httpx.Timeout(timeout, connect=CONNECT_SECONDS),
        "limits": limits,
        "transport": direct(limits=limits) if wire.is_direct(origin.host) else None,
    }
