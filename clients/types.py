"""The server's answers, typed. Fields that a newer server adds are ignored."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Logprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token; the first prompt token has no log-probability."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []


class Choice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    """None in every chunk of a stream but the last one of its choice."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended the answer; None at the end of the text."""
    logprobs: Logprobs | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class Completion(msgspec.Struct, frozen=True):
    """An answer, or one chunk of a streamed answer."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    """Empty in the chunk that carries `usage` alone."""
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Text of the first choice; empty where there is none."""
        return self.choices[0].text if self.choices else ""


class Message(msgspec.Struct, frozen=True):
    """What was said in a chat, or in a chunk a piece of it."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: Message = Message()
    """Of a whole answer."""
    delta: Message = Message()
    """Of a chunk."""
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """An answer in a chat, or one chunk of a streamed answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What the first choice says; empty where there is none, or only calls."""
        return "".join(choice.message.content or choice.delta.content or "" for choice in self.choices[:1])


class Model(msgspec.Struct, frozen=True):
    id: str
    created: int = 0
    owned_by: str = ""
    root: str | None = None
    max_model_len: int | None = None
    """None: contexts of any length."""


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]


class Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


class Text(msgspec.Struct, frozen=True):
    prompt: str
