"""HTTP/1.1 as uvicorn speaks it, with an end to how long the head of a request may be and may take to come."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from lattice_serve.engine.errors import EngineUnavailable, LatticeError, RequestError
from lattice_serve.server.connections import PROVEN, Connections
from lattice_serve.server.errors import HeaderTooLarge, TimedOut, error_json

MAX_HEAD_BYTES = 1 << 20
"""Beyond it the connection is closed. What is smaller, and larger than the settings have it, `Limits` answers."""

_LONGEST_URL = (1 << 16) - 1
"""Bytes that the parser of URLs takes."""

_BAD_REQUEST = 400
_NOT_IMPLEMENTED = 501
_STATUS_LINES = {
    _BAD_REQUEST: b"HTTP/1.1 400 Bad Request\r\n",
    TimedOut.status: b"HTTP/1.1 408 Request Timeout\r\n",
    HeaderTooLarge.status: b"HTTP/1.1 431 Request Header Fields Too Large\r\n",
    _NOT_IMPLEMENTED: b"HTTP/1.1 501 Not Implemented\r\n",
    EngineUnavailable.status: b"HTTP/1.1 503 Service Unavailable\r\n",
}
_OFFERS = (b"connection", b"upgrade", b"http2-settings")


class BadHead(RequestError):
    """A head that breaks a rule of HTTP/1.1 which the parser does not know."""


class UnknownCoding(RequestError):
    status = _NOT_IMPLEMENTED


class _UnchunkedCycle(RequestResponseCycle):
    """An answer to a client of HTTP/1.0, which knows no chunks: a body of unknown length ends with the connection."""

    _until_close = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            if b"content-length" not in names and self.scope["method"] != "HEAD":
                self._until_close = self.response_started = True
                lines = [b"%b: %b\r\n" % header for header in (*self.default_headers, *message["headers"])]
                head = STATUS_LINE[message["status"]] + b"".join(lines) + b"connection: close\r\n\r\n"
                self.transport.write(head)
                return
        elif self._until_close and message["type"] == "http.response.body":
            await self._write(message.get("body", b""), last=not message.get("more_body", False))
            return
        await super().send(message)

    async def _write(self, body: bytes, *, last: bool) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected or self.response_complete:
            return
        self.transport.write(body)
        if last:
            self.response_complete = True
            self.message_event.set()
            self.transport.close()
            self.on_response()


class BoundedProtocol(HttpToolsProtocol):
    """Counts the bytes and the seconds of heads and trailers that are not complete: a connection could keep any number
    of either. Declines other protocols. Its errors have the shape of all others."""

    head_seconds: float
    """What a head may take, and how long a new connection may be silent. See `bounded`."""
    open_connections: Connections
    """All of the server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending = 0
        """Bytes that are no part of a body, since the last complete request."""
        self._in_body = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()
        if not self.open_connections.open(self, transport.abort):
            self._refuse(
                EngineUnavailable.status,
                f"{self.open_connections.limit} connections are at work, as many as there may be: try again later",
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.open_connections.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)
        if self.transport.is_closing():
            return
        if self._pending > MAX_HEAD_BYTES:
            self._refuse(HeaderTooLarge.status, f"path and headers have more than {MAX_HEAD_BYTES} bytes")
        elif self._pending and not self._in_body and self._timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        self._pending = max(1, self._pending)  # It may have come with the end of the one before.
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # `_decline` comes next
        _check(self.headers, self.parser.get_http_version())
        self._stop_timer()
        self._in_body = True
        self.open_connections.begin(self)
        super().on_headers_complete()
        # The application sees this scope when it is its turn, which is later.
        self.scope["extensions"] = {PROVEN: {"call": lambda: self.open_connections.prove(self)}}
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnchunkedCycle  # which uvicorn makes itself, and asks nobody

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._pending = 0
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answer is None:  # else one that has come meanwhile is under way
            self.open_connections.end(self, self.transport.abort)
        if self._timer is not None:  # The next head has begun. What it waited behind the answer does not count.
            self._stop_timer()
            self._start_timer()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._decline(data[offer.args[0] :])
                continue
            except httptools.HttpParserError as error:
                cause = error.__context__ or error  # of an error in a callback, which says no more itself
                if isinstance(cause, LatticeError):
                    self._refuse(cause.status, cause.message)
                elif isinstance(cause, httptools.HttpParserInvalidURLError) and len(self.url) > _LONGEST_URL:
                    self._refuse(HeaderTooLarge.status, f"the path has more than {_LONGEST_URL} bytes")
                else:
                    self._refuse(_BAD_REQUEST, f"this is not HTTP/1.1: {cause}")
            return

    def _decline(self, rest: bytes) -> bytes:
        """What to read instead of a head that offers another protocol and the `rest`: the same without the offer.

        Java's HTTP client offers HTTP/2 by itself, and the parser ends at the head of such a request.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            self._refuse(_BAD_REQUEST, "this is no proxy: send the request to the server that it is for")
            return b""
        head = [method, b" ", self.url, b" HTTP/", version.encode(), b"\r\n"]
        for name, value in self.headers:
            if name not in _OFFERS:
                head += [name, b": ", value, b"\r\n"]
            elif name == b"connection" and b"close" in value.lower():
                head.append(b"connection: close\r\n")
        self.parser = httptools.HttpRequestParser(self)
        return b"".join(head) + b"\r\n" + rest

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        if self._answer is not None:
            self._start_timer()
        elif self._pending:
            self._refuse(TimedOut.status, f"path and headers did not come within {self.head_seconds:g} s")
        else:
            self.transport.close()

    @property
    def _answer(self) -> RequestResponseCycle | None:
        """That under way."""
        cycle: Any = self.cycle  # None at first, which uvicorn's annotation leaves out
        return None if cycle is None or cycle.response_complete else cycle

    def _refuse(self, status: int, message: str) -> None:
        # In the middle of an answer it would be taken for a part of it.
        if self._answer is None or not self._answer.response_started:
            body = error_json(message, status)
            head = f"connection: close\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
            self.transport.write(_STATUS_LINES[status] + head.encode() + body)
        self.transport.close()


def _check(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """Raises `BadHead` or `UnknownCoding` for what servers before or behind this one could read in two ways."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        raise BadHead(f"the head has {len(hosts)} Host headers: send one")
    codings = [
        coding.strip().lower()
        for name, value in headers
        if name == b"transfer-encoding"
        for coding in value.split(b",")
    ]
    if not codings or (codings == [b"chunked"] and version != "1.0"):
        return
    if version == "1.0" or codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        raise BadHead("the Transfer-Encoding does not say where the body ends: send `chunked`, or a Content-Length")
    raise UnknownCoding("the body has a transfer coding other than chunked: send it without")


def bounded(head_seconds: float, limit: int) -> type[BoundedProtocol]:
    """The protocol with that limit for heads, and of that many connections, for uvicorn, which makes the objects."""
    fields = {"head_seconds": head_seconds, "open_connections": Connections(limit)}
    return type("BoundedProtocol", (BoundedProtocol,), fields)
