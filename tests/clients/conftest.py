"""A small server on loopback that speaks the wire protocol and fails on demand."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
import uvicorn

Scope: TypeAlias = dict[str, Any]

PIECES = ("Once", " upon", "\u2028", " é", "!")
"""A streamed answer; it holds a line separator, which is no end of line for an event stream."""


@dataclass
class PlayedServer:
    """Answers as a lattice server would; `refusals` (status, Retry-After) come first, one a request.

    Prompts of one word play scenes: "error" and "drop" fail after two chunks, "slow" goes on until the client leaves,
    "short" ends a chunk early, "late" sends the finish reason in a chunk of its own.
    """

    url: str = ""
    refusals: deque[tuple[int, str | None]] = field(default_factory=deque)
    bodies: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a client goes away in the middle of a stream."""

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        self.keys.append(dict(scope["headers"]).get(b"authorization", b"").decode() or None)
        self.bodies.append(json.loads(body) if body else None)
        if self.refusals:
            status, retry_after = self.refusals.popleft()
            headers = [] if retry_after is None else [(b"retry-after", retry_after.encode())]
            error = {"error": {"message": "refused", "type": "t", "param": "prompt", "code": status}}
            await _respond(send, error, status, headers)
        elif scope["path"] == "/v1/completions":
            await self._complete(self.bodies[-1], receive, send)
        elif scope["path"] == "/v1/chat/completions":
            await self._chat(self.bodies[-1], send)
        else:
            answers: dict[str, Any] = {
                "/v1/models": {
                    "object": "list",
                    "data": [{"id": "tiny", "object": "model", "created": 1, "root": "tiny"}],
                },
                "/tokenize": {"tokens": [5, 6], "count": 2, "max_model_len": 9},
                "/detokenize": {"prompt": "five six"},
                "/health": {"status": "ok"},
                "/ready": {"status": "ready"},
            }
            await _respond(send, answers[scope["path"]])

    async def _complete(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        pieces = list(PIECES[: body.get("max_tokens", len(PIECES))])
        scene = body["prompt"]
        if scene == "page":
            await _respond(send, "<h1>Bad gateway</h1>", 502)
            return
        if not body["stream"]:
            await _respond(send, _chunk("".join(pieces), "stop", usage=len(pieces)))
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        if scene == "slow":
            await self._until_left(receive, send)
            return
        for index, piece in enumerate(pieces):
            if index == 2 and scene == "error":
                await _event(send, {"error": {"message": "engine died", "type": "t", "param": None, "code": 500}})
                break
            if index == 2 and scene == "drop":
                raise ConnectionAbortedError("played")
            last = index == len(pieces) - 1
            await _event(send, _chunk(piece, "length" if last and scene != "late" else None))
        else:
            if scene == "late":
                await _event(send, _chunk("", "length"))
            if body.get("stream_options", {}).get("include_usage"):
                made = len(pieces) - (scene == "short")
                await _event(send, _chunk("", None, usage=made) | {"choices": []})
            await _part(send, b": keep-alive\r\n\r\ndata: [DONE]\r\n\r\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chat(self, body: dict[str, Any], send: Any) -> None:
        if not body["stream"]:
            choice = {"index": 0, "message": {"role": "assistant", "content": "".join(PIECES)}, "finish_reason": "stop"}
            await _respond(send, _chunk("", None, usage=len(PIECES)) | {"choices": [choice]})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for delta in ({"role": "assistant", "content": ""}, *({"content": piece} for piece in PIECES)):
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            await _event(send, _chunk("", None) | {"choices": [choice]})
        await _event(send, _chunk("", None) | {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        await _event(send, _chunk("", None, usage=len(PIECES)) | {"choices": []})
        await _part(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _until_left(self, receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await _event(send, _chunk("x", None))
            await asyncio.wait({gone}, timeout=0.02)
        assert gone.result()["type"] == "http.disconnect"
        self.left.set()


def _chunk(text: str, finish_reason: str | None, usage: int | None = None) -> dict[str, Any]:
    made = {"prompt_tokens": 3, "completion_tokens": usage, "total_tokens": 3 + (usage or 0)}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}],
        "usage": made if usage is not None else None,
        "a_field_of_tomorrow": True,
    }


async def _respond(send: Any, answer: Any, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
    await send({"type": "http.response.start", "status": status, "headers": headers or []})
    await send({"type": "http.response.body", "body": body})


async def _event(send: Any, value: Any) -> None:
    # In two parts: what a client reads at once need not be whole events, nor whole characters.
    data = b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
    middle = data.find("é".encode()) + 1 or len(data) // 2
    await _part(send, data[:middle])
    await _part(send, data[middle:])


async def _part(send: Any, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LATTICE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def played() -> Iterator[PlayedServer]:
    played = PlayedServer()
    config = uvicorn.Config(played, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        played.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield played
        server.should_exit = True
        thread.join()
