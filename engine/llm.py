"""The engine in the caller's process: for scripts, notebooks and tests."""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from pydantic import ValidationError
from tqdm import tqdm

from lattice_serve.engine import errors
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import ConfigError, InvalidParameter, LatticeError, Overloaded
from lattice_serve.engine.messages import (
    FinishReason,
    Pooling,
    Ready,
    RequestFailed,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import resolve_model

Prompt: TypeAlias = "str | Sequence[int]"


@dataclass(slots=True)
class Completion:
    """The answer to one prompt."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One a token, where `SamplingParams.logprobs` asks."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: list[float] | None = None
    cached_tokens: int = field(default=0, compare=False)
    """Tokens of the prompt whose state was there already: it is the same answer without them."""

    def add(self, output: TokenOutput) -> None:
        """Take in the next output of this request."""
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
        self.text += output.text
        if output.logprob is not None:
            self.logprobs.append(output.logprob)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = self.prompt_logprobs or []
            self.prompt_logprobs += output.prompt_logprobs
        if output.embedding is not None:
            self.embedding = output.embedding
        self.cached_tokens += output.cached_tokens
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


class LLM:
    """A model and its engine; not thread-safe.

    `model` is a model folder, None the bundled model; further settings are `EngineConfig`'s. Raises `ConfigError`
    naming the setting, `CheckpointError` for a bad folder.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        try:
            config = EngineConfig(model=resolve_model(model), **settings)
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(map(str, fault["loc"])) or "settings"
            raise ConfigError(f"{name}: {fault['msg']}", param=name) from error
        self._engine = Engine(config)
        self._ids = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def info(self) -> Ready:
        """What runs, on what, and what a request costs."""
        return self._engine.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Completion]:
        """Complete every prompt (text or token ids), batched; answers are in the order of the prompts.

        `params` is for all or one for each. Raises `InvalidParameter` for a bad prompt before anything runs, and the
        error of a request that fails.
        """
        encoded = self._encode_all(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(encoded)
        if len(each) != len(encoded):
            raise InvalidParameter(f"{len(each)} params for {len(encoded)} prompts: give one for each", param="params")
        return self._complete([Submit("", ids, wanted) for ids, wanted in zip(encoded, each, strict=True)], progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenOutput]:
        """Complete one prompt, an output a token, after those with the prompt's log-probabilities. Dropping the
        iterator frees its state; until then, or its end, nothing else runs."""
        for _, output in self._run([Submit("", self._encode(prompt), params or SamplingParams())]):
            yield output

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Natural-log probability of each token given those before it: one fewer than `token_ids`."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        (completion,) = self.generate([list(token_ids)], params, progress=False)
        return [entry.logprob for entry in completion.prompt_logprobs or [] if entry is not None]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: Pooling = "mean", *, progress: bool = True
    ) -> list[list[float]]:
        """A vector [hidden_size] for every text: the mean of its tokens' final hidden states, or the last of them."""
        params = SamplingParams(max_tokens=0)
        requests = [Submit("", ids, params, pooling=pooling) for ids in self._encode_all(prompts)]
        return [done.embedding or [] for done in self._complete(requests, progress)]

    def _complete(self, requests: Sequence[Submit], progress: bool) -> list[Completion]:
        completions = [Completion(request.prompt_ids.tolist()) for request in requests]
        with (
            tqdm(total=len(requests), desc="generate", unit="prompt", disable=not progress) as bar,
            closing(self._run(requests)) as outputs,
        ):
            for place, output in outputs:
                completions[place].add(output)
                if output.finish_reason is not None:
                    bar.update()
        return completions

    def _encode_all(self, prompts: Prompt | Sequence[Prompt]) -> list[array[int]]:
        if isinstance(prompts, str):
            return [self._encode(prompts)]
        ids = [item for item in prompts if isinstance(item, int)]
        if len(ids) not in (0, len(prompts)):
            raise InvalidParameter("prompts mixes token ids with prompts: give one list of either", param="prompt")
        if ids:
            return [self._checked(ids)]
        return [self._encode(item) for item in prompts if not isinstance(item, int)]

    def _encode(self, prompt: Prompt) -> array[int]:
        return self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def _checked(self, ids: Sequence[int]) -> array[int]:
        return Tokenizer.checked(ids, self.info.vocab_size)

    def _run(self, requests: Sequence[Submit]) -> Generator[tuple[int, TokenOutput], None, None]:
        """(place of its request, output), as they come; no more in the queue than the engine takes."""
        if self._engine.has_work:  # whose outputs would be taken from the stream that they are for
            raise RuntimeError("a stream of this LLM is open: read it to its end, or close it")
        for request in requests:
            self._engine.check(request)
        places: dict[str, int] = {}
        waiting = deque(enumerate(requests))
        most = self._engine.pool.rows + self._engine.config.max_waiting
        try:
            while True:
                while waiting and len(places) < most:
                    place, request = waiting[0]
                    request_id = f"local-{next(self._ids)}"
                    try:
                        self._engine.submit(msgspec.structs.replace(request, request_id=request_id))
                    except Overloaded:  # many grammars wait to be compiled
                        if not places:
                            raise
                        break
                    waiting.popleft()
                    places[request_id] = place
                if not places:
                    self._engine.check_idle()
                    return
                self._engine.launch()
                step = self._engine.emit()  # on a GPU, of the step before
                self._engine.collect()
                for failed in step.failures:
                    raise _error(failed)
                for output in step.outputs:
                    place = places[output.request_id]
                    if output.finish_reason is not None:
                        del places[output.request_id]
                    yield place, output
                self._engine.tidy()
        finally:
            for request_id in places:
                self._engine.abort(request_id)
            self._engine.emit()  # nobody waits for what others of them have got


def _error(failed: RequestFailed) -> LatticeError:
    kind: type[LatticeError] = getattr(errors, failed.error)
    return kind(failed.message, param=failed.param)
