"""Turns a completion request into sequences, and what the engine says of them into choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec

from lattice_serve.engine.messages import TokenLogprob, TokenOutput
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.engine_client import Generation
from lattice_serve.server.schemas.completions import Choice, Completion, CompletionRequest, Logprobs, Usage
from lattice_serve.server.services import Services

_LOWEST_LOGPROB = -9999.0
"""What clients expect for minus infinity, which JSON does not have."""

_encode = msgspec.json.Encoder().encode


async def complete(services: Services, request: CompletionRequest) -> bytes:
    """The whole answer as JSON."""
    work = await _Work.prepare(services, request)
    parts: list[list[Choice]] = [[] for _ in work.answers]
    with work.start() as generation:
        async for index, output in generation:
            parts[index].append(work.part(index, output))
    return work.encode([_joined(choice) for choice in parts], usage=work.usage())


async def stream(services: Services, request: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """The answer as JSON chunks, one for each token, then one with the usage if that is asked for."""
    options = request.stream_options
    with_usage = options is not None and bool(options.include_usage)
    with_running_usage = with_usage and options is not None and bool(options.continuous_usage_stats)
    work = await _Work.prepare(services, request)
    with work.start() as generation:
        async for index, output in generation:
            part = work.part(index, output)
            if with_usage:
                yield work.encode([part], usage=work.usage() if with_running_usage else None)
            else:
                yield work.encode([part])
    if with_usage:
        yield work.encode([], usage=work.usage())


class _Work:
    """One request: an answer for each choice, and what they have used."""

    def __init__(self, services: Services, request: CompletionRequest, prompts: list[_Prompt]) -> None:
        self.answers = [
            _Answer(index, prompts[index // request.choices], request, services.tokenizer)
            for index in range(len(prompts) * request.choices)
        ]
        self._services = services
        self._params = [request.sampling(choice) for choice in range(request.choices)]
        self._priority = request.priority or 0
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._head = Completion(
            id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=services.settings.model_name, choices=[]
        )

    @classmethod
    async def prepare(cls, services: Services, request: CompletionRequest) -> _Work:
        """Raises the error that says why the request cannot be served, or not now."""
        services.check_model(request.model)
        vocab_size = services.tokenizer.vocab_size
        Tokenizer.check(request.stop_token_ids or (), vocab_size, param="stop_token_ids")
        Tokenizer.check(request.biases, vocab_size, param="logit_bias")
        services.admit(len(request.prompts) * request.choices)
        return cls(services, request, [await _read(services, request, prompt) for prompt in request.prompts])

    def start(self) -> Generation:
        self._services.admit(len(self.answers))  # Again: others may have come in while the prompts were tokenized.
        sequences = [(answer.prompt.ids, self._params[answer.index % len(self._params)]) for answer in self.answers]
        return self._services.client.generate(sequences, priority=self._priority)

    def part(self, index: int, output: TokenOutput) -> Choice:
        self._completion_tokens += output.token_id is not None
        self._cached_tokens += output.cached_tokens
        return self.answers[index].part(output)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details={"cached_tokens": self._cached_tokens},
        )

    def encode(self, choices: list[Choice], usage: Usage | msgspec.UnsetType | None = msgspec.UNSET) -> bytes:
        return _encode(msgspec.structs.replace(self._head, choices=choices, usage=usage))


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    text: str
    """Empty where it was given as ids and is not echoed."""


class _Answer:
    """One choice as it grows."""

    def __init__(self, index: int, prompt: _Prompt, request: CompletionRequest, tokenizer: Tokenizer) -> None:
        self.index = index
        self.prompt = prompt
        self._echo = prompt.text if request.echo else None
        self._with_logprobs = request.logprobs is not None
        self._tokenizer = tokenizer
        self._length = 0

    def part(self, output: TokenOutput) -> Choice:
        """What `output` adds; the first part also has the prompt if it is echoed."""
        logprobs = Logprobs() if self._with_logprobs else None
        text = output.text
        if self._echo is not None:
            if logprobs is not None:
                self._add_prompt(logprobs, output.prompt_logprobs or [])
            text = self._echo + text
            self._length = len(self._echo)
            self._echo = None
        if logprobs is not None and output.logprob is not None:
            self._add(logprobs, output.logprob.token_id, output.logprob, self._length)
        self._length += len(output.text)
        return Choice(self.index, text, logprobs, output.finish_reason, output.stop_reason)

    def _add_prompt(self, logprobs: Logprobs, entries: Sequence[TokenLogprob | None]) -> None:
        offset = 0
        for token_id, entry in zip(self.prompt.ids, entries, strict=True):
            self._add(logprobs, token_id, entry, offset)
            offset += len(logprobs.tokens[-1])

    def _add(self, logprobs: Logprobs, token_id: int, entry: TokenLogprob | None, offset: int) -> None:
        name = self._tokenizer.token_text
        logprobs.tokens.append(name(token_id))
        logprobs.text_offset.append(offset)
        if entry is None:
            logprobs.token_logprobs.append(None)
            logprobs.top_logprobs.append(None)
            return
        # Two tokens can have one text: the more likely one keeps it.
        top: dict[str, float] = {}
        for other_id, logprob in (*entry.top, (token_id, entry.logprob)):
            top.setdefault(name(other_id), max(logprob, _LOWEST_LOGPROB))
        logprobs.token_logprobs.append(max(entry.logprob, _LOWEST_LOGPROB))
        logprobs.top_logprobs.append(top)


async def _read(services: Services, request: CompletionRequest, prompt: str | list[int]) -> _Prompt:
    """Raises `InvalidParameter` when an id is not in the vocabulary."""
    if isinstance(prompt, str):
        return _Prompt(await services.encode(prompt), prompt)
    Tokenizer.check(prompt, services.tokenizer.vocab_size)
    return _Prompt(prompt, await services.decode(prompt) if request.echo else "")


def _joined(parts: list[Choice]) -> Choice:
    """One choice from its parts."""
    last = parts[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = Logprobs()
        for part in parts:
            assert part.logprobs is not None
            for name in Logprobs.__struct_fields__:
                getattr(logprobs, name).extend(getattr(part.logprobs, name))
    return msgspec.structs.replace(last, text="".join(part.text for part in parts), logprobs=logprobs)
