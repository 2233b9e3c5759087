"""Sequences whose grammars are being compiled: the scheduler does not know them yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from lattice_serve.engine.errors import LatticeError
from lattice_serve.engine.grammar import Compiled, Grammars
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.scarcity import HEADROOM, check_room
from lattice_serve.engine.scheduler import Scheduler
from lattice_serve.engine.sequence import Sequence

WAIT_SECONDS = 0.02
"""A step that has nothing but grammars to wait for takes that long: messages are read between steps."""
_STEP_SECONDS = 0.005
"""Of a step, in which sequences get their first masks while others wait."""


class GrammarQueue:
    def __init__(self, grammars: Grammars, ends: Callable[[SamplingParams], tuple[int, ...]]) -> None:
        """ends: the tokens that end an answer."""
        self._grammars, self._ends = grammars, ends
        self._compiling: dict[str, tuple[Sequence, Future[Compiled]]] = {}

    def add(self, sequence: Sequence) -> None:
        """Raises `Overloaded` as `Grammars.compile` does."""
        assert sequence.params.grammar is not None
        compiled = self._grammars.compile(sequence.params.grammar, sequence.cache_salt)
        self._compiling[sequence.request_id] = sequence, compiled

    def remove(self, request_id: str) -> bool:
        """Forget a sequence; whether it was there."""
        return self._compiling.pop(request_id, None) is not None

    def __len__(self) -> int:
        return len(self._compiling)

    def hand_over(self, scheduler: Scheduler) -> list[tuple[Sequence, Exception]]:
        """Give the scheduler the sequences whose grammars are compiled. Returns those that fail: they stay in here.

        Waits for a moment where there is no other work.
        """
        if self._compiling and not scheduler.active:
            wait([compiled for _, compiled in self._compiling.values()], WAIT_SECONDS, FIRST_COMPLETED)
        failures: list[tuple[Sequence, Exception]] = []
        until = time.monotonic() + _STEP_SECONDS
        for sequence, compiled in [each for each in self._compiling.values() if each[1].done()]:
            grammar, row = sequence.params.grammar, sequence.sample_row
            assert grammar is not None
            try:
                found = compiled.result()
                check_room(HEADROOM // 4 + found.bytes)  # where Rust finds none, it ends the process
                row.matcher = self._grammars.matcher(found, self._ends(row.params), grammar.param)
                scheduler.add(sequence)
            except (LatticeError, MemoryError, RuntimeError) as error:
                failures.append((sequence, error))
            else:
                del self._compiling[sequence.request_id]
            if time.monotonic() > until:
                break
        return failures
