"""What all generating routes share: a request becomes sequences, and what the engine says of them becomes choices."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lattice_serve.engine.messages import Submit, TokenOutput
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server import memory
from lattice_serve.server.engine_client import Generation
from lattice_serve.server.event_json import event_json
from lattice_serve.server.joined import AnswerSize
from lattice_serve.server.schemas.generation import GenerationRequest, Usage
from lattice_serve.server.services import Services
from lattice_serve.server.stream import EventStream, PacedResponse, until_disconnect

LOWEST_LOGPROB = -9999.0
"""What clients expect for minus infinity, which JSON does not have."""

R = TypeVar("R", bound=GenerationRequest)
C = TypeVar("C", bound=msgspec.Struct)

_encode = msgspec.json.Encoder().encode


class Answer(ABC, Generic[R, C]):
    """One request at work: sequences for the engine, and the choices `C` of the chunks made of its outputs.

    A whole answer is made of the same choices, joined.
    """

    id_prefix: ClassVar[str]
    whole_type: ClassVar[type[msgspec.Struct]]
    chunk_type: ClassVar[type[msgspec.Struct]]
    """Both have `id`, `created`, `model`, `choices` and `usage`."""

    def __init__(
        self, services: Services, request: R, prompts: Sequence[array[int]], params: Sequence[SamplingParams]
    ) -> None:
        """Every prompt is answered once with each of `params`: sequence i is of prompt i // len(params)."""
        self._services = services
        self._request = request
        self._prompts = prompts
        memory.current().hold(sum(prompt.itemsize * len(prompt) for prompt in prompts))
        points = tuple(request.cache_points or ())
        self._sequences = [Submit("", prompt, each, cache_points=points) for prompt in prompts for each in params]
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(self._sequences)
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": services.settings.model_name,
        }

    @classmethod
    @abstractmethod
    async def prepare(cls, services: Services, request: R, tenant: str) -> Answer[R, C]:
        """Raises the error that says why the request cannot be served, or not now."""

    @abstractmethod
    def parts(self, index: int, output: TokenOutput) -> list[C]:
        """What `output` of sequence `index` adds: at least one choice, where it has a token."""

    @abstractmethod
    def keep(self, index: int, choice: C) -> int:
        """Hold a part of a whole answer; how many bytes it takes."""

    @abstractmethod
    def joined(self) -> Sequence[msgspec.Struct]:
        """The choices of a whole answer, of what was kept of each sequence."""

    @property
    def longest_param(self) -> str:
        """The field that makes an answer long."""
        return "n" if len(self._sequences) > 1 else "max_tokens"

    async def whole(self, tenant: str) -> bytes:
        """The answer as JSON. tenant: whose shares it takes from, and whose cached states it may use."""
        size = AnswerSize(self.longest_param)
        async with aclosing(self.each(tenant)) as outputs:
            async for index, choices in outputs:
                size.add(sum(self.keep(index, choice) for choice in choices))
        return _encode(self.whole_type(**self._head, choices=self.joined(), usage=self.usage()))

    async def each(self, tenant: str) -> AsyncGenerator[tuple[int, list[C]], None]:
        """What every output of the engine adds, and to which sequence."""
        with self._start(tenant) as generation:
            async for index, output in generation:
                yield index, self._count(index, output)

    async def chunks(self, tenant: str) -> AsyncGenerator[bytes, None]:
        """The answer as JSON chunks, at least one a token, then one with the usage if that is asked for."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        with_running_usage = with_usage and options is not None and bool(options.continuous_usage_stats)
        async with aclosing(self.each(tenant)) as outputs:
            async for _, choices in outputs:
                for part in choices:
                    if with_usage:
                        yield self._chunk([part], usage=self.usage() if with_running_usage else None)
                    else:
                        yield self._chunk([part])
        if with_usage:
            yield self._chunk([], usage=self.usage())

    def _start(self, tenant: str) -> Generation:
        self._services.admit(
            tenant, len(self._sequences)
        )  # Again: others may have come in while the prompts were tokenized.
        priority, salt = self._request.priority or 0, self._request.cache_salt or ""
        sequences = [msgspec.structs.replace(each, priority=priority, cache_salt=salt) for each in self._sequences]
        return self._services.generate(tenant, sequences, timeout=self._request.timeout)

    def _count(self, index: int, output: TokenOutput) -> list[C]:
        self._completion_tokens += output.token_id is not None
        self._cached_tokens[index] += output.cached_tokens
        return self.parts(index, output)

    def usage(self) -> Usage:
        """Of what has come so far."""
        # Of a prompt what was run at least once counts as run, and the prompt counts once.
        width = len(self._sequences) // len(self._prompts)
        cached = (min(self._cached_tokens[start : start + width]) for start in range(0, len(self._sequences), width))
        prompt_tokens = sum(map(len, self._prompts))
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details={"cached_tokens": sum(cached)},
        )

    def _chunk(self, choices: list[C], usage: Usage | msgspec.UnsetType | None = msgspec.UNSET) -> bytes:
        return event_json(self.chunk_type(**self._head, choices=choices, usage=usage))


def check(services: Services, request: GenerationRequest) -> None:
    """Raises `ModelNotFound` or `InvalidParameter` for what can be seen without the prompt."""
    services.check_model(request.model)
    vocab_size = services.tokenizer.vocab_size
    Tokenizer.check(request.stop_token_ids or (), vocab_size, param="stop_token_ids")
    Tokenizer.check(request.biases, vocab_size, param="logit_bias")


async def respond(kind: type[Answer[R, C]], services: Services, request: R, http: Request) -> Response:
    """The answer to a request for a `kind`: whole, or as server-sent events."""
    tenant: str = http.state.tenant
    if request.stream:
        return EventStream(_stream(kind, services, request, tenant), **services.settings.stream_seconds)
    whole = await until_disconnect(http.receive, _whole(kind, services, request, tenant))
    return PacedResponse(whole, stall_seconds=services.settings.request_seconds)


async def _whole(kind: type[Answer[R, C]], services: Services, request: R, tenant: str) -> bytes:
    return await (await kind.prepare(services, request, tenant)).whole(tenant)


async def _stream(kind: type[Answer[R, C]], services: Services, request: R, tenant: str) -> AsyncGenerator[bytes, None]:
    answer = await kind.prepare(services, request, tenant)
    async with aclosing(answer.chunks(tenant)) as chunks:
        async for chunk in chunks:
            yield chunk
