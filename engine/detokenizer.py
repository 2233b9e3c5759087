"""Token ids to text as they come: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import lru_cache

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence, piece by piece.

    The pieces joined are the tokens' bytes decoded as one, invalid ones as U+FFFD, cut at the stop string
    that is complete first (of those that end together, the longest). How the text falls into tokens
    makes no difference. State: under four bytes and under the longest stop string of text.
    """

    __slots__ = ("_decoder", "_held", "_include_stop", "_min_tokens", "_searches", "_token_bytes", "_tokens")

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`stop` holds no empty string. Stop strings that are complete before the token of number
        `min_tokens` (counted from 1) do not count.
        """
        self._token_bytes = token_bytes
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._decoder = _Utf8Decoder(errors="replace")
        self._searches = [_Search(string) for string in stop]
        self._held = ""
        self._tokens = 0

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Take the next token: the text that became final, and the stop string that ended it, if one did.

        After a stop string only `flush` may be called.
        """
        self._tokens += 1
        return self._advance(self._decoder.decode(self._token_bytes(token_id)))

    def flush(self) -> tuple[str, str | None]:
        """The text still held back, at the end of the sequence, and the stop string that ends it, if one does. An
        unfinished character becomes U+FFFD."""
        text, stop = self._advance(self._decoder.decode(b"", final=True))
        return (text if stop is not None else text + self._held), stop

    def _advance(self, text: str) -> tuple[str, str | None]:
        if not self._searches:
            return text, None
        matches = [(end, search) for search in self._searches if (end := self._find(search, text))]
        held, self._held = self._held + text, ""
        if matches:
            end, search = min(matches, key=lambda match: (match[0], -len(match[1].string)))
            self._searches.clear()
            self._decoder.reset()
            stop = search.string
            end += len(held) - len(text) - (0 if self._include_stop else len(stop))
            return held[:end], stop
        final = len(held) - max(search.matched for search in self._searches)
        self._held = held[final:]
        return held[:final], None

    def _find(self, search: _Search, text: str) -> int:
        """Characters of `text` up to the end of the first match that counts; 0 without one."""
        start = 0
        while end := search.feed(text, start):
            if self._tokens >= self._min_tokens:
                return end
            start = end
        return 0


class _Search:
    """Knuth, Morris and Pratt's search for one string in a text that comes in pieces."""

    __slots__ = ("_fallback", "matched", "string")

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        """Length of the longest beginning of the string that the text so far ends with."""
        self._fallback = _fallback(string)

    def feed(self, text: str, start: int) -> int:
        """Read `text` from `start`, up to the end of the next match: that end, or 0 without one."""
        end = start
        while end < len(text):
            if not self.matched:
                end = text.find(self.string[0], end)
                if end < 0:
                    return 0
            self.matched = self._step(self.matched, text[end])
            end += 1
            if self.matched == len(self.string):
                self.matched = self._fallback[self.matched]
                return end
        return 0

    def _step(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self._fallback[matched]
        return matched + (self.string[matched] == character)


# The sequences of one request have the same stop strings.
@lru_cache(maxsize=1024)
def _fallback(string: str) -> tuple[int, ...]:
    """For each n up to len(string): the length of the longest proper beginning of string[:n] that it also ends with."""
    lengths = [0, 0]
    matched = 0
    for character in string[1:]:
        while matched and string[matched] != character:
            matched = lengths[matched]
        matched += string[matched] == character
        lengths.append(matched)
    return tuple(lengths)
