"""What routes work with: the settings, engines, tokenizer and chat template, the metrics, and who may come in."""

from __future__ import annotations

import asyncio
import codecs
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec
from fastapi import Depends, Request

from lattice_serve.engine.errors import Draining, EngineUnavailable, ModelNotFound, Overloaded
from lattice_serve.engine.messages import Ready, Submit
from lattice_serve.engine.shares import Shares
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server import body
from lattice_serve.server.body import Turns
from lattice_serve.server.engine_client import Generation
from lattice_serve.server.errors import KeyQuota
from lattice_serve.server.keys import tenant_of
from lattice_serve.server.metrics import ServerMetrics
from lattice_serve.server.response_store import ResponseStore
from lattice_serve.server.router import Router
from lattice_serve.server.schemas.base import RequestModel
from lattice_serve.server.settings import Settings
from lattice_serve.server.template import ChatTemplate

MAX_MODEL_LEN = 2**31 - 1
"""A recurrent state has no longest context; clients want a number all the same."""
_INLINE_LENGTH = 4096
"""Longer texts are tokenized in a thread, so that other requests go on; so many token ids become text at a time."""

B = TypeVar("B", bound=RequestModel)
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
    shares: Shares = field(default_factory=Shares)
    """What is fair between API keys."""
    responses: ResponseStore = field(init=False)
    turns: Turns = field(default_factory=Turns)
    """Of large bodies and texts."""
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""

    def __post_init__(self) -> None:
        for key, weight in self.settings.key_weights.items():
            self.shares.weigh(tenant_of(key), weight)
        self.responses = ResponseStore(shares=self.shares)

    def check_ready(self) -> list[Ready]:
        """What the engines that are ready said of themselves.

        Raises `Draining` or `EngineUnavailable` where requests are not taken.
        """
        if self.draining:
            raise Draining("the server is shutting down: send the request to another one")
        if not self.router.ready:
            raise EngineUnavailable("the engine is starting: try again in a few seconds")
        return self.router.ready

    def admit(self, tenant: str, sequences: int) -> None:
        """Let a request with that many sequences in, or raise the error that says why not, and count it.

        Of many sequences some alone have to find a place now: the others follow them, see `Feed`. Where all places are
        taken, there are more for a tenant that has less than its fair share of them.
        """
        try:
            self.check_ready()
            taken, capacity = self.router.tenants, self.router.capacity
            if not self.shares.allows(tenant, min(sequences, self.router.window), taken, capacity):
                if taken.keys() - {tenant}:
                    raise KeyQuota(
                        f"all {capacity} places are taken, and this key has its share of them, {taken[tenant]}: "
                        "try again later"
                    )
                raise Overloaded(f"{taken.total()} sequences run or wait, of at most {capacity}: try again later")
        except (Draining, EngineUnavailable, Overloaded) as error:
            self.metrics.rejected(_REASONS[type(error)])
            raise

    def generate(self, tenant: str, requests: Sequence[Submit], *, timeout: float | None = None) -> Generation:
        """Submit the sequences of a request that is let in. See `Router.generate`."""
        weight = self.shares.weight(tenant)
        owned = [msgspec.structs.replace(request, tenant=tenant, weight=weight) for request in requests]
        return self.router.generate(owned, timeout=timeout)

    def check_model(self, name: str | None) -> None:
        """Raises `ModelNotFound` unless `name` is the served model's, or absent."""
        if name is not None and name != self.settings.model_name:
            raise ModelNotFound(
                f"there is no model {name[:100]!r} here: use {self.settings.model_name!r}", param="model"
            )

    async def read(self, kind: type[B], http: Request) -> B:
        """The body of a request. Raises `InvalidParameter` that names the first wrong field."""
        return await self.parse(kind, await http.body())

    async def parse(self, kind: type[B], data: bytes) -> B:
        """The same of a body that is there."""
        return await body.parse(kind, data, self.turns)

    async def encode(self, text: str) -> array[int]:
        return await self._encoded(self.tokenizer.encode, text)

    async def encode_marked(self, text: str) -> array[int]:
        return await self._encoded(self.tokenizer.encode_marked, text)

    async def _encoded(self, encode: Callable[[str], list[int]], text: str) -> array[int]:
        if len(text) <= _INLINE_LENGTH:
            return array("i", encode(text))
        async with self.turns.take(len(text)):
            return await asyncio.to_thread(lambda: array("i", encode(text)))

    async def decode(self, ids: Sequence[int]) -> str:
        return "".join([text async for text in self.texts(ids)])

    async def texts(self, ids: Sequence[int]) -> AsyncGenerator[str, None]:
        """The text of token ids, in pieces, others going on in between."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for start in range(0, len(ids), _INLINE_LENGTH):
            yield decoder.decode(b"".join(map(self.tokenizer.token_bytes, ids[start : start + _INLINE_LENGTH])))
            await asyncio.sleep(0)
        yield decoder.decode(b"", final=True)


_REASONS = {
    Draining: "draining",
    EngineUnavailable: "engine_unavailable",
    Overloaded: "queue_full",
    KeyQuota: "key_quota",
}


async def one_by_one(items: Iterable[T]) -> AsyncIterator[T]:
    """`items`, with room for other requests between them: work on each of many short texts is long work."""
    for index, item in enumerate(items):
        if index:
            await asyncio.sleep(0)
        yield item


# Not a plain function: fastapi would call that in a thread, for every request.
async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Injected = Annotated[Services, Depends(_services)]
"""The type of a route's parameter that receives the services."""
