"""`POST /v1/embeddings`."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from lattice_serve.server.embedding import embed
from lattice_serve.server.openapi import answered, body
from lattice_serve.server.schemas.embeddings import EmbeddingRequest, Embeddings
from lattice_serve.server.services import Injected
from lattice_serve.server.stream import PacedResponse, until_disconnect

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=body(EmbeddingRequest), responses=answered(Embeddings))
async def create_embeddings(request: Request, services: Injected) -> Response:
    """A vector for each text."""
    asked = await services.read(EmbeddingRequest, request)
    answer = await until_disconnect(request.receive, embed(services, asked, request.state.tenant))
    return PacedResponse(msgspec.json.encode(answer), stall_seconds=services.settings.request_seconds)
