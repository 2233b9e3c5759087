"""Finds tool calls in the text of an answer while it comes."""

from __future__ import annotations

import json
import re
import uuid
from enum import Enum, auto

from lattice_serve.server.schemas.chat import CallDelta, Delta, FunctionDelta
from lattice_serve.server.template import TOOL_CALL

_CLOSE = TOOL_CALL.replace("<", "</")
_HEADER = re.compile(
    r'[\s\[,]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_MAX_HEADER = 4096
"""Characters in which the name of the function and the beginning of its arguments must come."""


class _At(Enum):
    TEXT = auto()
    HEADER = auto()
    """In a call, before its arguments."""
    ARGUMENTS = auto()
    REST = auto()
    """In a call, after its arguments."""
    END = auto()
    """Nothing more is wanted."""


class ToolCallParser:
    """Text in, deltas out: content, and tool calls whose arguments come in pieces.

    Tagged, calls stand in the text as Hermes models write them: `<tool_call>{"name": ..., "arguments": {...}}
    </tool_call>`. What looks like one and is none stays content. Untagged, the text is a JSON list of such calls, and
    nothing else. With `parallel` False, what follows the first call is dropped.
    """

    def __init__(self, *, tagged: bool, parallel: bool) -> None:
        self.calls = 0
        self._tagged = tagged
        self._parallel = parallel
        self._at = _At.TEXT if tagged else _At.HEADER
        self._text = ""
        """Not yet told apart."""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> list[Delta]:
        self._text += text
        deltas: list[Delta] = []
        steps = {
            _At.TEXT: self._read_text,
            _At.HEADER: self._read_header,
            _At.ARGUMENTS: self._read_arguments,
            _At.REST: self._read_rest,
        }
        while self._at in steps and steps[self._at](deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        opening = TOOL_CALL if self._at is _At.HEADER else ""
        held = self._tagged and self._at in (_At.TEXT, _At.HEADER) and opening + self._text
        self._at = _At.END
        return [Delta(content=held)] if held else []

    # Each step takes what it can off the pending text, and says whether another step may go on.

    def _read_text(self, deltas: list[Delta]) -> bool:
        content, opening, rest = self._text.partition(TOOL_CALL)
        if not opening:
            held = _overlap(self._text, TOOL_CALL)
            content, rest = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        self._text = rest
        if content:
            deltas.append(Delta(content=content))
        if opening:
            self._at = _At.HEADER
        return bool(opening)

    def _read_header(self, deltas: list[Delta]) -> bool:
        header = _HEADER.match(self._text)
        if header is not None:
            self._begin_call(deltas, json.loads(header[1], strict=False))
            self._text = self._text[header.end() :]
            self._at = _At.ARGUMENTS
            return True
        if not self._tagged:
            return False
        body, close, rest = self._text.partition(_CLOSE)
        if not close and len(self._text) <= _MAX_HEADER:
            return False
        call = _whole_call(body) if close else None
        if call is None:
            deltas.append(Delta(content=TOOL_CALL + body + close))
            self._at = _At.TEXT
        else:
            name, arguments = call
            self._begin_call(deltas, name)
            self._add_arguments(deltas, arguments)
            self._end_call()
        self._text = rest
        return True

    def _read_arguments(self, deltas: list[Delta]) -> bool:
        end = self._find_end()
        if self._text[:end]:
            self._add_arguments(deltas, self._text[:end])
        self._text = self._text[end:]
        if self._depth == 0 and end:
            self._at = _At.REST
        return self._at is _At.REST

    def _read_rest(self, deltas: list[Delta]) -> bool:
        closing = _CLOSE if self._tagged else "}"
        _, close, rest = self._text.partition(closing)
        if close:
            self._text = rest
            self._end_call()
            return True
        self._text = self._text[-len(closing) :]
        return False

    def _begin_call(self, deltas: list[Delta], name: str) -> None:
        call_id = f"call_{uuid.uuid4().hex}"
        deltas.append(Delta(tool_calls=[CallDelta(self.calls, FunctionDelta(name=name), call_id, "function")]))
        self.calls += 1

    def _add_arguments(self, deltas: list[Delta], arguments: str) -> None:
        deltas.append(Delta(tool_calls=[CallDelta(self.calls - 1, FunctionDelta(arguments))]))

    def _end_call(self) -> None:
        if not self._parallel:
            self._at = _At.END
        else:
            self._at = _At.TEXT if self._tagged else _At.HEADER

    def _find_end(self) -> int:
        """Where in the pending text the JSON object of the arguments ends; its length while it does not."""
        for place, character in enumerate(self._text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return len(self._text)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def _whole_call(body: str) -> tuple[str, str] | None:
    """Name and arguments (JSON) of a call that does not have them in the usual order."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
