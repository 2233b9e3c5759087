"""HTTP/1.1 as uvicorn speaks it, with an end to how long the head of a request may be."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lattice_serve.server.errors import HeaderTooLarge, error_json

MAX_HEAD_BYTES = 1 << 20
"""Beyond it the connection is closed. What is smaller, and larger than the settings have it, `Limits` answers."""


class BoundedProtocol(HttpToolsProtocol):
    """Counts the bytes of heads and trailers that are not complete: the parser would keep any number of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending = 0

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEAD_BYTES and not self.transport.is_closing():
            body = error_json(f"path and headers have more than {MAX_HEAD_BYTES} bytes", HeaderTooLarge.status)
            head = f"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: {len(body)}"
            self.transport.write(head.encode() + b"\r\ncontent-type: application/json\r\n\r\n" + body)
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        super().on_message_complete()
