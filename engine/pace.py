"""How many tokens a step may have, so that those who wait for their next token do not wait long."""

from __future__ import annotations

_COUNTED = 16
"""Tokens of a step from which on it tells how fast tokens are; below, it is mostly reading weights."""
_ALONE = 4
"""Steps may be that much longer while nobody waits for a next token, only for a first."""


class Pace:
    """Learns from every step. `step_seconds` None: any step may have `most` tokens."""

    def __init__(self, step_seconds: float | None, most: int) -> None:
        self._step_seconds, self._most = step_seconds, most
        self._rate: float | None = None
        """Tokens a second, a running mean."""
        self._keeping = 0.0
        """Seconds that it takes to keep a state, a running mean."""

    def record(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took that long."""
        if tokens >= _COUNTED and seconds > 0:
            rate = tokens / seconds
            self._rate = rate if self._rate is None else 0.8 * self._rate + 0.2 * rate

    def record_kept(self, seconds: float) -> None:
        """A prompt's state was kept after a step, which took that long."""
        self._keeping = 0.8 * self._keeping + 0.2 * seconds

    def tokens(self, decoding: int) -> int:
        """For the next step, with so many sequences in decode: always room for them and for a few of prompts."""
        if self._step_seconds is None or self._rate is None:
            return self._most
        fitting = int(self._rate * self._step_seconds * (1 if decoding else _ALONE))
        return min(self._most, max(fitting, decoding + _COUNTED))

    def kept_tokens(self, decoding: int) -> int:
        """As how many tokens of a step a state counts that is to be kept after it."""
        if self._step_seconds is None or self._rate is None or not decoding:
            return 0
        return round(self._rate * self._keeping)
