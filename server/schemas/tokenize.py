"""`POST /tokenize` and `POST /detokenize`: the bodies."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.server.schemas.base import RequestModel, TokenIds
from lattice_serve.server.schemas.chat import ChatPrompt


class TokenizeRequest(RequestModel):
    """A text; with `messages`, the body is a `TokenizeChatRequest`."""

    remedies: ClassVar[dict[str, str]] = {"prompt": "give a string, or messages"}

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParameter("prompt: give a text as prompt, or messages", param="prompt")
        return self


class TokenizeChatRequest(ChatPrompt):
    """A chat: the prompt that its template makes of it."""

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    remedies: ClassVar[dict[str, str]] = {"tokens": "give a list of token ids"}

    id_fields: ClassVar[tuple[str, ...]] = ("tokens",)

    model: str | None = None
    tokens: TokenIds
