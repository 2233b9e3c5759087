"""What a request must pass before any route sees it: the API key, the size of its head and body, and time."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lattice_serve.engine.errors import LatticeError
from lattice_serve.server.connections import PROVEN
from lattice_serve.server.errors import (
    BodyTimedOut,
    BodyTooLarge,
    Encoded,
    HeaderTooLarge,
    Unauthorized,
    error_response,
)
from lattice_serve.server.keys import tenant_of
from lattice_serve.server.memory import MemoryBudget

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
"""Probes ask these without a key."""


class Limits:
    """ASGI middleware: 401 without a key that is in `api_keys` (none: no key needed), 413 for large bodies, 408 for
    slow ones, 415 for compressed ones, 431 for large heads, 429 where bodies and what is made of them fill `memory`.

    A body that says it is too large is let pass unseen; one that does not say is read up to the limit. A head that does
    not end is the protocol's matter, see `server.protocol`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[bytes],
        max_body_bytes: int,
        memory: MemoryBudget,
        max_header_bytes: int,
        body_seconds: float,
    ) -> None:
        self._app = app
        self._api_keys = api_keys
        self._max_body_bytes = max_body_bytes
        self._memory = memory
        self._max_header_bytes = max_header_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["tenant"] = ""
        try:
            self._check_head(scope)
            if scope["path"] not in OPEN_PATHS:
                scope["state"]["tenant"] = self._check_key(headers)
                if PROVEN in scope.get("extensions", ()):
                    scope["extensions"][PROVEN]["call"]()
            self._check_size(int(headers.get("content-length", 0)))
            encoding = headers.get("content-encoding", "identity")
            if encoding.lower() != "identity":
                raise Encoded(f"content-encoding is {encoding[:100]!r}: send the body as it is, without one")
        except LatticeError as error:
            await error_response(error)(scope, receive, _lingering(receive, send, self._body_seconds))
            return
        size = 0
        deadline: float | None = time.monotonic() + self._body_seconds
        """None: the body is complete."""

        async def counted() -> Message:
            nonlocal size, deadline
            if deadline is None:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError as error:
                raise BodyTimedOut(f"the body did not come within {self._body_seconds:g} s: send it sooner") from error
            size += len(message.get("body", b""))
            self._check_size(size)
            held.hold(len(message.get("body", b"")))
            if not message.get("more_body"):
                deadline = None
            return message

        with self._memory.request() as held:
            await self._app(scope, counted, send)

    def _check_head(self, scope: Scope) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes:
            raise HeaderTooLarge(f"path and headers have more than {self._max_header_bytes} bytes: send fewer of them")

    def _check_key(self, headers: Headers) -> str:
        """The tenant whose key it is."""
        if not self._api_keys:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared, so that the time taken does not say which one came close.
        matches = [hmac.compare_digest(given, known) for known in self._api_keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("give a valid API key in the header `Authorization: Bearer KEY`")
        return tenant_of(given)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise BodyTooLarge(f"the body has more than {self._max_body_bytes} bytes: send less in one request")


def _lingering(receive: Receive, send: Send, seconds: float) -> Send:
    """`send` for an answer in one piece that does not end before the body of its request does, or the time for it.

    Many clients do not read an answer while they send, and lose it when the connection is closed on them.
    """

    async def discard() -> None:
        while (await receive()).get("more_body"):
            pass

    async def lingering(message: Message) -> None:
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(discard(), seconds)
            message = {"type": "http.response.body"}
        await send(message)

    return lingering
