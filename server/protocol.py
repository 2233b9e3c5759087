"""HTTP/1.1 as uvicorn speaks it, with an end to how long the head of a request may be and may take to come."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from lattice_serve.server.errors import HeaderTooLarge, TimedOut, error_json

MAX_HEAD_BYTES = 1 << 20
"""Beyond it the connection is closed. What is smaller, and larger than the settings have it, `Limits` answers."""

_LONGEST_URL = (1 << 16) - 1
"""Bytes that the parser of URLs takes."""

_BAD_REQUEST = 400
_STATUS_LINES = {
    _BAD_REQUEST: b"HTTP/1.1 400 Bad Request\r\n",
    TimedOut.status: b"HTTP/1.1 408 Request Timeout\r\n",
    HeaderTooLarge.status: b"HTTP/1.1 431 Request Header Fields Too Large\r\n",
}
_OFFERS = (b"connection", b"upgrade", b"http2-settings")


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending = 0
        """Bytes that are no part of a body, since the last complete request."""
        self._in_body = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
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
        self._stop_timer()
        self._in_body = True
        super().on_headers_complete()
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
                if isinstance(cause, httptools.HttpParserInvalidURLError) and len(self.url) > _LONGEST_URL:
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


def bounded(head_seconds: float) -> type[BoundedProtocol]:
    """The protocol with that limit, for uvicorn, which makes the objects."""
    return type("BoundedProtocol", (BoundedProtocol,), {"head_seconds": head_seconds})
