"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`: the model's own tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.chat import prompt_ids
from lattice_serve.server.openapi import body, failures
from lattice_serve.server.schemas.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from lattice_serve.server.services import MAX_MODEL_LEN, Injected, Services
from lattice_serve.server.stream import JsonStream

router = APIRouter()


_SLICE = 4096
"""Tokens that are written at a time."""


@router.post(
    "/tokenize",
    openapi_extra=body(TokenizeRequest, TokenizeChatRequest),
    responses=failures(400, 404, 429),
)
async def tokenize(request: Request, services: Injected) -> Response:
    """Token ids of a text, or of the prompt that the messages of a chat make."""
    data = await request.body()
    asked = await services.parse(TokenizeRequest, data)
    services.check_model(asked.model)
    if asked.prompt is None:
        ids = await prompt_ids(services, await services.parse(TokenizeChatRequest, data))
    elif asked.prompt in services.tokenizer.controls:
        # Clients ask so for the id of the end of text, whose name is never part of a prompt.
        ids = array("i", [services.tokenizer.controls[asked.prompt]])
    else:
        ids = await services.encode(asked.prompt)
    pieces = _tokens(ids, services.tokenizer if asked.return_token_strs else None)
    return JsonStream(pieces, stall_seconds=services.settings.request_seconds)


async def _tokens(ids: array[int], tokenizer: Tokenizer | None) -> AsyncGenerator[bytes, None]:
    """Token ids, and what the tokenizer, if there is one, calls them."""
    yield b'{"tokens":['
    for start in range(0, len(ids), _SLICE):
        yield (b"," if start else b"") + msgspec.json.encode(ids[start : start + _SLICE].tolist())[1:-1]
    yield b'],"count":%d,"max_model_len":%d,"token_strs":' % (len(ids), MAX_MODEL_LEN)
    if tokenizer is not None:
        yield b"["
        for start in range(0, len(ids), _SLICE):
            names = [tokenizer.token_text(token_id) for token_id in ids[start : start + _SLICE]]
            yield (b"," if start else b"") + msgspec.json.encode(names)[1:-1]
    yield b"null}" if tokenizer is None else b"]}"


@router.post("/detokenize", openapi_extra=body(DetokenizeRequest), responses=failures(400, 404))
async def detokenize(request: Request, services: Injected) -> Response:
    """The text of token ids."""
    asked = await services.read(DetokenizeRequest, request)
    services.check_model(asked.model)
    Tokenizer.check(asked.tokens, services.tokenizer.vocab_size, param="tokens")
    return JsonStream(_text(services, asked.tokens), stall_seconds=services.settings.request_seconds)


async def _text(services: Services, ids: Sequence[int]) -> AsyncGenerator[bytes, None]:
    yield b'{"prompt":"'
    async for text in services.texts(ids):
        yield msgspec.json.encode(text)[1:-1]
    yield b'"}'


@router.get("/tokenizer_info")
async def tokenizer_info(services: Injected) -> dict[str, Any]:
    """What clients need to tokenize and to render chats as the server does."""
    tokenizer = services.tokenizer
    return {
        "tokenizer_class": "sentencepiece",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": MAX_MODEL_LEN,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": services.template.source,
    }
