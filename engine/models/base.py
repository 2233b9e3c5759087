"""What every model family has in its `config.json`, and what the engine asks of it. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lattice_serve.engine.config import DType
from lattice_serve.engine.tokenizer import Tokenizer

LARGEST_SIZE = (1 << 31) - 1
_LARGEST_VOCABULARY = 1 << 24
"""Above them a file is damaged: sizes overflow, and tables of all tokens take gigabytes."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a token costs, counted from a model's shape: its matrices, the embedding excepted, and its recurrence."""

    weight_bytes: int
    """Read once a step."""
    state_bytes: int
    """Read and written for a token in decode, on average."""
    flops: int
    """Of a token's matrix products; a multiply-add is two."""
    recurrence_flops: int
    """Of a token's recurrence, in float32 always."""
    head_flops: int
    """Of the product with the head, where a token's logits are wanted."""


class Sharding(NamedTuple):
    """How the processes of one model divide a tensor: each takes its part of every piece along one dimension."""

    dim: int
    pieces: tuple[int, ...]
    """Sizes along `dim`; their sum is the tensor's size."""


class ModelConfig(BaseModel, ABC):
    """`config.json` of a model folder; a family adds its own fields and says how they are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: ClassVar[type[Tokenizer]] = Tokenizer
    """The kind of tokenizer that lies beside the weights."""
    matrices: ClassVar[tuple[str, ...]]
    """Last parts of the names of the tensors that are stored and run in `torch_dtype`; all others are float32."""

    model_type: str
    architectures: tuple[str]
    vocab_size: int = Field(ge=2, le=_LARGEST_VOCABULARY)
    hidden_size: int = Field(ge=1, le=LARGEST_SIZE)
    num_hidden_layers: int = Field(ge=1, le=LARGEST_SIZE)
    tie_word_embeddings: bool = True
    bos_token_id: int | None = Field(default=None, ge=0)
    eos_token_id: int | None = Field(default=None, ge=0)
    torch_dtype: DType = "bfloat16"

    @model_validator(mode="after")
    def _check_tokens(self) -> ModelConfig:
        for name in ("bos_token_id", "eos_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and token_id >= self.vocab_size:
                raise ValueError(f"{name} ({token_id}) must be below vocab_size ({self.vocab_size})")
        return self

    @property
    def chunk_alignment(self) -> int:
        """Tokens at whose multiples a kernel that works chunk by chunk can cut a prompt."""
        return 1

    @property
    @abstractmethod
    def divisible(self) -> dict[str, int]:
        """Fields that tensor parallelism divides, and their values; empty where the family has no such thing."""

    @abstractmethod
    def sharding(self, name: str) -> Sharding | None:
        """Returns how the tensor `name` is divided; None for one that is whole in every process."""

    @abstractmethod
    def work(self, weight_bits: int) -> Work:
        """Returns what a token costs with weights of so many bits."""

    def divided(self, size: int) -> ModelConfig:
        """Returns the configuration of one of `size` equal shares of the model."""
        return self.model_copy(update={name: count // size for name, count in self.divisible.items()})
