"""Guesses at the next tokens without a model: what followed the last time that the last few tokens stood together.

Prompt lookup (A. Saxena, 2023), over the last tokens of prompt and answer: memory stays bounded, whatever their length.
"""

from __future__ import annotations

from collections.abc import Callable

_NGRAM = 3
"""Tokens that must stand together again."""
_REMEMBERED = 1 << 14
"""N-grams."""


class Drafter:
    """Of one sequence. Guesses less where its guesses were wrong, and more where they were right."""

    def __init__(self, most: int) -> None:
        """most: tokens of a draft."""
        self._most = self._length = most
        self._places: dict[tuple[int, ...], int] = {}
        """N-gram -> place of what followed it, the oldest first."""
        self._seen = 0
        self._match: int | None = None

    def draft(self, tokens: Callable[[int, int], list[int]], length: int, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow the `length` that there are; tokens: those between two places."""
        begin = max(0, self._seen + 1 - _NGRAM, length - _REMEMBERED)
        latest = tokens(begin, length)
        for i in range(len(latest) - _NGRAM + 1):
            ngram = tuple(latest[i : i + _NGRAM])
            self._match = self._places.pop(ngram, None)
            self._places[ngram] = begin + i + _NGRAM
            if len(self._places) > _REMEMBERED:
                del self._places[next(iter(self._places))]
        self._seen = length
        if self._match is None:
            return []
        size = min(limit, self._length)
        guess = tokens(self._match, min(length, self._match + size))
        # A period may be shorter than the draft, which then goes on from itself.
        while len(guess) < size:
            guess.append(guess[len(guess) - (length - self._match)])
        return guess

    def learn(self, drafted: int, accepted: int) -> None:
        """How a draft turned out."""
        self._length = min(self._most, 2 * self._length) if accepted == drafted else max(1, accepted)
