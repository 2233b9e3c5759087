"""Embeddings: texts become vectors of unit length."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from typing import cast

import msgspec

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import Submit
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server import memory
from lattice_serve.server.joined import AnswerSize
from lattice_serve.server.schemas.embeddings import (
    MAX_INPUT_TOKENS,
    Embedding,
    EmbeddingRequest,
    Embeddings,
    EmbeddingUsage,
)
from lattice_serve.server.services import Services, one_by_one


async def embed(services: Services, request: EmbeddingRequest, tenant: str) -> Embeddings:
    """Raises the error that says why the request cannot be served, or not now."""
    services.check_model(request.model)
    size = services.embedding_size
    if request.dimensions not in (None, size):
        raise InvalidParameter(
            f"dimensions is {request.dimensions}: the model's vectors have {size} numbers: give that, or leave it out",
            param="dimensions",
        )
    texts = request.texts
    services.admit(tenant, len(texts))
    prompts = [await _ids(services, text) async for text in one_by_one(texts)]
    tokens = sum(map(len, prompts))
    if tokens > MAX_INPUT_TOKENS:
        raise InvalidParameter(
            f"input has {tokens} tokens: give at most {MAX_INPUT_TOKENS} in one request", param="input"
        )
    memory.current().hold(sum(ids.itemsize * len(ids) for ids in prompts))
    services.admit(tenant, len(texts))  # Again: others may have come in while the texts were tokenized.
    params = SamplingParams(max_tokens=0)
    requests = [Submit("", ids, params, pooling=request.pooling or "mean") for ids in prompts]
    # Written one by one: 2048 long vectors at once would hold up other requests for as long as that takes.
    data = [msgspec.Raw()] * len(prompts)
    answer = AnswerSize("input", "ask for fewer in one request")
    with services.generate(tenant, requests) as generation:
        async for index, output in generation:
            assert output.embedding is not None, "the engine was asked for a vector"
            vector = _unit(output.embedding)
            embedding = Embedding(index, _base64(vector) if request.encoding_format == "base64" else vector)
            encoded = msgspec.json.encode(embedding)
            data[index] = msgspec.Raw(encoded)
            answer.add(len(encoded))
    return Embeddings(cast("list[Embedding]", data), services.settings.model_name, EmbeddingUsage(tokens, tokens))


async def _ids(services: Services, text: str | list[int]) -> array[int]:
    if isinstance(text, str):
        return await services.encode(text)
    return Tokenizer.checked(text, services.tokenizer.vocab_size, param="input")


def _unit(vector: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _base64(vector: list[float]) -> str:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
