"""Chats: messages become a prompt by the model's chat template, and text becomes messages and tool calls."""

from __future__ import annotations

import json
import uuid
from array import array
from typing import Any

import msgspec

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import TokenLogprob, TokenOutput
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.answer import LOWEST_LOGPROB, Answer, check
from lattice_serve.server.schemas.chat import (
    AnswerCall,
    AnswerFunction,
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChatPrompt,
    ChatRequest,
    ChunkChoice,
    Delta,
    Message,
    TokenScore,
    TopLogprob,
)
from lattice_serve.server.schemas.tools import NamedTool
from lattice_serve.server.services import Services
from lattice_serve.server.template import TOOL_CALL
from lattice_serve.server.tool_calls import ToolCallParser

MAX_DEPTH = 100
"""Of objects and lists in each other, in what a chat template gets."""


class ChatAnswer(Answer[ChatRequest, ChunkChoice]):
    id_prefix = "chatcmpl"
    whole_type = ChatCompletion
    chunk_type = ChatChunk

    def __init__(self, services: Services, request: ChatRequest, prompt_ids: array[int]) -> None:
        template = services.template
        params = [_stopped(request.sampling(choice), template.stop) for choice in range(request.choices)]
        super().__init__(services, request, [prompt_ids], params)
        self._choices = [
            _Choice(index, request, services.tokenizer, plain=template.plain) for index in range(request.choices)
        ]

    @classmethod
    async def prepare(cls, services: Services, request: ChatRequest, tenant: str) -> ChatAnswer:
        check(services, request)
        if request.offered_tools and not (request.must_call or services.template.knows_tools):
            raise InvalidParameter(
                f"tools: the model's chat template does not have calls as {TOOL_CALL}, which this server reads: "
                "leave tools out, or set tool_choice to none, required or a function",
                param="tools",
            )
        await services.let_in(tenant, request.choices)
        return cls(services, request, await prompt_ids(services, request))

    def parts(self, index: int, output: TokenOutput) -> list[ChunkChoice]:
        return self._choices[index].parts(output)

    def joined(self, parts: list[list[ChunkChoice]]) -> list[ChatChoice]:
        return [_joined(choice) for choice in parts]


async def prompt_ids(services: Services, request: ChatPrompt) -> array[int]:
    """Token ids of the prompt that the messages make. Raises what `ChatTemplate.render` does."""
    tokenizer, template = services.tokenizer, services.template
    messages = [_variables(message, template.knows_developers) for message in request.messages]
    # A text that is in no message shows where the last one ends, and with it the prompt.
    end = uuid.uuid4().hex
    if request.continue_final_message:
        messages[-1]["content"] += end
    tools = [tool.model_dump(exclude_none=True) for tool in request.offered_tools]
    # Names of control pieces in what a client gives are text: only the template's own are more.
    given = _unmarked(tokenizer, {**(request.chat_template_kwargs or {}), "messages": messages, "tools": tools or None})
    text = await template.render(
        {
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            "add_generation_prompt": request.begins_message,
            **given,
        }
    )
    if request.continue_final_message:
        text, found, _ = text.rpartition(end)
        if not found:
            raise InvalidParameter(
                "continue_final_message: the chat template leaves the last message out", param="continue_final_message"
            )
    ids = await services.encode_marked(text)
    if not ids:
        raise InvalidParameter("messages: the chat template makes no text of them", param="messages")
    return ids


