"""Embeddings: texts become vectors of unit length."""

from __future__ import annotations

import base64
import math
import sys
from array import array

from lattice_serve.engine.messages import Submit
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.schemas.base import each
from lattice_serve.server.schemas.embeddings import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from lattice_serve.server.services import Services


async def embed(services: Services, request: EmbeddingRequest, tenant: str) -> Embeddings:
    """Raises the error that says why the request cannot be served, or not now."""
    services.check_model(request.model)
    texts = each(request.input, "input")
    await services.let_in(tenant, len(texts), "input")
    prompts = [await _ids(services, text) for text in texts]
    services.admit(tenant, len(texts), "input")  # Again: others may have come in while the texts were tokenized.
    params = SamplingParams(max_tokens=0)
    requests = [Submit("", ids, params, pooling=request.pooling or "mean") for ids in prompts]
    data: list[Embedding] = []
    with services.generate(tenant, requests) as generation:
        async for index, output in generation:
            assert output.embedding is not None, "the engine was asked for a vector"
            vector = _unit(output.embedding)
            data.append(Embedding(index, _base64(vector) if request.encoding_format == "base64" else vector))
    data.sort(key=lambda embedding: embedding.index)
    tokens = sum(map(len, prompts))
    return Embeddings(data, services.settings.model_name, EmbeddingUsage(tokens, tokens))


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
