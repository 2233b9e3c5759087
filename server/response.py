"""Responses: a chat whose past the server remembers, told as items and events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from lattice_serve.engine.errors import InvalidParameter, LatticeError
from lattice_serve.server.chat import ChatAnswer
from lattice_serve.server.errors import error_type
from lattice_serve.server.event_json import event_json
from lattice_serve.server.joined import AnswerSize
from lattice_serve.server.schemas.chat import ChunkChoice, TokenScore
from lattice_serve.server.schemas.responses import (
    OutputCall,
    OutputMessage,
    OutputText,
    ResponseError,
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


async def respond(services: Services, request: ResponseRequest, tenant: str) -> bytes:
    """The whole response as JSON."""
    body = b""
    async with aclosing(_events(services, request, tenant)) as events:
        async for event in events:
            body = _encode(event.get("response"))
    return body


class ResponseStream:
    """The events of a response as they are sent, and those that tell of its failure."""

    def __init__(self, services: Services, request: ResponseRequest, tenant: str) -> None:
        self._events = _events(services, request, tenant)
        self._response: ResponseObject | None = None
        """As it is now, once it has begun."""
        self._number = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._events) as events:
            async for event in events:
                self._response = event.get("response", self._response)
                yield self._written(event)

    def failed(self, error: LatticeError) -> bytes:
        """What ends the stream: OpenAI's `error` event, and `response.failed` where it has begun."""
        fault = ResponseError.of(error)
        told = {"code": fault.code, "message": error.message, "param": error.param}
        # Of two clients, one looks for these in the event, as it is documented, and the other in its `error`.
        events: list[dict[str, Any]] = [{"type": "error", **told, "error": {"type": error_type(error.status), **told}}]
        if self._response is not None:
            self._response.status, self._response.error = "failed", fault
            for item in self._response.output:
                item.status = "incomplete" if item.status == "in_progress" else item.status
            events.append({"type": "response.failed", "response": self._response})
        return b"".join(self._written(event) + b"\n\n" for event in events)

    def _written(self, event: dict[str, Any]) -> bytes:
        data = event_json({**event, "sequence_number": self._number})
        self._number += 1
        return b"event: %b\ndata: %b" % (event["type"].encode(), data)


async def _events(services: Services, request: ResponseRequest, tenant: str) -> AsyncGenerator[dict[str, Any], None]:
    """The last one has the whole response. Raises the error that says why it cannot be made, or not now."""
    try:
        async with aclosing(_told(services, request, tenant)) as events:
            async for event in events:
                yield event
    except InvalidParameter as error:
        param = error.param or ""
        if param not in _NAMES:
            raise
        raise InvalidParameter(error.message.replace(param, _NAMES[param], 1), param=_NAMES[param]) from error


async def _told(services: Services, request: ResponseRequest, tenant: str) -> AsyncGenerator[dict[str, Any], None]:
    """The same, but that errors name the fields of a chat."""
    before: list[dict[str, Any]] = []
    if request.previous_response_id is not None:
        stored = services.responses.get(tenant, request.previous_response_id, "previous_response_id")
        before = msgspec.json.decode(stored.messages)
    answer = await ChatAnswer.prepare(services, request.chat(before), tenant)
    response_id = f"resp_{uuid.uuid4().hex}"
    response = ResponseObject.of(
        request, id=response_id, created_at=int(time.time()), model=services.settings.model_name
    )
    writer = _Writer(response)
    reason, begun = None, False
    size = AnswerSize(answer.longest_param, "ask for less in one request")
    async with aclosing(answer.each(tenant)) as outputs:
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
    for event in writer.end("completed" if complete else "incomplete"):
        yield event
    usage = answer.usage()
    response.usage = ResponseUsage(
        usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.prompt_tokens_details
    )
    response.status = "completed" if complete else "incomplete"
    response.incomplete_details = None if complete else {"reason": "max_output_tokens"}
    if response.store:
        services.responses.put(tenant, response_id, _encode(response), [*before, *request.messages, writer.message()])
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
        self._scores: list[TokenScore] = []
        """Of tokens whose text is held back: it may become a message, or a call, which has no place for them."""

    def add(self, choice: ChunkChoice) -> Iterator[dict[str, Any]]:
        """The events of the next choice of a chunk."""
        delta = choice.delta
        if choice.logprobs:
            self._scores += choice.logprobs.content
        if delta.content:
            yield from self._write(delta.content)
        for call in delta.tool_calls or ():
            self._scores = []
            if call.id:
                name = call.function.name or ""
                yield from self._begin(OutputCall(f"fc_{uuid.uuid4().hex}", call.id, name))
            item = self._output[-1]
            assert isinstance(item, OutputCall), "arguments came without a call"
            item.arguments += call.function.arguments
            if call.function.arguments:
                yield self._event("function_call_arguments.delta", delta=call.function.arguments)

    def end(self, status: str) -> Iterator[dict[str, Any]]:
        """End the answer. One without a text and calls is an empty message."""
        if not self._output or (self._scores and isinstance(self._output[-1], OutputMessage)):
            yield from self._write("")
        yield from self._close(status)

    def _write(self, text: str) -> Iterator[dict[str, Any]]:
        """Add to the message, the scores held back with it."""
        if not (self._open and isinstance(self._output[-1], OutputMessage)):
            yield from self._begin(OutputMessage(f"msg_{uuid.uuid4().hex}"))
        scores, self._scores = self._scores, []
        part = self._text
        part.text += text
        part.logprobs += scores
        if text or scores:
            yield self._event("output_text.delta", content_index=0, delta=text, logprobs=scores)

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
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
        yield from self._close()
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
