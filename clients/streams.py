"""Streamed answers: closing one, or letting it go, closes its connection, and the server stops working on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

import httpx

from lattice_serve.clients import wire

C = TypeVar("C")
"""A chunk."""


class Stream(Iterator[C], Generic[C]):
    """The chunks of one answer."""

    def __init__(self, response: httpx.Response, kind: type[C]) -> None:
        self._response = response
        # Module functions, not methods: a cycle through `self` would put off `__del__` until the collector runs.
        self._chunks = _chunks(response, kind)

    def __next__(self) -> C:
        try:
            return next(self._chunks)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> Stream[C]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncStream(AsyncIterator[C], Generic[C]):
    """`Stream` for asyncio: closed at its end, by `close`, by `async with`, or when it is let go."""

    def __init__(self, response: httpx.Response, kind: type[C]) -> None:
        self._response = response
        self._chunks = _chunks_async(response, kind)
        self._loop = asyncio.get_running_loop()

    async def __anext__(self) -> C:
        try:
            return await anext(self._chunks)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await self._response.aclose()

    async def __aenter__(self) -> AsyncStream[C]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if not self._response.is_closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_close_soon, self._response)


def _chunks(response: httpx.Response, kind: type[C]) -> Iterator[C]:
    decoder = wire.ChunkDecoder(kind)
    with wire.transport_errors():
        for block in response.iter_bytes():
            yield from decoder.feed(block)
    decoder.finish()


async def _chunks_async(response: httpx.Response, kind: type[C]) -> AsyncIterator[C]:
    decoder = wire.ChunkDecoder(kind)
    with wire.transport_errors():
        async for block in response.aiter_bytes():
            for chunk in decoder.feed(block):
                yield chunk
    decoder.finish()


_closing: set[asyncio.Task[None]] = set()
"""The loop holds its tasks weakly; these must not go before they are done."""


def _close_soon(response: httpx.Response) -> None:
    task = asyncio.get_running_loop().create_task(response.aclose())
    _closing.add(task)
    task.add_done_callback(_closing.discard)
