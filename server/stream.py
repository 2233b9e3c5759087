"""Answers that can end early: server-sent events, and work that stops when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lattice_serve.engine.errors import LatticeError
from lattice_serve.server.errors import error_json

log = structlog.get_logger(__name__)

T = TypeVar("T")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises `ClientDisconnect`, with `work` cancelled, when the client goes away first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """JSON `events` as server-sent events, then `[DONE]`.

    The status is sent with the first event or keep-alive comment, so an error before it is answered as for any other
    route; an error after it becomes an error event, which ends the stream.
    """

    _prefix = b"data: "
    _done = _DONE

    def __init__(self, events: AsyncGenerator[bytes, None], *, keep_alive_seconds: float) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            started = False
            try:
                async with aclosing(_paced(events, self._keep_alive_seconds)) as paced:
                    async for event in paced:
                        if not started:
                            started = True
                            await send({"type": "http.response.start", "status": self.status_code, "headers": _HEADERS})
                        await (
                            _send_part(send, _KEEP_ALIVE) if event is None else _send_event(send, event, self._prefix)
                        )
                await _send_part(send, self._done)
            except LatticeError as error:
                if not started:
                    raise
                await _send_event(send, error_json(error.message, error.status, error.param))
            except Exception:
                if not started:
                    raise
                log.exception("stream failed")
                await _send_event(send, error_json("internal error: see the server's log", 500))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class NamedEventStream(EventStream):
    """Events that begin with lines of their own, before their JSON, and have no `[DONE]` after them."""

    _prefix = b""
    _done = b""


async def _send_event(send: Send, data: bytes, prefix: bytes = b"data: ") -> None:
    await _send_part(send, prefix + data + b"\n\n")


async def _send_part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _paced(events: AsyncIterator[bytes], seconds: float) -> AsyncGenerator[bytes | None, None]:
    """`events`, and a None for each stretch of `seconds` without one."""
    while True:
        # A task, for a timeout must not cancel the generator it waits for.
        pending = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                yield None
        finally:
            pending.cancel()
            await asyncio.wait({pending})
        event = pending.result()
        if event is None:
            return
        yield event
