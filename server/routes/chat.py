"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from lattice_serve.server.answer import respond
from lattice_serve.server.chat import ChatAnswer
from lattice_serve.server.openapi import body, generated
from lattice_serve.server.schemas.chat import ChatChunk, ChatCompletion, ChatRequest
from lattice_serve.server.services import Injected

router = APIRouter()


@router.post(
    "/v1/chat/completions", openapi_extra=body(ChatRequest), responses=generated(ChatCompletion, chunk=ChatChunk)
)
async def create_chat_completion(request: Request, services: Injected) -> Response:
    """Answer the last message of a chat, whole or as a stream of server-sent events."""
    asked = await services.read(ChatRequest, request)
    return await respond(ChatAnswer, services, asked, request)
