"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`: the model's own tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.chat import prompt_ids
from lattice_serve.server.openapi import body, failures
from lattice_serve.server.schemas.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from lattice_serve.server.services import MAX_MODEL_LEN, Injected

router = APIRouter()


@router.post(
    "/tokenize",
    openapi_extra=body(TokenizeRequest, TokenizeChatRequest),
    responses=failures(400, 404, 429),
)
async def tokenize(request: Request, services: Injected) -> dict[str, Any]:
    """Token ids of a text, or of the prompt that the messages of a chat make."""
    data = await request.body()
    asked = TokenizeRequest.parse(data)
    services.check_model(asked.model)
    if asked.prompt is None:
        ids = (await prompt_ids(services, TokenizeChatRequest.parse(data))).tolist()
    elif asked.prompt in services.tokenizer.controls:
        # Clients ask so for the id of the end of text, whose name is never part of a prompt.
        ids = [services.tokenizer.controls[asked.prompt]]
    else:
        ids = (await services.encode(asked.prompt)).tolist()
    texts = [services.tokenizer.token_text(token_id) for token_id in ids] if asked.return_token_strs else None
    return {"tokens": ids, "count": len(ids), "max_model_len": MAX_MODEL_LEN, "token_strs": texts}


@router.post("/detokenize", openapi_extra=body(DetokenizeRequest), responses=failures(400, 404))
async def detokenize(request: Request, services: Injected) -> dict[str, str]:
    """The text of token ids."""
    asked = DetokenizeRequest.parse(await request.body())
    services.check_model(asked.model)
    Tokenizer.check(asked.tokens, services.tokenizer.vocab_size, param="tokens")
    return {"prompt": await services.decode(asked.tokens)}


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
