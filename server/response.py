"""Responses: a chat whose past the server remembers, told as items and events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.server.chat import ChatAnswer
from lattice_serve.server.joined import AnswerSize
from lattice_serve.server.schemas.chat import ChunkChoice
from lattice_serve.server.schemas.responses import (
    OutputCall,
    OutputMessage,
    OutputText,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
)
from lattice_serve.server.services import Services

_encode = msgspec.json.Encoder().encode
_SCORE_BYTES = 512
"""That a log-probability takes as objects, about."""

_NAMES = {
    "messages": "input",
    "response_format": "text",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}
"""Fields of a chat that have another name here."""


async def respond(services: Services, request: ResponseRequest, salt: str) -> bytes:
    """The whole response as JSON."""
    body = b""
    async with aclosing(_events(services, request, salt)) as events:
        async for event in events:
            body = _encode(event.get("response"))
    return body


async def stream(services: Services, request: ResponseRequest, salt: str) -> AsyncGenerator[bytes, None]:
    """Its events, as they are sent."""
    number = 0
    async with aclosing(_events(services, request, salt)) as events:
        async for event in events:
            data = _encode({**event, "sequence_number": number})
            number += 1
            yield b"event: " + event["type"].encode() + b"\ndata: " + data


async def _events(services: Services, request: ResponseRequest, salt: str) -> AsyncGenerator[dict[str, Any], None]:
    """The last one has the whole response. Raises the error that says why it cannot be made, or not now."""
    try:
        async with aclosing(_told(services, request, salt)) as events:
            async for event in events:
                yield event
    except InvalidParameter as error:
        param = error.param or ""
        if param not in _NAMES:
            raise
        raise InvalidParameter(error.message.replace(param, _NAMES[param], 1), param=_NAMES[param]) from error


async def _told(services: Services, request: ResponseRequest, salt: str) -> AsyncGenerator[dict[str, Any], None]:
    """The same, but that errors name the fields of a chat."""
    before: list[dict[str, Any]] = []
    if request.previous_response_id is not None:
        stored = services.responses.get(salt, request.previous_response_id, "previous_response_id")
        before = msgspec.json.decode(stored.messages)
    answer = await ChatAnswer.prepare(services, request.chat(before))
    response_id = f"resp_{uuid.uuid4().hex}"
    response = ResponseObject.of(
        request, id=response_id, created_at=int(time.time()), model=services.settings.model_name
    )
    writer = _Writer(response)
    reason, begun = None, False
    size = AnswerSize(answer.longest_param, "ask for less in one request")
    async with aclosing(answer.each(salt)) as outputs:
        async for _, choices in outputs:
            if not begun:  # not earlier: what fails before the first token is no response
                begun = True
                yield {"type": "response.created", "response": response}
                yield {"type": "response.in_progress", "response": response}
            for choice in choices:
                size.add(_held(choice))
                reason = choice.finish_reason or reason
                for event in writer.add(choice):
                    yield event
    complete = reason != "length"
    for event in writer.close("completed" if complete else "incomplete"):
        yield event
    usage = answer.usage()
    response.usage = ResponseUsage(
        usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.prompt_tokens_details
    )
    response.status = "completed" if complete else "incomplete"
    response.incomplete_details = None if complete else {"reason": "max_output_tokens"}
    if response.store:
        services.responses.put(salt, response_id, _encode(response), [*before, *request.messages, writer.message()])
    yield {"type": f"response.{response.status}", "response": response}


def _held(choice: ChunkChoice) -> int:
    """About the bytes that the response takes more with a part of it: four copies of the text, in its last events, and
    objects."""
    text = len(choice.delta.content or "") + sum(len(call.function.arguments) for call in choice.delta.tool_calls or ())
    scores = choice.logprobs.content if choice.logprobs else ()
    return 4 * text + _SCORE_BYTES * sum(1 + len(score.top_logprobs) for score in scores)


class _Writer:
    """Puts what a chat says into the items of a response, and tells of each change."""

    def __init__(self, response: ResponseObject) -> None:
        self._output = response.output = []
        self._open = False
        """Whether the last item is being written."""

    def add(self, choice: ChunkChoice) -> Iterator[dict[str, Any]]:
        """The events of the next choice of a chunk."""
        delta = choice.delta
        if delta.content:
            if not (self._open and isinstance(self._output[-1], OutputMessage)):
                yield from self._begin(OutputMessage(f"msg_{uuid.uuid4().hex}"))
            scores = choice.logprobs.content if choice.logprobs else []
            part = self._text
            part.text += delta.content
            part.logprobs += scores
            yield self._event("output_text.delta", content_index=0, delta=delta.content, logprobs=scores)
        for call in delta.tool_calls or ():
            if call.id:
                name = call.function.name or ""
                yield from self._begin(OutputCall(f"fc_{uuid.uuid4().hex}", call.id, name))
            item = self._output[-1]
            assert isinstance(item, OutputCall), "arguments came without a call"
            item.arguments += call.function.arguments
            if call.function.arguments:
                yield self._event("function_call_arguments.delta", delta=call.function.arguments)

    def close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """End the item that is being written, if one is."""
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item.status = status
        if isinstance(item, OutputMessage):
            part = self._text
            yield self._event("output_text.done", content_index=0, text=part.text, logprobs=part.logprobs)
            yield self._event("content_part.done", content_index=0, part=part)
        else:
            yield self._event("function_call_arguments.done", name=item.name, arguments=item.arguments)
        yield self._item_event("output_item.done")

    def message(self) -> dict[str, Any]:
        """What was said, as a message of the chat."""
        text = "".join(item.content[0].text for item in self._output if isinstance(item, OutputMessage))
        calls = [
            {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
            for item in self._output
            if isinstance(item, OutputCall)
        ]
        return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})

    @property
    def _text(self) -> OutputText:
        item = self._output[-1]
        assert isinstance(item, OutputMessage), "text is not part of a call"
        return item.content[0]

    def _begin(self, item: OutputMessage | OutputCall) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._output.append(item)
        self._open = True
        yield self._item_event("output_item.added")
        if isinstance(item, OutputMessage):
            item.content = [OutputText()]
            yield self._event("content_part.added", content_index=0, part=item.content[0])

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self._output[-1].id, "output_index": len(self._output) - 1}
        return {"type": f"response.{kind}", **place, **fields}

    def _item_event(self, kind: str) -> dict[str, Any]:
        return {"type": f"response.{kind}", "output_index": len(self._output) - 1, "item": self._output[-1]}
