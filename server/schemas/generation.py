"""What every route that generates text shares: sampling and streaming fields of the body, usage in the answer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import BeforeValidator, Field, model_validator

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.sampling import MAX_LOGIT_BIAS, SamplingParams
from lattice_serve.server.schemas.base import Count, Off, RequestModel, Strings, TokenIds
from lattice_serve.server.schemas.structured import StructuredRequest

MAX_CHOICES = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_SALT_LENGTH = 256
MAX_CACHE_POINTS = 64
MAX_TIMEOUT_SECONDS = 86400.0

NOT_SUPPORTED = "not supported by this server: leave it out"


def _check_size(bias: object) -> object:
    """Before pydantic looks at the entries, of which each wrong one would make an error object."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"{len(bias)} entries: give at most {MAX_LOGIT_BIAS}")
    return bias


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(StructuredRequest):
    """Names and defaults as OpenAI's, then the extensions that other servers share. null means absent."""

    remedies: ClassVar[dict[str, str]] = StructuredRequest.remedies | {
        "stop": "give a string or a list of strings",
        "use_beam_search": NOT_SUPPORTED,
    }

    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Strings | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_check_size)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    min_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 are off."""
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    priority: Annotated[int, Field(gt=-(2**31), lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None
    """Seconds that the engine may take for the whole answer."""
    cache_points: Annotated[TokenIds, Field(max_length=MAX_CACHE_POINTS)] | None = None
    """Numbers of prompt tokens after which the state is worth keeping. With max_tokens 0, that is all that is done."""
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_LENGTH)] | None = None
    """Only requests with the same one, and the same API key, share cached states."""
    use_beam_search: Off | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options: give it only with stream: true", param="stream_options")
        return self

    @property
    def choices(self) -> int:
        """Answers to return for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id. Raises `InvalidParameter` for a key that is none."""
        try:
            return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise InvalidParameter("logit_bias: give token ids as keys", param="logit_bias") from error

    @property
    def token_limit(self) -> int | None:
        """The newer name wins, as in vLLM."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """The field that `token_limit` is of."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def sampling(self, choice: int) -> SamplingParams:
        """Parameters of the `choice`-th answer to a prompt. Raises `InvalidParameter` as `SamplingParams` does."""
        fields = self.model_dump(include=_SAME, exclude_none=True)
        fields |= {
            "max_tokens": self.token_limit,
            "top_k": None if self.top_k == -1 else self.top_k,
            "logit_bias": self.biases,
            # Answers to one prompt differ also when a seed is given, each reproducibly.
            "seed": None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "include_stop": self.include_stop_str_in_output,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "grammar": self.grammar,
        }
        fields |= self._own_sampling()
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})

    @abstractmethod
    def _own_sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the route decides in a way of its own; None: its default."""


_SAME = set(GenerationRequest.model_fields) & set(SamplingParams.__struct_fields__)


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
