"""`POST /tokenize` and `POST /detokenize`: the model's own tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from lattice_serve.server.services import MAX_MODEL_LEN, Injected

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request, services: Injected) -> dict[str, Any]:
    """Token ids of a text."""
    body = TokenizeRequest.parse(await request.body())
    services.check_model(body.model)
    ids = await services.encode(body.prompt)
    texts = [services.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return {"tokens": ids, "count": len(ids), "max_model_len": MAX_MODEL_LEN, "token_strs": texts}


@router.post("/detokenize")
async def detokenize(request: Request, services: Injected) -> dict[str, str]:
    """The text of token ids."""
    body = DetokenizeRequest.parse(await request.body())
    services.check_model(body.model)
    Tokenizer.check(body.tokens, services.tokenizer.vocab_size, param="tokens")
    return {"prompt": await services.decode(body.tokens)}
