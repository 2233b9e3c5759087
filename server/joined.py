"""Whole answers while they grow: held as the JSON that will be sent, a tenth of what the objects would take."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.server import memory

_encode = msgspec.json.Encoder().encode


class JsonText:
    """A JSON string, of texts that come one after another."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, text: str) -> int:
        """Bytes that it takes."""
        data = _encode(text)
        self._data += data[1:-1]
        return len(data)

    def __bool__(self) -> bool:
        return bool(self._data)

    @property
    def json(self) -> msgspec.Raw:
        return msgspec.Raw(b'"' + self._data + b'"')


class JsonList:
    """A JSON list, of items that come in several lists."""

    def __init__(self) -> None:
        self._data = bytearray(b"[")

    def add(self, items: Sequence[object]) -> int:
        """Bytes that they take."""
        if not items:
            return 0
        data = _encode(items)
        if len(self._data) > 1:
            self._data += b","
        self._data += data[1:-1]
        return len(data)

    def __bool__(self) -> bool:
        return len(self._data) > 1

    @property
    def json(self) -> msgspec.Raw:
        return msgspec.Raw(self._data + b"]")


class AnswerSize:
    """Counts the bytes of an answer that is held until it is whole."""

    def __init__(self, param: str, remedy: str = "ask for less in one request, or for a stream") -> None:
        """param: the field that makes it large."""
        self._memory, self._param, self._remedy = memory.current(), param, remedy
        self._size = 0

    def check(self, size: int) -> None:
        """Raises `InvalidParameter` where an answer would have `size` bytes at least, and may not."""
        if size > self._memory.longest_answer:
            raise InvalidParameter(
                f"{self._param}: the answer has more than {self._memory.longest_answer} bytes: {self._remedy}",
                param=self._param,
            )

    def add(self, size: int) -> None:
        """Raises `InvalidParameter` as `check` does, and `Overloaded` where others hold too much."""
        self._size += size
        self.check(self._size)
        self._memory.hold(size)
