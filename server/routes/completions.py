"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from lattice_serve.server.answer import respond
from lattice_serve.server.completion import CompletionAnswer
from lattice_serve.server.openapi import body, generated
from lattice_serve.server.schemas.completions import Completion, CompletionRequest
from lattice_serve.server.services import Injected

router = APIRouter()


@router.post(
    "/v1/completions", openapi_extra=body(CompletionRequest), responses=generated(Completion, chunk=Completion)
)
async def create_completion(request: Request, services: Injected) -> Response:
    """Continue one or more prompts, whole or as a stream of server-sent events."""
    asked = await services.read(CompletionRequest, request)
    return await respond(CompletionAnswer, services, asked, request)
