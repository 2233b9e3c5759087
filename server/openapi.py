"""The OpenAPI description of the routes, made from the models that read requests and write answers."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from lattice_serve.server.errors import STATUSES, Failure
from lattice_serve.server.schemas.base import RequestModel
from lattice_serve.server.schemas.chat import ChatChunk, ChatCompletion, ChatRequest
from lattice_serve.server.schemas.completions import Completion, CompletionRequest
from lattice_serve.server.schemas.embeddings import EmbeddingRequest, Embeddings
from lattice_serve.server.schemas.responses import ResponseObject, ResponseRequest
from lattice_serve.server.schemas.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest

_REF = "#/components/schemas/{}"
_BODIES = (
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    ResponseRequest,
    TokenizeRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
)
_ANSWERS = (Completion, ChatCompletion, ChatChunk, Embeddings, ResponseObject, Failure)
_ALWAYS = (401, 405, 408, 413, 415, 431, 500)
"""What any route may answer."""


def body(*models: type[RequestModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that parses one of `models` itself."""
    schema: dict[str, Any] = {"anyOf": [_ref(model) for model in models]} if len(models) > 1 else _ref(models[0])
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def generated(answer: type[msgspec.Struct], chunk: type[msgspec.Struct]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer is whole or streamed."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}, "text/event-stream": {}}
    description = f"The answer, whole, or streamed as events, each with a {chunk.__name__}."
    return {200: {"description": description, "content": content}} | failures(400, 404, 429, 503)


def answered(answer: type[msgspec.Struct]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer is whole, by the engine."""
    content = {"application/json": {"schema": _ref(answer)}}
    return {200: {"description": "The answer.", "content": content}} | failures(400, 404, 429, 503)


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may fail so."""
    content = {"application/json": {"schema": _ref(Failure)}}
    return {status: {"description": STATUSES[status], "content": content} for status in statuses}


@cache
def describe(app: FastAPI, *, with_key: bool) -> dict[str, Any]:
    """The whole description. with_key: whether requests need an API key."""
    description: dict[str, Any] = get_openapi(
        title="lattice-serve", version=version("lattice-serve"), description=app.description, routes=app.routes
    )
    _, parsed = models_json_schema([(model, "validation") for model in _BODIES], ref_template=_REF.format("{model}"))
    _, written = msgspec.json.schema_components(_ANSWERS, ref_template=_REF.format("{name}"))
    description["components"] = {"schemas": parsed["$defs"] | written}
    for path in description["paths"].values():
        for operation in path.values():
            # What fastapi's own validation would answer; here every such fault is a 400.
            operation["responses"].pop("422", None)
            operation["responses"] |= {str(status): answer for status, answer in failures(*_ALWAYS).items()}
    if with_key:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    return description


def _ref(model: type) -> dict[str, str]:
    return {"$ref": _REF.format(model.__name__)}
