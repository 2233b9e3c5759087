"""`POST /v1/responses`, and what is stored of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from lattice_serve.server import response
from lattice_serve.server.openapi import body, failures, generated
from lattice_serve.server.schemas.responses import ResponseObject, ResponseRequest
from lattice_serve.server.services import Injected
from lattice_serve.server.stream import NamedEventStream, PacedResponse, until_disconnect

router = APIRouter()


@router.post(
    "/v1/responses", openapi_extra=body(ResponseRequest), responses=generated(ResponseObject, chunk=ResponseObject)
)
async def create_response(request: Request, services: Injected) -> Response:
    """Answer an input, after the conversation of an earlier response if one is named, whole or as events."""
    asked = await services.read(ResponseRequest, request)
    tenant: str = request.state.tenant
    if asked.stream:
        told = response.ResponseStream(services, asked, tenant)
        return NamedEventStream(told.events(), told.failed, **services.settings.stream_seconds)
    whole = await until_disconnect(request.receive, response.respond(services, asked, tenant))
    return PacedResponse(whole, stall_seconds=services.settings.request_seconds)


@router.get("/v1/responses/{response_id}", responses=failures(404))
async def get_response(response_id: str, request: Request, services: Injected) -> Response:
    """A stored response."""
    stored = services.responses.get(request.state.tenant, response_id, "response_id")
    return PacedResponse(stored.body, stall_seconds=services.settings.request_seconds)


@router.delete("/v1/responses/{response_id}", responses=failures(404))
async def delete_response(response_id: str, request: Request, services: Injected) -> dict[str, Any]:
    """Forget a stored response."""
    services.responses.delete(request.state.tenant, response_id)
    return {"id": response_id, "object": "response", "deleted": True}
