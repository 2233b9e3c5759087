"""The application, and `serve`, which runs it until it is told to stop."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import FrameType

import msgspec
import structlog
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from starlette.middleware.cors import CORSMiddleware

from lattice_serve.engine.errors import ConfigError, Draining
from lattice_serve.engine.messages import Ready
from lattice_serve.engine.models.registry import load_config
from lattice_serve.server import logs
from lattice_serve.server.access import AccessLog
from lattice_serve.server.connections import connection_limit
from lattice_serve.server.errors import install_handlers
from lattice_serve.server.head import HeadAsGet
from lattice_serve.server.limits import Limits
from lattice_serve.server.memory import MemoryBudget
from lattice_serve.server.metrics import ServerMetrics
from lattice_serve.server.protocol import bounded
from lattice_serve.server.router import Replica, Router
from lattice_serve.server.routes import chat, completions, embeddings, health, models, responses, tokenize
from lattice_serve.server.services import Services
from lattice_serve.server.settings import Settings
from lattice_serve.server.supervisor import ENGINE_COMMAND
from lattice_serve.server.template import ChatTemplate

log = structlog.get_logger(__name__)

_FLUSH_SECONDS = 2
_BACKLOG = 2048


def create_app(services: Services) -> FastAPI:
    """The application. Its lifespan is that of the engines, and of the process that renders chat templates."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with services.router, services.template:
            # What is there now stays: looking through all of it made streams wait for some 60 ms now and then.
            gc.collect()
            gc.freeze()
            yield

    app = FastAPI(title="lattice-serve", lifespan=lifespan, redirect_slashes=False, openapi_url=None)
    app.state.services = services
    for module in (completions, chat, embeddings, responses, models, health, tokenize):
        app.include_router(module.router)
    install_handlers(app)
    settings = services.settings
    app.add_middleware(HeadAsGet)
    # The one added last is outermost. Errors of the limits, too, must be readable for pages of allowed origins.
    app.add_middleware(
        Limits,
        api_keys=settings.api_keys,
        max_body_bytes=settings.max_body_bytes,
        memory=MemoryBudget(settings.request_memory),
        max_header_bytes=settings.max_header_bytes,
        body_seconds=settings.request_seconds,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(AccessLog)
    return app


def serve(settings: Settings, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain and return.

    Raises `ConfigError` when the address cannot be bound, the model folder lacks its tokenizer, or an
    engine does not start.
    """
    logs.configure(settings.log_level)
    model = load_config(settings.model)
    tokenizer = model.tokenizer.load(settings.model, model.vocab_size)
    metrics = ServerMetrics(settings.model_name, settings.replicas)
    replicas = [
        Replica(config, each, engine_command, settings.watchdog_seconds, cache_options)
        for config, each, cache_options in zip(
            settings.engine_configs(), metrics.engines, settings.cache_options(), strict=True
        )
    ]
    router = Router(replicas, max_waiting=settings.max_waiting)
    metrics.active_keys.set_function(lambda: len(router.tenants))
    template = ChatTemplate(settings.model, tokenizer.names)
    services = Services(settings, router, tokenizer, template, metrics, model.hidden_size)
    with _listen(settings) as listener:
        address = _url(listener)
        for replica in replicas:
            replica.client.on_ready = lambda ready: _announce(ready, settings.model_name, address)
        log.info("starting", model=str(settings.model), address=address)
        server = _Server(services)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # under nohup it stays ignored
            signal.signal(signal.SIGHUP, server.handle_exit)
        server.run([listener])
    if router.failure is not None:
        raise router.failure


class _Server(uvicorn.Server):
    """Drains on the first signal, or when an engine cannot be started: /ready says 503, new requests are refused,
    running ones go on until the grace period is over. A second signal ends it at once."""

    def __init__(self, services: Services) -> None:
        config = uvicorn.Config(
            create_app(services),
            loop="uvloop",
            http=bounded(services.settings.request_seconds, connection_limit(services.settings.replicas)),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=services.settings.idle_connection_seconds,  # type: ignore[arg-type]  # a delay
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        super().__init__(config)
        self._services = services
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self._drain(signal.Signals(sig).name)
        elif sig != signal.SIGHUP:  # of which a terminal that is closed and its shell send one each
            self._deadline = time.monotonic()

    def _drain(self, reason: str) -> None:
        self._services.draining = True
        self._deadline = time.monotonic() + self._services.settings.grace_period
        log.info("draining", reason=reason, running=self._services.router.live)

    async def on_tick(self, counter: int) -> bool:
        if self._services.router.failure is not None and self._deadline is None:
            self._drain("an engine did not start")
        # Tasks are the requests not yet answered in full, those with a slow client among them.
        if self._deadline is not None and (not self.server_state.tasks or time.monotonic() >= self._deadline):
            self._services.router.fail_all(lambda: Draining("the server is shutting down: the grace period is over"))
            self.should_exit = True
        return await super().on_tick(counter)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    both = settings.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            (settings.host, settings.port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}: choose another host or port",
            param="port",
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(ready: Ready, model_name: str, address: str) -> None:
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        facts = msgspec.structs.asdict(ready) | {"model_name": model_name}
        log.info("ready", address=address, **facts)
        return
    block = Table.grid(padding=(0, 2))
    block.add_row("  [dim]model[/dim]", escape(model_name))
    block.add_row("  [dim]engine[/dim]", f"{ready.device}, {ready.dtype}, loaded in {ready.load_seconds:.1f} s")
    block.add_row("  [dim]rows[/dim]", f"{ready.rows} requests at once, {ready.bytes_per_row:,} bytes each")
    block.add_row("  [dim]address[/dim]", address)
    console.print("[bold green]ready[/bold green]", block)
