"""`POST /v1/chat/completions`: the body, and its answer, whole or in chunks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import FinishReason
from lattice_serve.engine.sampling import MAX_LOGPROBS, Grammar
from lattice_serve.server.schemas.base import Off, RequestModel
from lattice_serve.server.schemas.generation import NOT_SUPPORTED, GenerationRequest, Usage
from lattice_serve.server.schemas.tools import Call, NamedTool, Tool, ToolChoice, calls

MAX_MESSAGES = 10_000
MAX_TOOLS = 128
DEFAULT_MAX_TOKENS = 2048
"""Of an answer whose request does not say: there is no longest context that would end it."""


def _joined(content: object) -> object:
    """The text of content parts, a line each, as other servers give it to templates that take strings."""
    if not isinstance(content, list):
        return content
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise ValueError(f"part {place} is not served: give parts of type text, with a string as text")
        texts.append(text)
    return "\n".join(texts)


_TEXT_PARTS = {
    "type": "array",
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"type": {"const": kind}, kind: {"type": "string"}},
                "required": ["type", kind],
            }
            for kind in ("text", "refusal")
        ]
    },
}
Content = Annotated[
    str,
    BeforeValidator(_joined),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXT_PARTS]}),
]


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    refusal: str | None = None
    """Of an assistant: what it said in place of content."""
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        return self


class ChatPrompt(RequestModel):
    """What the chat template sees."""

    remedies: ClassVar[dict[str, str]] = {
        "chat_template": "only that of the model folder is used: leave it out",
        "documents": NOT_SUPPORTED,
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: None = None

    @model_validator(mode="after")
    def _check_final_message(self) -> ChatPrompt:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidParameter(
                "continue_final_message: it goes on with the last message, add_generation_prompt begins a new one: "
                "give one of the two",
                param="continue_final_message",
            )
        if self.continue_final_message and not self.messages[-1].content:
            raise InvalidParameter(
                "continue_final_message: the last message has no content to go on with", param="continue_final_message"
            )
        return self

    @property
    def begins_message(self) -> bool:
        """Whether the prompt ends with the cue of a new answer."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the template shows."""
        return self.tools or []


class ChatRequest(GenerationRequest, ChatPrompt):
    remedies: ClassVar[dict[str, str]] = (
        GenerationRequest.remedies
        | ChatPrompt.remedies
        | {
            "audio": NOT_SUPPORTED,
            "echo": NOT_SUPPORTED,
            "function_call": "give tool_choice instead",
            "functions": "give tools instead",
            "modalities": 'this server answers in text alone: give ["text"]',
            "moderation": NOT_SUPPORTED,
            "prompt_logprobs": "not in chats: use /v1/completions",
            "reasoning_effort": NOT_SUPPORTED,
            "store": "answers are not stored: leave it out, or give false",
            "verbosity": NOT_SUPPORTED,
            "web_search_options": NOT_SUPPORTED,
            "tool_choice": 'give "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
        }
    )

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    audio: None = None
    echo: Off | None = None
    function_call: None = None
    functions: None = None
    modalities: list[Literal["text"]] | None = None
    moderation: None = None
    prompt_logprobs: None = None
    reasoning_effort: Literal["none"] | None = None
    store: Off | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.token_limit == 0:
            raise InvalidParameter(f"{self.limit_name} is 0: give at least 1", param=self.limit_name)
        if self.top_logprobs and not self.logprobs:
            raise InvalidParameter("top_logprobs: give it only with logprobs: true", param="top_logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidParameter("tools: two functions have one name", param="tools")
        if self.must_call and not names:
            raise InvalidParameter("tool_choice: there are no tools to choose from", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise InvalidParameter("tool_choice: names a function that is not in tools", param="tool_choice")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be tool calls and nothing else."""
        return self.tool_choice not in (None, "none", "auto")

    def _own_sampling(self) -> dict[str, Any]:
        if self.must_call and self.grammar is not None:
            raise InvalidParameter(
                f"tool_choice: an answer that must be a call cannot keep to {self.grammar.param}: give one of the two",
                param="tool_choice",
            )
        return {
            "max_tokens": DEFAULT_MAX_TOKENS if self.token_limit is None else self.token_limit,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "grammar": self._calls() if self.must_call else self.grammar,
        }

    def _calls(self) -> Grammar:
        """That the answer is calls of the functions that may be called."""
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        functions = [tool.function for tool in self.tools or () if chosen in (None, tool.function.name)]
        return calls(functions, one=chosen is not None or self.parallel_tool_calls is False)


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenScore(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(msgspec.Struct):
    content: list[TokenScore]
    refusal: None = None


class FunctionDelta(msgspec.Struct):
    arguments: str = ""
    name: str | msgspec.UnsetType = msgspec.UNSET


class CallDelta(msgspec.Struct):
    """A tool call's beginning, with `id`, `type` and the name of the function, or more of its arguments."""

    index: int
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct):
    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: list[CallDelta] | msgspec.UnsetType = msgspec.UNSET


ChatFinishReason: TypeAlias = FinishReason | Literal["tool_calls"]


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice] = []
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class AnswerFunction(msgspec.Struct):
    name: str
    arguments: str
    """JSON, or the beginning of it where the answer was cut at its longest."""


class AnswerCall(msgspec.Struct):
    id: str
    function: AnswerFunction
    type: Literal["function"] = "function"


class AnswerMessage(msgspec.Struct):
    content: str | None
    tool_calls: list[AnswerCall] | msgspec.UnsetType = msgspec.UNSET
    refusal: None = None
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
