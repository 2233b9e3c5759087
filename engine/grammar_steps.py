"""Takes tokens into the grammars of their sequences, so that a hard grammar holds up no other sequence.

What is not made to be hard takes some 0.02 ms a token, and is done between steps. What takes longer is done in a thread
beside the steps: its sequence takes part in none until its mask is there, the others go on. What was easy and becomes
hard does so between steps; such surprises have a budget, beyond which everything is done beside the steps.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from lattice_serve.engine.fair_executor import FairExecutor
from lattice_serve.engine.grammar_queue import WAIT_SECONDS
from lattice_serve.engine.sampler import Sampled
from lattice_serve.engine.sequence import Sequence
from lattice_serve.engine.shares import Shares

EASY_SECONDS = 0.0002
"""Processor time a token up to which it is taken in between steps."""
SURPRISE_SHARE = 0.05
"""Of the engine's time, for what takes longer all the same."""
_MOST_SAVED = 0.005
"""Seconds of that which are saved up while there are no surprises."""
_GATHER_SECONDS = 0.005
"""Between times at which sequences come back into the steps of others: a step of other sequences has to be planned."""
BUSY = 0.2
"""Of a processor, for what is done beside the steps."""


@dataclass(slots=True, eq=False)
class Pending:
    """A token that is taken in beside the steps."""

    sequence: Sequence
    sampled: Sampled
    done: Future[None]


class GrammarSteps:
    """Belongs to one engine's thread."""

    def __init__(self, shares: Shares) -> None:
        self._beside: FairExecutor[None] = FairExecutor("masks", shares, BUSY)
        self._pending: dict[str, Pending] = {}
        self._done: queue.SimpleQueue[Pending] = queue.SimpleQueue()
        self._next = 0.0
        """When it is time to look at them again."""
        self._budget, self._refilled = 0.0, time.monotonic()

    def push(self, sequence: Sequence, sampled: Sampled) -> bool:
        """Take a token into the grammar of its sequence, if it has one. False: `finished` gives it back, later.

        Raises `InvalidParameter` where the grammar is too complex to go on.
        """
        matcher = sequence.sample_row.matcher
        if matcher is None:
            return True
        self._refill()
        if matcher.seconds <= EASY_SECONDS and self._budget >= 0:
            try:
                matcher.push(sampled.token_id)
            finally:
                self._budget -= max(0.0, matcher.seconds - EASY_SECONDS)
            return True
        done = self._beside.submit(sequence.tenant, lambda: matcher.push(sampled.token_id))
        pending = self._pending[sequence.request_id] = Pending(sequence, sampled, done)
        done.add_done_callback(lambda _: self._done.put(pending))
        return False

    def finished(self) -> list[Pending]:
        """Tokens that have been taken in beside the steps, or have failed to be, and were not given back yet."""
        if not self._pending or (now := time.monotonic()) < self._next:
            return []
        self._next = now + _GATHER_SECONDS
        finished = []
        with suppress(queue.Empty):
            while True:
                pending = self._done.get_nowait()
                if self._pending.get(pending.sequence.request_id) is pending:  # else it was dropped
                    del self._pending[pending.sequence.request_id]
                    finished.append(pending)
        return finished

    def wait(self) -> None:
        """Wait for one of them for a moment, if there are any."""
        if self._pending:
            with suppress(queue.Empty):
                self._done.put(self._done.get(timeout=WAIT_SECONDS))
            self._next = 0.0

    def drop(self, request_id: str) -> None:
        """A sequence has ended: nothing is to be done for it, or given back."""
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            pending.done.cancel()

    def _refill(self) -> None:
        now = time.monotonic()
        self._budget = min(_MOST_SAVED, self._budget + SURPRISE_SHARE * (now - self._refilled))
        self._refilled = now
