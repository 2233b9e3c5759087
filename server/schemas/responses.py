"""`POST /v1/responses`: the body, and its answer, whole or as events."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lattice_serve.engine.errors import InvalidParameter, LatticeError, Overloaded
from lattice_serve.server.schemas.base import Count, Off, RequestModel
from lattice_serve.server.schemas.chat import MAX_MESSAGES, MAX_TOOLS, ChatRequest, TokenScore
from lattice_serve.server.schemas.generation import MAX_SALT_LENGTH, MAX_TIMEOUT_SECONDS, NOT_SUPPORTED
from lattice_serve.server.schemas.tools import FunctionName

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"


_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of content parts, and where each has its text."""


def _joined(content: object) -> object:
    """The text of content parts, a line each."""
    if not isinstance(content, list):
        return content
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXTS[kind]) if isinstance(kind, str) and kind in _TEXTS else None
        if not isinstance(text, str):
            raise ValueError(f"part {place} is not served: give parts of type input_text or output_text, with text")
        texts.append(text)
    return "\n".join(texts)


Content = Annotated[str, BeforeValidator(_joined)]


class InputMessage(RequestModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCall(RequestModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(RequestModel):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


def _kind(item: object) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else "message"


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="this type of item is not served: give message, function_call or function_call_output",
    ),
]


def _items(given: object) -> object:
    """Text is short for a message with it."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ValueError("give a text, or a list of items")
    return given


class PlainFormat(RequestModel):
    type: Literal["text", "json_object"]


class SchemaFormat(RequestModel):
    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class TextOptions(RequestModel):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class NoReasoning(RequestModel):
    """What asks for none."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponseTool(RequestModel):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(RequestModel):
    type: Literal["function"]
    name: str


class ResponseRequest(RequestModel):
    """Names and defaults as OpenAI's, then extensions that the chat route has as well. null means absent."""

    remedies: ClassVar[dict[str, str]] = {
        "background": "answers are given while the client waits: leave it out",
        "conversation": "give previous_response_id instead",
        "include": f'give ["{LOGPROBS}"], or leave it out',
        "max_tool_calls": "only functions are called, by the client: leave it out",
        "prompt": "there are no stored prompts: give input and instructions",
        "reasoning": "the model does not reason apart from its answer: leave it out",
        "text": "give a format of type text, json_object, or json_schema with name and schema, and no verbosity",
        "tools": "give functions: {type: function, name, parameters}",
        "tool_choice": 'give "none", "auto", "required" or {"type": "function", "name": ...}',
        "truncation": 'nothing is ever cut off: leave it out, or give "disabled"',
    } | dict.fromkeys(
        ("background_options", "context_management", "image", "access_programs", "moderation"), NOT_SUPPORTED
    )

    model: str | None = None
    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """Of reasoning there is none: some clients ask for it with every request that is not to be stored."""
    top_logprobs: Count | None = None
    truncation: Literal["disabled", "auto"] | None = None

    access_programs: None = None
    background: Off | None = None
    background_options: None = None
    context_management: None = None
    conversation: None = None
    image: None = None
    max_tool_calls: None = None
    moderation: None = None
    prompt: None = None
    reasoning: NoReasoning | None = None

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    priority: Annotated[int, Field(gt=-(2**31), lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_LENGTH)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseRequest:
        if self.top_logprobs and not self.with_logprobs:
            raise InvalidParameter(f'top_logprobs: give it only with include: ["{LOGPROBS}"]', param="top_logprobs")
        return self

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat."""
        messages: list[dict[str, Any]] = []
        for item in self.input:
            if isinstance(item, InputMessage):
                messages.append({"role": item.role, "content": item.content})
            elif isinstance(item, FunctionCall):
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                if messages and messages[-1].get("tool_calls"):
                    messages[-1]["tool_calls"].append(call)
                else:
                    messages.append({"role": "assistant", "tool_calls": [call]})
            else:
                messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
        return messages

    def chat(self, before: list[dict[str, Any]]) -> ChatRequest:
        """The chat that this is, after the messages `before`. Raises `InvalidParameter` as `ChatRequest` does."""
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields = self.model_dump(include=set(_SAME)) | {
            "messages": [*instructions, *before, *self.messages],
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self._response_format(),
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools or ()
            ]
            or None,
            "tool_choice": {"type": "function", "function": {"name": self.tool_choice.name}}
            if isinstance(self.tool_choice, ChosenFunction)
            else self.tool_choice,
            "logprobs": self.with_logprobs,
        }
        return ChatRequest.parse(msgspec.json.encode(fields))

    def _response_format(self) -> dict[str, Any] | None:
        given = None if self.text is None else self.text.format
        if isinstance(given, SchemaFormat):
            return {"type": "json_schema", "json_schema": given.model_dump(by_alias=True, exclude={"type"})}
        return None if given is None else {"type": given.type}


_SAME = (
    "model",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "top_logprobs",
    "seed",
    "priority",
    "timeout",
    "cache_salt",
)


class OutputText(msgspec.Struct):
    text: str = ""
    logprobs: list[TokenScore] = []
    annotations: list[Any] = []
    type: Literal["output_text"] = "output_text"


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    status: str = "in_progress"
    content: list[OutputText] = []
    role: Literal["assistant"] = "assistant"


class OutputCall(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int] = msgspec.field(default_factory=lambda: {"reasoning_tokens": 0})


_SHOWN = {
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "previous_response_id",
    "store",
    "temperature",
    "top_p",
    "text",
    "tool_choice",
    "tools",
}
"""Fields of the request that a response gives back."""


class ResponseError(msgspec.Struct):
    """Why a response failed, with one of the codes that OpenAI's clients know."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str

    @classmethod
    def of(cls, error: LatticeError) -> ResponseError:
        if isinstance(error, Overloaded):
            return cls("rate_limit_exceeded", error.message)
        return cls("invalid_prompt" if isinstance(error, InvalidParameter) else "server_error", error.message)


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response as it is now."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    output: list[OutputMessage | OutputCall] = []
    usage: ResponseUsage | None = None
    incomplete_details: dict[str, str] | None = None
    error: ResponseError | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    store: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    text: dict[str, Any] = msgspec.field(default_factory=lambda: {"format": {"type": "text"}})
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    object: Literal["response"] = "response"

    @classmethod
    def of(cls, request: ResponseRequest, *, id: str, created_at: int, model: str) -> ResponseObject:
        """Before there is any output."""
        given = request.model_dump(include=_SHOWN, exclude_none=True, by_alias=True)
        return cls(id=id, created_at=created_at, model=model, **given)
