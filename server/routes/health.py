"""What probes, dashboards and people ask: alive, ready, metrics, version, which routes there are."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from lattice_serve.engine.errors import Draining, EngineUnavailable
from lattice_serve.server.openapi import describe, failures
from lattice_serve.server.services import Injected

router = APIRouter()


@router.get("/health")
async def health(services: Injected) -> dict[str, Any]:
    """200 while this process lives; the body says how the engines are, together and each."""
    router = services.router
    try:
        services.check_ready()
        engine = "ready"
    except EngineUnavailable:
        engine = "restarting" if any(replica.state == "restarting" for replica in router.replicas) else "starting"
    except Draining:
        engine = "draining"
    engines = [{"state": replica.state, "restarts": replica.supervisor.restarts} for replica in router.replicas]
    return {"status": "ok", "engine": engine, "restarts": router.restarts, "engines": engines}


@router.get("/ready", responses=failures(503))
async def ready(services: Injected) -> dict[str, Any]:
    """200 while requests are taken, by one engine at least, else 503."""
    engines = [
        {"rows": engine.rows, "bytes_per_row": engine.bytes_per_row, "device": engine.device}
        for engine in services.check_ready()
    ]
    return {"status": "ready", "rows": sum(engine["rows"] for engine in engines), "engines": engines}


@router.get("/ping", response_class=Response)
async def ping() -> Response:
    """200, as /health."""
    return Response()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(services: Injected) -> Response:
    """Prometheus text."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def get_version() -> dict[str, str]:
    """The version of this package."""
    return {"version": version("lattice-serve")}


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, services: Injected) -> dict[str, Any]:
    """The OpenAPI description of this server."""
    return describe(request.app, with_key=bool(services.settings.api_keys))
