"""`POST /v1/completions`: the body, and its answer, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, cast

import msgspec
from pydantic import BeforeValidator, Field, model_validator

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import FinishReason
from lattice_serve.engine.sampling import MAX_LOGIT_BIAS, SamplingParams
from lattice_serve.server.schemas.base import Count, RequestModel, Strings, TokenIds
from lattice_serve.server.schemas.structured import StructuredRequest

MAX_CHOICES = 128
MAX_STOP_TOKEN_IDS = 1024

_NOT_SUPPORTED = "not supported by this server: leave it out"


def _check_size(bias: object) -> object:
    """Before pydantic looks at the entries, of which each wrong one would make an error object."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"{len(bias)} entries: give at most {MAX_LOGIT_BIAS}")
    return bias


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionRequest(StructuredRequest):
    """Names and defaults as OpenAI's, then the extensions that other servers share. null means absent."""

    remedies: ClassVar[dict[str, str]] = StructuredRequest.remedies | {
        "prompt": "give a string, a list of strings, a list of token ids or a list of lists of token ids",
        "stop": "give a string or a list of strings",
        "suffix": _NOT_SUPPORTED,
        "prompt_logprobs": "not supported by this server: use echo with logprobs",
        "use_beam_search": _NOT_SUPPORTED,
    }

    model: str | None = None
    prompt: str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Count | None = None
    echo: bool | None = None
    stop: str | Strings | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_check_size)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    suffix: Literal[""] | None = None

    min_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 are off."""
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    priority: Annotated[int, Field(gt=-(2**31), lt=2**31)] | None = None
    prompt_logprobs: None = None
    use_beam_search: Literal[False] | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise InvalidParameter(f"best_of is {self.best_of}: leave it out, or give the value of n", param="best_of")
        if self._max_tokens == 0 and not self.echo:
            raise InvalidParameter("max_tokens is 0: give at least 1, or echo: true", param="max_tokens")
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options: give it only with stream: true", param="stream_options")
        return self

    @property
    def choices(self) -> int:
        """Answers for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Raises `InvalidParameter` when there is none, or one of them is empty."""
        given = self.prompt
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts = cast("Sequence[str | list[int]]", [given] if single else given)
        if not prompts or not all(prompts):
            raise InvalidParameter("prompt is empty: give at least one token", param="prompt")
        return prompts

    def sampling(self, choice: int) -> SamplingParams:
        """Parameters of the `choice`-th answer to a prompt. Raises `InvalidParameter` as `SamplingParams` does."""
        same = self.model_dump(include=set(SamplingParams.__struct_fields__), exclude_none=True)
        fields = same | {
            "max_tokens": self._max_tokens,
            "top_k": None if self.top_k == -1 else self.top_k,
            "logit_bias": self.biases,
            # Answers to one prompt differ also when a seed is given, each reproducibly.
            "seed": None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "include_stop": self.include_stop_str_in_output,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "prompt_logprobs": self._prompt_logprobs,
            "grammar": self.grammar,
        }
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id. Raises `InvalidParameter` for a key that is none."""
        try:
            return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise InvalidParameter("logit_bias: give token ids as keys", param="logit_bias") from error

    @property
    def _max_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def _prompt_logprobs(self) -> int | None:
        if not self.echo:
            return None
        # To the engine, a request for no tokens is one that scores its prompt.
        return 0 if self.logprobs is None and self._max_tokens == 0 else self.logprobs


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Logprobs(msgspec.Struct):
    """Four lists of one length, an entry a token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Where in the text of the answer each token begins."""


class Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Completion(msgspec.Struct):
    """A whole answer, or a chunk of one."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"
