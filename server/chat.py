"""Chats: messages become a prompt by the model's chat template, and text becomes messages and tool calls."""

from __future__ import annotations

import uuid
from array import array

import msgspec

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.messages import TokenLogprob, TokenOutput
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.answer import LOWEST_LOGPROB, Answer, check
from lattice_serve.server.joined import JsonList, JsonText
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
    TokenScore,
    TopLogprob,
)
from lattice_serve.server.schemas.tools import NamedTool
from lattice_serve.server.services import Services
from lattice_serve.server.template import TOOL_CALL
from lattice_serve.server.tool_calls import ToolCallParser


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
        services.admit(tenant, request.choices)
        return cls(services, request, await prompt_ids(services, request))

    def parts(self, index: int, output: TokenOutput) -> list[ChunkChoice]:
        return self._choices[index].parts(output)

    @property
    def longest_param(self) -> str:
        return "logprobs" if self._request.logprobs else super().longest_param

    def keep(self, index: int, choice: ChunkChoice) -> int:
        return self._choices[index].keep(choice)

    def joined(self) -> list[ChatChoice]:
        return [choice.joined() for choice in self._choices]


async def prompt_ids(services: Services, request: ChatPrompt) -> array[int]:
    """Token ids of the prompt that the messages make. Raises what `ChatTemplate.render` does."""
    tokenizer = services.tokenizer
    # A text that is in no message shows where the last one ends, and with it the prompt.
    end = uuid.uuid4().hex if request.continue_final_message else ""
    fields = {"messages", "chat_template_kwargs", *(["tools"] if request.offered_tools else [])}
    text = await services.template.render(
        {
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            "add_generation_prompt": request.begins_message,
        },
        request.model_dump_json(include=fields, exclude_none=True).encode(),
        end=end,
    )
    if request.continue_final_message:
        text, found, _ = text.rpartition(end)
        if not found:
            raise InvalidParameter(
                "continue_final_message: the chat template leaves the last message out", param="continue_final_message"
            )
    try:
        ids = await services.encode_marked(text)
    except InvalidParameter as error:
        raise InvalidParameter(f"messages: what the chat template makes of them: {error}", param="messages") from error
    if not ids:
        raise InvalidParameter("messages: the chat template makes no text of them", param="messages")
    return ids


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
        self._content = JsonText()
        self._scores = JsonList()
        self._calls: list[tuple[AnswerCall, JsonText]] = []
        """And the arguments of each."""
        self._last: ChunkChoice | None = None
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
            # As OpenAI has it: no content where a call comes, or may still.
            content = None if self._parser is not None and not parts[0].delta.content else ""
            parts.insert(0, ChunkChoice(self._index, Delta(role="assistant", content=content)))
        if output.finish_reason is not None:
            parts.append(ChunkChoice(self._index, Delta(), None, self._finish_reason(output), output.stop_reason))
        return parts

    def keep(self, part: ChunkChoice) -> int:
        """Hold a part of a whole answer; how many bytes it takes."""
        self._last = part
        size = self._content.add(part.delta.content or "")
        if part.logprobs is not None:
            size += self._scores.add(part.logprobs.content)
        for call in part.delta.tool_calls or ():
            if call.id:
                self._calls.append((AnswerCall(call.id, AnswerFunction(call.function.name or "", "")), JsonText()))
            size += self._calls[call.index][1].add(call.function.arguments)
        return size

    def joined(self) -> ChatChoice:
        """What was kept."""
        assert self._last is not None, "an answer has a part"
        calls = []
        for call, arguments in self._calls:
            call.function = msgspec.structs.replace(call.function, arguments=arguments.json)
            calls.append(call)
        content = None if calls and not self._content else self._content.json
        return ChatChoice(
            self._last.index,
            msgspec.structs.replace(AnswerMessage(None, calls or msgspec.UNSET), content=content),
            ChatLogprobs(self._scores.json) if self._scores else None,  # type: ignore[arg-type]
            self._last.finish_reason,
            self._last.stop_reason,
        )

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
        return deltas or [Delta()]

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
