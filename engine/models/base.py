"""What every model family has in its `config.json`, and what the engine asks of it. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

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


IGNORED_FIELDS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention",
    "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "name_or_path", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
    "top_p", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache"
})  # fmt: skip
"""Fields that transformers writes into the `config.json` of any model, and that say nothing of this one."""


class ModelConfig(BaseModel, ABC):
    """`config.json` of a model folder; a family adds its own fields and says how they are used.

    Fields that transformers adds are ignored; other unknown ones are errors, for one may be a misspelt one.
    """

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
    """Newer versions of transformers call it `dtype`."""

    @model_validator(mode="before")
    @classmethod
    def _read_as_transformers_writes(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = {name: value for name, value in given.items() if name not in IGNORED_FIELDS}
        if "dtype" in fields:
            fields.setdefault("torch_dtype", fields.pop("dtype"))
        return fields

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
