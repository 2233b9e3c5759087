"""`POST /v1/completions`: the body, and its answer, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field, model_validator

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import FinishReason
from lattice_serve.server.schemas.base import TEXTS, Count, Texts, each
from lattice_serve.server.schemas.generation import MAX_CHOICES, NOT_SUPPORTED, GenerationRequest, Usage

MAX_SEQUENCES = 2048
"""Prompts of a request, each as often as answers to it are asked for."""


class CompletionRequest(GenerationRequest):
    remedies: ClassVar[dict[str, str]] = GenerationRequest.remedies | {
        "prompt": TEXTS,
        "suffix": NOT_SUPPORTED,
    }

    id_fields: ClassVar[tuple[str, ...]] = ("prompt",)

    prompt: Texts
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Count | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    prompt_logprobs: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.candidates < self.choices:
            raise InvalidParameter(f"best_of is {self.best_of}, less than n: give at least n", param="best_of")
        if self.stream and self.candidates > self.choices:
            raise InvalidParameter(
                "best_of: which answers are best is known at their end: give no more than n with stream: true",
                param="best_of",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidParameter("prompt_logprobs: not with stream: true", param="prompt_logprobs")
        if self.token_limit == 0 and not (self.echo or self.prompt_logprobs is not None or self.cache_points):
            raise InvalidParameter(
                f"{self.limit_name} is 0: give at least 1, or echo: true, prompt_logprobs or cache_points",
                param=self.limit_name,
            )
        return self

    @property
    def candidates(self) -> int:
        """Answers to generate for each prompt, of which the best are returned."""
        return self.choices if self.best_of is None else self.best_of

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Raises `InvalidParameter` when there is none, one of them is empty, or there are too many."""
        prompts = each(self.prompt, "prompt", MAX_SEQUENCES)
        if len(prompts) * self.candidates > MAX_SEQUENCES:
            name = "n" if self.best_of is None else "best_of"
            raise InvalidParameter(
                f"{name} is {self.candidates}, for {len(prompts)} prompts: ask for at most {MAX_SEQUENCES} answers in "
                "one request",
                param=name,
            )
        return prompts

    def _own_sampling(self) -> dict[str, Any]:
        scored = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        # To the engine, a request for no tokens is one that scores its prompt.
        if not scored and self.token_limit == 0 and not self.cache_points:
            scored = [0]
        # The best of several is found by the log-probabilities of their tokens.
        logprobs = 0 if self.logprobs is None and self.candidates > self.choices else self.logprobs
        return {"logprobs": logprobs, "prompt_logprobs": max(scored, default=None)}


class Logprobs(msgspec.Struct):
    """Four lists of one length, an entry a token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Where in the text of the answer each token begins."""


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    """Of the token among all at its place, from 1; None where it is not one of the most likely that were asked for."""
    decoded_token: str


class Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET
    """One a prompt token, by token id; None for the first."""


class Completion(msgspec.Struct):
    """A whole answer, or a chunk of one."""

    id: str
    created: int
    model: str
    choices: list[Choice] = []
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"
