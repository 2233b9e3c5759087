"""`POST /v1/embeddings`: the body, and its answer."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from lattice_serve.engine.messages import Pooling
from lattice_serve.server.schemas.base import TEXTS, RequestModel, Texts


class EmbeddingRequest(RequestModel):
    """Names and defaults as OpenAI's; `pooling` is ours. null means absent."""

    remedies: ClassVar[dict[str, str]] = {
        "input": TEXTS,
        "dimensions": "the model's vectors have one length: leave it out",
        "pooling": 'give "mean" or "last"',
    }

    id_fields: ClassVar[tuple[str, ...]] = ("input",)

    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    pooling: Pooling | None = None
    """Of the final hidden states of a text's tokens: their mean, or the last one."""


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
