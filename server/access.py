"""One structured log line a request, never with its content; request ids; the last resort for errors."""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lattice_serve.server.errors import error_response

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_CLIENT_GONE = 499
_PROBES = frozenset({"/health", "/ready", "/ping", "/metrics"})


class AccessLog:
    """ASGI middleware: sends `X-Request-Id` (the client's own if it gave a sane one) and logs each request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status: int | None = None

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, tagged)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception as error:
            log.exception("request failed", request_id=request_id)
            if status is None:
                await error_response(error)(scope, receive, tagged)
        finally:
            write = log.debug if scope["path"] in _PROBES else log.info
            write(
                "request",
                method=scope["method"],
                path=scope["raw_path"][:200].decode("latin-1"),
                status=status,
                seconds=round(time.perf_counter() - started, 4),
                request_id=request_id,
            )