def _variables(message: Message, knows_developers: bool) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments of calls parsed."""
    variables: dict[str, Any] = message.model_dump(exclude_none=True)
    variables["content"] = message.content or ""
    if message.role == "developer" and not knows_developers:
        variables["role"] = "system"
    for call in variables.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(
                f"messages: arguments of a tool call are no JSON: {error}", param="messages"
            ) from error
    return variables


def _unmarked(tokenizer: Tokenizer, value: Any, depth: int = 0) -> Any:
    """`value` with no name of a control piece in its strings."""
    if depth > MAX_DEPTH:
        raise InvalidParameter(
            f"messages: objects and lists are nested more than {MAX_DEPTH} deep: give flatter ones", param="messages"
        )
    if isinstance(value, str):
        return tokenizer.unmark(value)
    if isinstance(value, list):
        return [_unmarked(tokenizer, each, depth + 1) for each in value]
    if isinstance(value, dict):
        return {tokenizer.unmark(key): _unmarked(tokenizer, each, depth + 1) for key, each in value.items()}
    return value


def _stopped(params: SamplingParams, stop: tuple[str, ...]) -> SamplingParams:
    return msgspec.structs.replace(params, stop=(*params.stop, *stop))


class _Choice:
    """One choice as it grows."""

    def __init__(self, index: int, request: ChatRequest, tokenizer: Tokenizer, *, plain: bool) -> None:
        self._index = index
        self._with_logprobs = bool(request.logprobs)
        self._tokenizer = tokenizer
        self._begun = False
        self._opening = "" if plain and request.begins_message else None
        """What has come before it is known whether a space belongs to the transcript."""
        self._parser: ToolCallParser | None = None
        # OpenAI's finish reason says whether the model chose to call, which a named function leaves it no choice of.
        self._chooses = not isinstance(request.tool_choice, NamedTool)
        if request.offered_tools:
            parallel = request.parallel_tool_calls is not False
            self._parser = ToolCallParser(tagged=not request.must_call, parallel=parallel)

    def parts(self, output: TokenOutput) -> list[ChunkChoice]:
        """What `output` adds: a choice with the role at the beginning, one a delta, one with the reason at the end."""
        last = output.finish_reason is not None
        text = output.text if self._opening is None else self._open(output.text, last)
        parts = [ChunkChoice(self._index, delta) for delta in self._deltas(text, last)]
        if self._with_logprobs and output.logprob is not None:
            parts[0].logprobs = ChatLogprobs([self._score(output.logprob)])
        if not self._begun:
            self._begun = True
            parts.insert(0, ChunkChoice(self._index, Delta(role="assistant", content="")))
        if output.finish_reason is not None:
            parts.append(ChunkChoice(self._index, Delta(), None, self._finish_reason(output), output.stop_reason))
        return parts

    def _open(self, text: str, last: bool) -> str:
        """What may be shown of a transcript's answer that begins with `text`."""
        opening = (self._opening or "") + text
        if opening in ("", " ") and not last:
            self._opening = opening
            return ""
        self._opening = None
        return opening[1:] if opening[:1] == " " and opening[1:2].isalnum() else opening

    def _deltas(self, text: str, last: bool) -> list[Delta]:
        """At least one, for every token has a chunk."""
        if self._parser is None:
            return [Delta(content=text)]
        deltas = self._parser.feed(text)
        if last:
            deltas += self._parser.finish()
        return deltas or [Delta(content="")]

    def _finish_reason(self, output: TokenOutput) -> ChatFinishReason | None:
        called = self._parser is not None and self._parser.calls > 0
        if output.finish_reason == "stop" and called and self._chooses:
            return "tool_calls"
        return output.finish_reason

    def _score(self, entry: TokenLogprob) -> TokenScore:
        chosen = self._top(entry.token_id, entry.logprob)
        top = [self._top(token_id, logprob) for token_id, logprob in entry.top]
        return TokenScore(chosen.token, chosen.logprob, chosen.bytes, top)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        tokenizer = self._tokenizer
        data = list(tokenizer.token_bytes(token_id))
        return TopLogprob(tokenizer.token_text(token_id), max(logprob, LOWEST_LOGPROB), data)


def _joined(parts: list[ChunkChoice]) -> ChatChoice:
    """One choice from its parts."""
    content = ""
    scores: list[TokenScore] = []
    calls: list[AnswerCall] = []
    for part in parts:
        content += part.delta.content or ""
        if part.logprobs is not None:
            scores += part.logprobs.content
        for call in part.delta.tool_calls or ():
            if call.id:
                calls.append(AnswerCall(call.id, AnswerFunction(call.function.name or "", "")))
            calls[call.index].function.arguments += call.function.arguments
    last = parts[-1]
    return ChatChoice(
        last.index,
        AnswerMessage(None if calls and not content.strip() else content, calls or msgspec.UNSET),
        ChatLogprobs(scores) if scores else None,
        last.finish_reason,
        last.stop_reason,
    )
