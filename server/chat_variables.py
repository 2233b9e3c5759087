"""What a chat template gets of a request. Runs where templates do: it imports nothing but what it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lattice_serve.engine.marks import unmark

MAX_DEPTH = 100
"""Of objects and lists in each other, in what a chat template gets."""


class Refused(ValueError):
    """Says what is wrong with the messages, and what to do."""


def chat_variables(request: dict[str, Any], names: Sequence[str], *, developers: bool, end: str = "") -> dict[str, Any]:
    """Variables of a template from `messages`, `tools` and `chat_template_kwargs` of a request.

    names: of control pieces, which are text in what a client gives; developers: whether the template knows their role;
    end: goes behind the last message. Raises `Refused`.
    """
    messages = [_message(message, developers) for message in request["messages"]]
    messages[-1]["content"] += end
    given = {**(request.get("chat_template_kwargs") or {}), "messages": messages, "tools": request.get("tools") or None}
    unmarked: dict[str, Any] = _unmarked(given, names)
    return unmarked


def _message(message: dict[str, Any], developers: bool) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments of calls parsed."""
    message["content"] = message.get("content") or ""
    if message["role"] == "developer" and not developers:
        message["role"] = "system"
    for call in message.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError) as error:
            raise Refused(f"arguments of a tool call are no JSON: {error}") from error
    return message


def _unmarked(value: Any, names: Sequence[str], depth: int = 0) -> Any:
    """`value` with no name of a control piece in its strings."""
    if depth > MAX_DEPTH:
        raise Refused(f"objects and lists are nested more than {MAX_DEPTH} deep: give flatter ones")
    if isinstance(value, str):
        return unmark(value, names)
    if isinstance(value, list):
        return [_unmarked(each, names, depth + 1) for each in value]
    if isinstance(value, dict):
        return {unmark(key, names): _unmarked(each, names, depth + 1) for key, each in value.items()}
    return value
