"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lattice_serve.server.openapi import failures
from lattice_serve.server.services import MAX_MODEL_LEN, Injected, Services

router = APIRouter()


@router.get("/v1/models")
async def list_models(services: Injected) -> dict[str, Any]:
    """The one model that this server has."""
    return {"object": "list", "data": [_card(services)]}


@router.get("/v1/models/{model_id:path}", responses=failures(404))
async def get_model(model_id: str, services: Injected) -> dict[str, Any]:
    """That model, by its name."""
    services.check_model(model_id)
    return _card(services)


def _card(services: Services) -> dict[str, Any]:
    name = services.settings.model_name
    return {
        "id": name,
        "object": "model",
        "created": services.started,
        "owned_by": "lattice-serve",
        "root": name,
        "max_model_len": MAX_MODEL_LEN,
    }
