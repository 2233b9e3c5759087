"""`POST /tokenize` and `POST /detokenize`: the bodies."""

from __future__ import annotations

from typing import ClassVar

from lattice_serve.server.schemas.base import RequestModel, TokenIds


class TokenizeRequest(RequestModel):
    model: str | None = None
    prompt: str
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    remedies: ClassVar[dict[str, str]] = {"tokens": "give a list of token ids"}

    model: str | None = None
    tokens: TokenIds
