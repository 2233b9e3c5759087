"""JSON for server-sent events, on one line whatever a client takes for the end of a line."""

from __future__ import annotations

from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode
_ESCAPES = ((b"\xe2\x80\xa8", rb"\u2028"), (b"\xe2\x80\xa9", rb"\u2029"), (b"\xc2\x85", rb"\u0085"))
"""Ends of lines in Unicode, which JSON may hold as they are, and Python's `splitlines` splits at."""


def event_json(value: Any) -> bytes:
    data = _encode(value)
    if data.isascii():  # as most events are, which is known at once
        return data
    for raw, escaped in _ESCAPES:
        data = data.replace(raw, escaped)
    return data
