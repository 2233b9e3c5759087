"""Errors as HTTP: the leaves of `engine.errors` that only a server raises, and the shape clients see.

RequestError (engine.errors)
├── Unauthorized    401  no API key, or a wrong one
├── TimedOut        408  the answer was not complete within the timeout that its request gave
│   └── BodyTimedOut     the body was not, within the time that a server gives it
├── BodyTooLarge    413  the body is larger than the server takes
├── Encoded         415  the body is compressed
└── HeaderTooLarge  431  the request line and headers are
Overloaded (engine.errors)
└── KeyQuota        429  the waiting queue is full, and the API key has its share of it
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lattice_serve.engine.errors import InvalidParameter, LatticeError, Overloaded, RequestError
from lattice_serve.server.event_json import event_json

STATUSES = {
    400: "The request cannot be served as it is: `param` names the field at fault.",
    401: "No API key, or a wrong one.",
    404: "There is no such model, or no such route.",
    405: "The route does not take that method.",
    408: "The answer took longer than the `timeout` of its request, or the body too long to come.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "Too many requests wait: come back after `Retry-After` seconds.",
    431: "Path and headers are too large.",
    500: "The engine failed at this request.",
    503: "The engine is starting or out of memory, or the server shuts down: come back after `Retry-After` seconds.",
}
"""What the statuses of errors mean to a client."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class Unauthorized(RequestError):
    status = 401


class TimedOut(RequestError):
    status = 408


class BodyTimedOut(TimedOut):
    pass


class BodyTooLarge(RequestError):
    status = 413


class Encoded(RequestError):
    status = 415


class HeaderTooLarge(RequestError):
    status = 431


class KeyQuota(Overloaded):
    pass


class Fault(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int
    """The HTTP status."""


class Failure(msgspec.Struct):
    """The OpenAI error object."""

    error: Fault


def error_type(status: int) -> str:
    """OpenAI's name of the kind of error."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_json(message: str, status: int, param: str | None = None) -> bytes:
    return event_json(Failure(Fault(message, error_type(status), param, status)))


def error_response(error: Exception) -> Response:
    """`error` as an answer; what is not a `LatticeError` is a 500 that tells nothing about it."""
    if not isinstance(error, LatticeError):
        return _respond(error_json("internal error: see the server's log", 500), 500, {})
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, TimedOut):
        headers["x-should-retry"] = "false"  # Clients of OpenAI's take a 408 for a reason to ask again.
    if isinstance(error, Unauthorized | BodyTimedOut | BodyTooLarge | Encoded | HeaderTooLarge):
        headers["connection"] = "close"  # The rest of the body is not wanted.
    return _respond(error_json(error.message, error.status, error.param), error.status, headers)


def _respond(content: bytes, status: int, headers: Mapping[str, str]) -> Response:
    return Response(content, status, headers, media_type="application/json")


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    remedy = error.detail
    if error.status_code == 404:
        remedy = "there is no such route: GET /openapi.json lists those there are"
    elif error.status_code == 405:
        remedy = f"the route does not take that method: send {headers.get('Allow', 'another')}"
    message = f"{request.method} {request.url.path[:200]}: {remedy}"
    return _respond(error_json(message, error.status_code), error.status_code, headers)


def _on_invalid_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    name = str(fault["loc"][-1])
    return error_response(InvalidParameter(f"{name}: {fault['msg']}", param=name))


def install_handlers(app: FastAPI) -> None:
    """Give every error that a route raises the OpenAI shape."""
    app.add_exception_handler(LatticeError, lambda _, error: error_response(error))
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
