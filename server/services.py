"""What routes work with: the settings, engines, tokenizer and chat template, the metrics, and who may come in."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from lattice_serve.engine.errors import Draining, EngineUnavailable, ModelNotFound, Overloaded
from lattice_serve.engine.messages import Ready
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.metrics import ServerMetrics
from lattice_serve.server.response_store import ResponseStore
from lattice_serve.server.router import Router
from lattice_serve.server.settings import Settings
from lattice_serve.server.template import ChatTemplate

MAX_MODEL_LEN = 2**31 - 1
"""A recurrent state has no longest context; clients want a number all the same."""
_INLINE_LENGTH = 4096
"""Longer texts are tokenized in a thread, so that other requests go on."""

A = TypeVar("A", bound=Sequence[object])
R = TypeVar("R")
T = TypeVar("T")


@dataclass
class Services:
    settings: Settings
    router: Router
    tokenizer: Tokenizer
    template: ChatTemplate
    metrics: ServerMetrics
    embedding_size: int
    """Numbers in the vector of a text."""
    responses: ResponseStore = field(default_factory=ResponseStore)
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""

    def check_ready(self) -> list[Ready]:
        """What the engines that are ready said of themselves.

        Raises `Draining` or `EngineUnavailable` where requests are not taken.
        """
        if self.draining:
            raise Draining("the server is shutting down: send the request to another one")
        if not self.router.ready:
            raise EngineUnavailable("the engine is starting: try again in a few seconds")
        return self.router.ready

    def admit(self, sequences: int) -> None:
        """Let a request with that many sequences in, or raise the error that says why not, and count it.

        Of many sequences some alone have to find a place now: the others follow them, see `Feed`.
        """
        try:
            self.check_ready()
            taken, capacity = self.router.taken, self.router.capacity
            if taken + min(sequences, self.router.window) > capacity:
                raise Overloaded(f"{taken} sequences run or wait, of at most {capacity}: try again later")
        except (Draining, EngineUnavailable, Overloaded) as error:
            self.metrics.rejected(_REASONS[type(error)])
            raise

    def check_model(self, name: str | None) -> None:
        """Raises `ModelNotFound` unless `name` is the served model's, or absent."""
        if name is not None and name != self.settings.model_name:
            raise ModelNotFound(
                f"there is no model {name[:100]!r} here: use {self.settings.model_name!r}", param="model"
            )

    async def encode(self, text: str) -> array[int]:
        return await _offload(lambda text: array("i", self.tokenizer.encode(text)), text)

    async def encode_marked(self, text: str) -> array[int]:
        return await _offload(lambda text: array("i", self.tokenizer.encode_marked(text)), text)

    async def decode(self, ids: Sequence[int]) -> str:
        return await _offload(self.tokenizer.decode, ids)


_REASONS = {Draining: "draining", EngineUnavailable: "engine_unavailable", Overloaded: "queue_full"}


async def one_by_one(items: Iterable[T]) -> AsyncIterator[T]:
    """`items`, with room for other requests between them: work on each of many short texts is long work."""
    for index, item in enumerate(items):
        if index:
            await asyncio.sleep(0)
        yield item


async def _offload(function: Callable[[A], R], argument: A) -> R:
    if len(argument) <= _INLINE_LENGTH:
        return function(argument)
    return await asyncio.to_thread(function, argument)


# Not a plain function: fastapi would call that in a thread, for every request.
async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Injected = Annotated[Services, Depends(_services)]
"""The type of a route's parameter that receives the services."""
