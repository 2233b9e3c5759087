"""Finds tool calls in the text of an answer while it comes."""

from __future__ import annotations

import re
import uuid
from enum import Enum, auto

import msgspec

from lattice_serve.server.schemas.chat import CallDelta, Delta, FunctionDelta
from lattice_serve.server.template import TOOL_CALL

_CLOSE = TOOL_CALL.replace("<", "</")
_BEFORE_CALL = re.compile(r"[\s\[,]*")
_HEADER = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)
_MAX_HEADER = 4096
"""Characters in which the name of a call and the beginning of its arguments come, where the arguments are streamed."""
_MAX_OBJECT = 1 << 16
"""Characters of a call whose fields come in another order: it is held back until it is complete."""
_SPECIAL = re.compile(r'["{}\[\]<]')
_SPECIAL_IN_STRING = re.compile(r'["\\]')


class _At(Enum):
    TEXT = auto()
    OPENING = auto()
    """Behind a tag, before the first object."""
    OBJECT = auto()
    """In an object that may be a call, before its arguments."""
    ARGUMENTS = auto()
    REST = auto()
    """In a call, behind its arguments."""
    BETWEEN = auto()
    """Behind a call, where another one or the closing tag may come."""
    END = auto()
    """Nothing more is wanted."""


class ToolCallParser:
    """Text in, deltas out: content, and tool calls whose arguments come in pieces.

    Tagged, calls stand in the text as Hermes models write them: `<tool_call>{"name": ..., "arguments": {...}}
    </tool_call>`, one or more in a tag. What looks like one and is none stays content. Untagged, the text is a JSON
    list of such calls, and nothing else. With `parallel` False, what follows the first call is dropped. White space
    that stands alone before, between or behind calls is dropped. How the text is split does not matter.
    """

    def __init__(self, *, tagged: bool, parallel: bool) -> None:
        self.calls = 0
        self._tagged = tagged
        self._parallel = parallel
        self._at = _At.TEXT if tagged else _At.BETWEEN
        self._text = ""
        """Not yet told apart."""
        self._opening = ""
        """The tag and what follows it, until its first call has begun: content, if none does."""
        self._scanner = _Scanner()
        self._space: list[str] | None = []
        """White space held back; None behind content, where it belongs to that."""

    def feed(self, text: str) -> list[Delta]:
        self._text += text
        deltas: list[Delta] = []
        steps = {
            _At.TEXT: self._read_text,
            _At.OPENING: self._read_opening,
            _At.OBJECT: self._read_object,
            _At.ARGUMENTS: self._read_arguments,
            _At.REST: self._read_rest,
            _At.BETWEEN: self._read_between,
        }
        while self._at in steps and steps[self._at](deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        deltas: list[Delta] = []
        if self._tagged and (self._opening or self._at is _At.TEXT):
            self._add_content(deltas, self._opening + self._text)
        if self._space and not self.calls:
            deltas.append(Delta(content="".join(self._space)))
        self._at = _At.END
        return deltas

    # Each step takes what it can off the pending text, and says whether another step may go on.

    def _read_text(self, deltas: list[Delta]) -> bool:
        content, opening, rest = self._text.partition(TOOL_CALL)
        if not opening:
            held = _overlap(self._text, TOOL_CALL)
            content, rest = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        self._text = rest
        self._add_content(deltas, content)
        if opening:
            self._opening = opening
            self._at = _At.OPENING
        return bool(opening)

    def _read_opening(self, deltas: list[Delta]) -> bool:
        before = _BEFORE_CALL.match(self._text)
        assert before is not None, "it matches nothing, too"
        self._opening += before[0]
        self._text = self._text[before.end() :]
        if not self._text:
            return False
        if self._text[0] == "{":
            self._begin_object()
        else:
            self._reject(deltas, 0)
        return True

    def _read_object(self, deltas: list[Delta]) -> bool:
        header = _HEADER.match(self._text, 0, _MAX_HEADER)
        if header is not None:
            name = _name(header[1])
            if name is None:
                self._reject(deltas, header.end())
                return True
            self._begin_call(deltas, name)
            self._text = self._text[header.end() :]
            self._scanner = _Scanner(depth=1)
            self._at = _At.ARGUMENTS
            return True
        end = self._scanner.end(self._text[:_MAX_OBJECT], outside=0)
        if end is None and len(self._text) < _MAX_OBJECT:
            return False
        # Behind its last brace, or before what no JSON object has in it, or where it has become too long.
        end = _MAX_OBJECT if end is None else end
        call = _call(self._text[:end])
        if call is None:
            self._reject(deltas, end)
            return True
        self._text = self._text[end:]
        self._begin_call(deltas, call[0])
        self._add_arguments(deltas, call[1])
        self._at = _At.BETWEEN if self._parallel else _At.END
        return True

    def _read_arguments(self, deltas: list[Delta]) -> bool:
        end = self._scanner.end(self._text, outside=1)
        arguments = self._text[:end]
        if arguments:
            self._add_arguments(deltas, arguments)
        self._text = self._text[len(arguments) :]
        self._scanner.place = 0
        if end is not None:
            self._at = _At.REST if self._parallel else _At.END
        return end is not None

    def _read_rest(self, _: list[Delta]) -> bool:
        end = self._scanner.end(self._text, outside=0)
        self._text = "" if end is None else self._text[end:]
        self._scanner.place = 0
        if end is not None:
            self._at = _At.BETWEEN
        return end is not None

    def _read_between(self, _: list[Delta]) -> bool:
        before, opening, _rest = self._text.partition("{")
        _before, close, after = before.partition(_CLOSE)
        if close and self._tagged:
            self._text = after + opening + _rest
            self._at = _At.TEXT
            return True
        if opening:
            self._text = opening + _rest
            self._begin_object()
            return True
        self._text = self._text[len(self._text) - _overlap(self._text, _CLOSE) :]
        return False

    def _begin_object(self) -> None:
        self._scanner = _Scanner()
        self._at = _At.OBJECT

    def _reject(self, deltas: list[Delta], end: int) -> None:
        """What comes before `end` is no call: content, unless it is beside one."""
        rejected, self._text = self._text[:end], self._text[end:]
        if self._opening:
            self._add_content(deltas, self._opening + rejected)
            self._opening = ""
            self._at = _At.TEXT
        else:
            self._at = _At.BETWEEN

    def _add_content(self, deltas: list[Delta], text: str) -> None:
        if not text:
            return
        if self._space is not None:
            self._space.append(text)
            if text.isspace():
                return
            text, self._space = "".join(self._space), None
        deltas.append(Delta(content=text))

    def _begin_call(self, deltas: list[Delta], name: str) -> None:
        call_id = f"call_{uuid.uuid4().hex}"
        deltas.append(Delta(tool_calls=[CallDelta(self.calls, FunctionDelta(name=name), call_id, "function")]))
        self.calls += 1
        self._opening = ""
        self._space = []

    def _add_arguments(self, deltas: list[Delta], arguments: str) -> None:
        deltas.append(Delta(tool_calls=[CallDelta(self.calls - 1, FunctionDelta(arguments))]))


class _Scanner:
    """Finds the end of JSON objects and lists in a text that grows."""

    def __init__(self, depth: int = 0) -> None:
        self.place = 0
        """Characters of the text that it has seen."""
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def end(self, text: str, outside: int) -> int | None:
        """Where the depth falls to `outside`, or a `<` comes, which JSON has in strings alone. None: not in `text`."""
        while self.place < len(text):
            if self._escaped:
                self._escaped = False
                self.place += 1
                continue
            special = (_SPECIAL_IN_STRING if self._in_string else _SPECIAL).search(text, self.place)
            if special is None:
                self.place = len(text)
                break
            if special[0] == "<":
                self.place = special.start()
                return self.place
            self.place = special.end()
            if special[0] == "\\":
                self._escaped = True
            elif special[0] == '"':
                self._in_string = not self._in_string
            elif special[0] in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= outside:
                    return self.place
        return None


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    parameters: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def _name(text: str) -> str | None:
    """The string that is written as `text`; None where that is no JSON."""
    try:
        return msgspec.json.decode(text, type=str)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None


def _call(text: str) -> tuple[str, str] | None:
    """Name and arguments (JSON) of a call, as its model wrote them; none at all, null and nothing are `{}`."""
    try:
        call = msgspec.json.decode(text, type=_Call)
        arguments = (bytes(call.arguments) or bytes(call.parameters)).decode()
        if arguments.startswith('"'):
            arguments = msgspec.json.decode(arguments, type=str)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return call.name, "{}" if arguments.strip() in ("", "null") else arguments
