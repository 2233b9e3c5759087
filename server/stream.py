"""Answers that can end early: server-sent events, and work that stops when its client goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
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
_SLICE = 1 << 16
"""Bytes of an answer that are given to the connection at once, which waits where it has as many."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises `ClientDisconnect`, with `work` cancelled, when the client goes away first."""
    return await _until(_disconnect(receive), work=work)


async def _until(*ends: Coroutine[Any, Any, None], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises `ClientDisconnect`, with `work` cancelled, when one of `ends` comes first."""
    task = asyncio.create_task(work)
    others = [asyncio.create_task(end) for end in ends]
    try:
        await asyncio.wait({task, *others}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        for each in (task, *others):
            each.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class PacedResponse(Response):
    """JSON, sent no faster than its client takes it. Raises `ClientDisconnect` when that takes nothing for too long."""

    media_type = "application/json"

    def __init__(self, content: bytes, *, stall_seconds: float) -> None:
        """stall_seconds: as for `EventStream`."""
        super().__init__(content)
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self.body) <= _SLICE:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), _SLICE):
            await self._send(send, bytes(self.body[start : start + _SLICE]), start + _SLICE < len(self.body))

    async def _send(self, send: Send, data: bytes, more: bool) -> None:
        try:
            sending = send({"type": "http.response.body", "body": data, "more_body": more})
            await asyncio.wait_for(sending, self._stall_seconds)
        except asyncio.TimeoutError as error:
            log.warning("a client does not take its answer", seconds=self._stall_seconds)
            raise ClientDisconnect from error


class JsonStream(PacedResponse):
    """JSON that is made in pieces while it is sent."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], *, stall_seconds: float) -> None:
        """stall_seconds: as for `EventStream`."""
        super().__init__(b"", stall_seconds=stall_seconds)
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                await self._send(send, piece, True)
                await asyncio.sleep(0)  # a send that need not wait goes on at once
        await self._send(send, b"", False)


class EventStream(Response):
    """JSON `events` as server-sent events, then `[DONE]`.

    The status is sent with the first event or keep-alive comment, so an error before it is answered as for any other
    route; an error after it becomes an error event, which ends the stream.
    """

    _prefix = b"data: "
    _done = _DONE

    def __init__(self, events: AsyncGenerator[bytes, None], *, keep_alive_seconds: float, stall_seconds: float) -> None:
        """stall_seconds: how long the client may take none of it; then it counts as gone."""
        self.status_code = 200
        self.background = None
        self._events = events
        self._keep_alive_seconds = keep_alive_seconds
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(send, self._keep_alive_seconds, self._stall_seconds)
        await _until(_disconnect(receive), body.watch(), work=self._send(body))

    async def _send(self, body: _Body) -> None:
        async with aclosing(self._events) as events:
            last = self._done
            try:
                async for event in events:
                    await body.send(self._prefix + event + b"\n\n")
            except LatticeError as error:
                if not body.started:
                    raise
                last = self._failed(error)
            except Exception:
                if not body.started:
                    raise
                log.exception("stream failed")
                last = self._failed(LatticeError("internal error: see the server's log"))
            await body.end(last)

    def _failed(self, error: LatticeError) -> bytes:
        """The end of a stream that `error` ends."""
        return b"data: " + error_json(error.message, error.status, error.param) + b"\n\n"


class NamedEventStream(EventStream):
    """Events that begin with lines of their own, before their JSON, and have no `[DONE]` after them."""

    _prefix = b""
    _done = b""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[LatticeError], bytes],
        *,
        keep_alive_seconds: float,
        stall_seconds: float,
    ) -> None:
        """failed: makes the events that end the stream when an error does."""
        super().__init__(events, keep_alive_seconds=keep_alive_seconds, stall_seconds=stall_seconds)
        self._make_failed = failed

    def _failed(self, error: LatticeError) -> bytes:
        return self._make_failed(error)


class _Body:
    """What is sent of a stream. Two tasks write to it: one the events, one the comments between them."""

    def __init__(self, send: Send, keep_alive_seconds: float, stall_seconds: float) -> None:
        self.started = self._ended = False
        self._send = send
        self._keep_alive_seconds = keep_alive_seconds
        self._stall_seconds = stall_seconds
        self._last = time.monotonic()
        """When the last write began."""
        # Without it a comment could overtake the status, or follow the end, while that waits for a slow client.
        self._lock = asyncio.Lock()

    async def send(self, data: bytes) -> None:
        async with self._lock:
            await self._write(data)

    async def end(self, data: bytes) -> None:
        async with self._lock:
            self._ended = True
            await self._write(data)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def watch(self) -> None:
        """Fill silence with comments. Returns when the client takes nothing: what waits for it would pile up."""
        # A timer for many events, for one for each took a third of this process's time.
        while True:
            waits = self._lock.locked()
            rest = self._last + (self._stall_seconds if waits else self._keep_alive_seconds) - time.monotonic()
            if rest > 0:
                await asyncio.sleep(min(rest, self._keep_alive_seconds))
            elif waits or not await self._comment():
                break
        log.warning("a client does not take its stream", seconds=self._stall_seconds)

    async def _comment(self) -> bool:
        """Whether the client takes it in time."""
        # Not `wait_for`, which may lose that it is cancelled.
        writing = asyncio.create_task(self._write_comment())
        try:
            return bool((await asyncio.wait({writing}, timeout=self._stall_seconds))[0])
        finally:
            writing.cancel()

    async def _write_comment(self) -> None:
        async with self._lock:
            if not self._ended and time.monotonic() - self._last >= self._keep_alive_seconds:
                await self._write(_KEEP_ALIVE)

    async def _write(self, data: bytes) -> None:
        self._last = time.monotonic()
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
