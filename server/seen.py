"""Which of several engines has read what: a prompt that goes on from another finds its state where that ran."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

E = TypeVar("E")
"""Whatever stands for an engine."""

_SHORTEST, _LONGEST = 16, 4096
"""Tokens of the beginnings that are remembered: these, and twice, four times as many between them. A shorter one takes
no time to read again, and prompts that are alike for so long come from one conversation."""
_MOST = 1 << 16


class Seen(Generic[E]):
    """Remembers the engine that was last given a prompt with such a beginning; what is used least is forgotten."""

    def __init__(self) -> None:
        self._engines: OrderedDict[int, E] = OrderedDict()

    def find(self, salt: str, ids: array[int]) -> E | None:
        """The engine of the longest beginning that is known."""
        found = None
        for key in _beginnings(salt, ids):
            if key not in self._engines:
                break
            found = self._engines[key]
        return found

    def note(self, salt: str, ids: array[int], engine: E) -> None:
        for key in _beginnings(salt, ids):
            self._engines[key] = engine
            self._engines.move_to_end(key)
        while len(self._engines) > _MOST:
            self._engines.popitem(last=False)


def _beginnings(salt: str, ids: array[int]) -> Iterator[int]:
    """A number for each of them, the shortest first. Two that are alike by chance cost no more than a wrong guess."""
    length = _SHORTEST
    while length <= min(len(ids), _LONGEST):
        yield hash((salt, ids[:length].tobytes()))
        length *= 2
