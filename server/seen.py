"""Which of several engines has read what: a prompt that goes on from another finds its state where that ran."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count, takewhile
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

    def find(self, keys: Sequence[int]) -> E | None:
        """The engine of the longest beginning that is known; keys: `beginnings`."""
        found = None
        for key in keys:
            if key not in self._engines:
                break
            found = self._engines[key]
        return found

    def note(self, keys: Sequence[int], engine: E) -> None:
        """A prompt with these beginnings goes to an engine."""
        for key in keys:
            self._engines[key] = engine
            self._engines.move_to_end(key)
        while len(self._engines) > _MOST:
            self._engines.popitem(last=False)


def beginnings(salt: str, ids: array[int]) -> list[int]:
    """A number for each beginning of a prompt that is remembered, the shortest first; ids: int32 [tokens].

    Two that are alike by chance cost no more than a wrong guess.
    """
    longest = min(len(ids), _LONGEST)
    lengths = takewhile(lambda length: length <= longest, (_SHORTEST << i for i in count()))
    return [hash((salt, ids[:length].tobytes())) for length in lengths]
