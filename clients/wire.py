"""The protocol without the input and output: what to send, what an answer means, when to ask again.

`Client` and `AsyncClient` differ only in how they wait; everything else is here.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar
from urllib.request import proxy_bypass

import httpx
import msgspec

from lattice_serve.clients.errors import APIError, ConnectionFailed

Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Messages: TypeAlias = str | Sequence[Mapping[str, Any]]
T = TypeVar("T")

RETRIED = (429, 503)
LONGEST_WAIT = 30.0
"""Seconds. A server that asks for more is not waited for: its error is raised."""


class Call(NamedTuple):
    method: str
    path: str
    body: dict[str, Any] | None = None


def origin(base_url: str) -> httpx.URL:
    """The address without the `/v1` that OpenAI clients are given. Raises `ConnectionFailed` where it is none."""
    with transport_errors():
        return httpx.URL(base_url.rstrip("/").removesuffix("/v1"))


def is_direct(host: str) -> bool:
    """Whether no proxy stands before a host: it is this machine, or NO_PROXY names it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        here = host == "localhost" or host.endswith(".localhost")
    else:
        here = address.is_loopback or address.is_unspecified
    return here or bool(proxy_bypass(host))


def headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def completions(prompt: Prompt, model: str | None, stream: bool, params: Mapping[str, Any]) -> Call:
    """`model` is left out where it is None; the server then takes the one it serves."""
    return Call("POST", "/v1/completions", {**_named(model), "prompt": prompt, "stream": stream, **params})


def chat(messages: Messages, model: str | None, stream: bool, params: Mapping[str, Any]) -> Call:
    """A string is what the user says first."""
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return Call("POST", "/v1/chat/completions", {**_named(model), "messages": said, "stream": stream, **params})


def _named(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}


MODELS = Call("GET", "/v1/models")
HEALTH = Call("GET", "/health")
READY = Call("GET", "/ready")


def tokenize(text: str) -> Call:
    return Call("POST", "/tokenize", {"prompt": text})


def detokenize(tokens: Sequence[int]) -> Call:
    return Call("POST", "/detokenize", {"tokens": list(tokens)})


def decode(body: bytes, kind: type[T]) -> T:
    """Raises `ConnectionFailed` where `body` is not a `kind` in JSON: whatever answered is not a lattice server."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise ConnectionFailed(f"the answer is not a {kind.__name__}: {error}") from error


class _Fault(msgspec.Struct):
    message: str
    code: int | str | None = None
    param: str | None = None


class _Failure(msgspec.Struct):
    error: _Fault


def error_of(status: int, body: bytes) -> APIError:
    """The error that an answer, or an event of a stream, carries.

    The code in the body wins over `status`: that of a stream was sent before it failed. What has another shape, such
    as a proxy's page, is the message itself.
    """
    try:
        fault = msgspec.json.decode(body, type=_Failure).error
    except msgspec.MsgspecError:
        return APIError(status, body.decode("utf-8", "replace").strip()[:500] or "no message")
    return APIError(fault.code if isinstance(fault.code, int) else status, fault.message, fault.param)


def retry_wait(response: httpx.Response, attempt: int, max_retries: int) -> float | None:
    """Seconds to wait before asking again; None: take `response` as the answer. `attempt` counts from 0."""
    if response.status_code not in RETRIED or attempt >= max_retries:
        return None
    asked = response.headers.get("retry-after", "")
    # Its other form, a date, is sent by no server we know: it is treated as absent.
    if asked.isdecimal():
        return float(asked) if float(asked) <= LONGEST_WAIT else None
    # Clients refused together must not come back together.
    return float(min(0.5 * 2**attempt, LONGEST_WAIT)) * random.uniform(0.5, 1.0)


@contextmanager
def proxy_errors() -> Iterator[None]:
    """Turns what httpx raises for a proxy of the environment into `ConnectionFailed`."""
    try:
        yield
    except ImportError as error:  # httpx asks for socksio
        raise ConnectionFailed(
            "the environment names a SOCKS proxy (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY): "
            "install httpx[socks], or name the server's host in NO_PROXY"
        ) from error
    except (ValueError, httpx.InvalidURL) as error:
        raise ConnectionFailed(
            f"the environment names a proxy that is none (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY): {error}"
        ) from error


@contextmanager
def transport_errors() -> Iterator[None]:
    """Turns what httpx raises into `ConnectionFailed`, naming the address."""
    try:
        yield
    except httpx.ConnectError as error:
        raise ConnectionFailed(
            f"{error.request.url}: {error}: is a server there? `lattice serve` starts one"
        ) from error
    except httpx.HTTPError as error:
        try:
            where = f"{error.request.url}: "
        except RuntimeError:
            where = ""
        raise ConnectionFailed(f"{where}{str(error) or type(error).__name__}") from error
    except httpx.InvalidURL as error:
        raise ConnectionFailed(f"the address is wrong: {error}") from error


class ChunkDecoder(Generic[T]):
    """Bytes of a `text/event-stream` body in, chunks out, each a `kind`.

    Lines are split on the bytes CR and LF only: text may hold other characters that `str.splitlines` breaks at.
    """

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._pending = b""
        self._data: list[bytes] = []
        self.done = False

    def feed(self, block: bytes) -> Iterator[T]:
        """Yields the chunks that `block` completes. Raises `APIError` at an error event, after the chunks before it."""
        *lines, self._pending = (self._pending + block).split(b"\n")
        for line in lines:
            chunk = self._line(line.removesuffix(b"\r"))
            if chunk is not None:
                yield chunk
            if self.done:
                return

    def finish(self) -> None:
        """The body has ended. Raises `ConnectionFailed` where the stream had not."""
        if not self.done:
            raise ConnectionFailed("the stream broke off before its end")

    def _line(self, line: bytes) -> T | None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        # A comment keeps the connection alive; other fields are not used. An empty line ends an event.
        if line or not self._data:
            return None
        data = b"\n".join(self._data)
        self._data.clear()
        if data == b"[DONE]":
            self.done = True
            return None
        try:
            return msgspec.json.decode(data, type=self._kind)
        except msgspec.MsgspecError:
            raise error_of(500, data) from None
