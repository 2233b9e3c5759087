"""A transport for httpx on asyncio and httptools: an event of a stream costs a small part of what httpx's own takes.

For the benchmark, which must not be slower than what it measures. HTTP/1.1, a connection a request, kept for the next.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, TypeAlias, cast

import httptools
import httpx

_Origin: TypeAlias = tuple[str, str, int]

_PORTS = {"http": 80, "https": 443}


class LeanTransport(httpx.AsyncBaseTransport):
    """For one event loop. Raises httpx's errors; of its time limits it keeps those to connect and to the head."""

    def __init__(self) -> None:
        self._idle: dict[_Origin, list[_Connection]] = {}
        self._tls: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url, limits = request.url, request.extensions.get("timeout", {})
        if url.scheme not in _PORTS:
            raise httpx.UnsupportedProtocol(f"{url.scheme}: is nothing that is spoken here", request=request)
        origin = url.scheme, url.host, url.port or _PORTS[url.scheme]
        lines = [b"%s %s HTTP/1.1" % (request.method.encode(), url.raw_path)]
        lines += [b"%s: %s" % header for header in request.headers.raw]
        data = b"\r\n".join((*lines, b"", await request.aread()))
        connection = self._take(origin)
        while True:
            kept, connection = connection is not None, connection or await self._connect(request, origin, limits)
            try:
                connection.send(data)
                await asyncio.wait_for(connection.head, limits.get("read"))
                break
            except BaseException as error:
                connection.close()
                if isinstance(error, ConnectionError) and kept and not connection.heard:
                    connection = None  # the server had given it up; llama.cpp's does, though it says that it keeps it
                    continue
                if isinstance(error, asyncio.TimeoutError):
                    raise httpx.ReadTimeout("the answer did not begin in time", request=request) from error
                if isinstance(error, OSError):
                    raise httpx.ReadError(str(error), request=request) from error
                raise
        stream = _Body(connection, self._idle.setdefault(origin, []), request)
        return httpx.Response(connection.status, headers=connection.headers, stream=stream)

    async def aclose(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    def _take(self, origin: _Origin) -> _Connection | None:
        """One that is open still."""
        connections = self._idle.get(origin, [])
        while connections:
            connection = connections.pop()
            if not connection.closed:
                return connection
        return None

    async def _connect(self, request: httpx.Request, origin: _Origin, limits: dict[str, float | None]) -> _Connection:
        scheme, host, port = origin
        loop = asyncio.get_running_loop()
        if scheme == "https" and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            tls = self._tls if scheme == "https" else None
            opening = loop.create_connection(lambda: _Connection(loop), host, port, ssl=tls)
            _, connection = await asyncio.wait_for(opening, limits.get("connect"))
        except asyncio.TimeoutError as error:
            raise httpx.ConnectTimeout("no connection in time", request=request) from error
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        return connection


class _Connection(asyncio.Protocol):
    """One request after another; what httptools calls is named as it says."""

    _LENGTHS = frozenset({b"content-length", b"transfer-encoding"})

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.closed = False
        self.done = True

    def send(self, data: bytes) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.head: asyncio.Future[None] = self._loop.create_future()
        self.blocks: deque[bytes] = deque()
        self.heard = self.done = False
        self._waiting: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(data)

    def close(self) -> None:
        self.closed = True
        self._transport.close()

    @property
    def status(self) -> int:
        return int(self._parser.get_status_code())

    async def more(self) -> None:
        """Until there is a block, or no more."""
        if not self.blocks and not self.done and not self.closed:
            self._waiting = self._loop.create_future()
            await self._waiting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.connection_lost(error)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self.done:
            return
        if not self.head.done():
            self.head.set_exception(ConnectionError(str(error or "the server closed the connection")))
        elif error is None and not self._LENGTHS.intersection(name.lower() for name, _ in self.headers):
            self.done = True  # such a body ends with its connection
        self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if not self.head.done():  # nobody may wait for it any more
            self.head.set_result(None)

    def on_body(self, data: bytes) -> None:
        self.blocks.append(data)
        self._wake()

    def on_message_complete(self) -> None:
        self.done = True
        if not self._parser.should_keep_alive():
            self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Body(httpx.AsyncByteStream):
    """The body of an answer; after its end the connection is for others, if it is left before it is closed."""

    def __init__(self, connection: _Connection, idle: list[_Connection], request: httpx.Request) -> None:
        self._connection: Any = connection
        self._idle, self._request = idle, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while True:
            while connection.blocks:
                yield connection.blocks.popleft()
            if connection.done:
                return
            if connection.closed:
                raise httpx.RemoteProtocolError("the connection was lost in the middle of it", request=self._request)
            await connection.more()

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None or connection.closed:
            return
        if connection.done:
            self._idle.append(connection)
        else:
            connection.close()
