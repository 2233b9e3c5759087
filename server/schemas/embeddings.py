"""`POST /v1/embeddings`: the body, and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import msgspec

from lattice_serve.engine.messages import Pooling
from lattice_serve.server.schemas.base import TEXTS, RequestModel, Texts, each

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000
"""In all inputs of a request together. Both as OpenAI's."""


class EmbeddingRequest(RequestModel):
    """Names and defaults as OpenAI's; `pooling` is ours. null means absent."""

    remedies: ClassVar[dict[str, str]] = {
        "input": TEXTS,
        "dimensions": "the model's vectors have one length: give that, or leave it out",
        "pooling": 'give "mean" or "last"',
    }

    id_fields: ClassVar[tuple[str, ...]] = ("input",)

    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    """The model's own number alone."""
    pooling: Pooling | None = None
    """Of the final hidden states of a text's tokens: their mean, or the last one."""

    @property
    def texts(self) -> Sequence[str | list[int]]:
        """Raises `InvalidParameter` when there is none, one of them is empty, or there are too many."""
        return each(self.input, "input", MAX_INPUTS)


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    """Of unit length; as base64, float32, little-endian."""
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"
