"""What a chat template gets of a request. Runs where templates do: it imports nothing but what it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lattice_serve.engine.marks import unmark

MAX_DEPTH = 100
"""Of objects and lists in each other, in what a chat template gets."""
MAX_ARGUMENTS_DEPTH = MAX_DEPTH // 2
"""Of them in the arguments of a call; deeper ones are given to the template as text."""


class Refused(ValueError):
    """Says what is wrong with a field, and what to do."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class TextArguments(str):
    """Arguments of a call that are no JSON object: text, with all of it under one name where a template wants names."""

    def items(self) -> list[tuple[str, str]]:
        return [("arguments", str(self))]

    def keys(self) -> list[str]:
        return ["arguments"]

    def values(self) -> list[str]:
        return [str(self)]

    def get(self, name: str, default: object = None) -> object:
        return str(self) if name == "arguments" else default


def chat_variables(request: dict[str, Any], names: Sequence[str], *, developers: bool, end: str = "") -> dict[str, Any]:
    """Variables of a template from `messages`, `tools` and `chat_template_kwargs` of a request.

    names: of control pieces, which are text in what a client gives: only the template's own are more. developers:
    whether the template knows their role. end: goes behind the last message. Raises `Refused`.
    """
    messages = [_message(message, developers) for message in request["messages"]]
    messages[-1]["content"] += end
    given = {
        **_unmarked(request.get("chat_template_kwargs") or {}, names, "chat_template_kwargs"),
        "messages": _unmarked(messages, names, "messages"),
        "tools": _unmarked(request.get("tools") or [], names, "tools") or None,
    }
    for message in given["messages"]:
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = TextArguments(call["function"]["arguments"])
    return given


def _message(message: dict[str, Any], developers: bool) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments of calls objects."""
    refusal = message.pop("refusal", None)
    message["content"] = message.get("content") or refusal or ""
    if message["role"] == "developer" and not developers:
        message["role"] = "system"
    for call in message.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return message


def _arguments(text: str) -> dict[str, Any] | str:
    """The object that is written as `text`, or the text itself: a call may have been cut, or be wrong."""
    if text.strip() in ("", "null"):
        return {}
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or _is_deeper(value, MAX_ARGUMENTS_DEPTH):
            return text
        if "\\u" in text:  # which can write half a character, and no text holds that
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether `value` has more than so many levels of objects and lists."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(child, levels - 1) for child in children)


def _unmarked(value: Any, names: Sequence[str], param: str, depth: int = 0) -> Any:
    """`value` with no name of a control piece in its strings. param: the field that it is of."""
    if depth > MAX_DEPTH:
        raise Refused(f"objects and lists are nested more than {MAX_DEPTH} deep: give flatter ones", param)
    if isinstance(value, str):
        return unmark(value, names)
    if isinstance(value, list):
        return [_unmarked(each, names, param, depth + 1) for each in value]
    if isinstance(value, dict):
        return {unmark(key, names): _unmarked(each, names, param, depth + 1) for key, each in value.items()}
    return value
