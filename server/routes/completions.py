"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from lattice_serve.server import completion
from lattice_serve.server.schemas.completions import CompletionRequest
from lattice_serve.server.services import Injected
from lattice_serve.server.stream import EventStream, until_disconnect

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, services: Injected) -> Response:
    """Continue one or more prompts, whole or as a stream of server-sent events."""
    body = CompletionRequest.parse(await request.body())
    if body.stream:
        return EventStream(completion.stream(services, body), keep_alive_seconds=services.settings.keep_alive_seconds)
    answer = await until_disconnect(request.receive, completion.complete(services, body))
    return Response(answer, media_type="application/json")
