"""Rows of state, one a running sequence, all allocated at the start.

A row is everything that a sequence remembers, in all layers; only its model's family knows what lies where in it. It is
initialised when it is given out and scrubbed when it comes back, so that nothing of one request can reach the next.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import ConfigError
from lattice_serve.kernels.numba.lanes import aligned

MAX_ROWS = 256
"""State rows when only their memory is bounded."""


@dataclass(frozen=True, slots=True)
class ParkedState:
    """A sequence's whole past, outside the pool."""

    row: Tensor
    """[row_size] float32 in host memory."""

    @property
    def nbytes(self) -> int:
        return self.row.nbytes


class StatePool:
    """`memory` is [rows, row_size] float32 on the device."""

    lends = True
    """Whether `read` gives the row itself, not a copy."""

    def __init__(self, initial: Tensor, rows: int, device: str) -> None:
        """initial: [row_size] float32, the state before the first token. Raises `ConfigError` for want of memory."""
        self.rows = rows
        self.row_bytes = initial.nbytes
        """Of one row."""
        try:
            self.memory = _zeros(rows, len(initial), device)
        except (RuntimeError, MemoryError, ValueError) as error:  # NumPy has the last two
            need = rows * self.row_bytes
            raise ConfigError(
                f"no room for {rows} state rows of {self.row_bytes:,} bytes ({need:,} in all): "
                "lower max_rows or state_memory",
                param="max_rows",
            ) from error
        self._initial = initial.to(device)
        self._free = list(range(rows))
        self._unchecked: set[int] = set()
        """Rows freed since the last check."""

    @property
    def used(self) -> int:
        return self.rows - len(self._free)

    @property
    def spare(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def allocate(self) -> int:
        """A row that holds the initial state. The scheduler hands out no more than there are."""
        row = heapq.heappop(self._free)
        self.initialise(row)
        return row

    def free(self, row: int) -> None:
        """Scrub a row and take it back."""
        self.scrub(row)
        self._unchecked.add(row)
        heapq.heappush(self._free, row)

    def copy(self, row: int) -> int:
        """Another row with the state of this one. There must be a spare one."""
        other = heapq.heappop(self._free)
        self.write(other, self.read(row))
        return other

    def park(self, row: int) -> ParkedState:
        """Copy a row to host memory, then free it."""
        parked = ParkedState(self.read(row).to("cpu", copy=True))
        self.free(row)
        return parked

    def restore(self, parked: ParkedState) -> int:
        """A row with a parked state in it."""
        row = heapq.heappop(self._free)
        self.write(row, parked.row)
        return row

    def initialise(self, row: int) -> None:
        self.memory[row].copy_(self._initial)

    def scrub(self, row: int) -> None:
        self.memory[row].zero_()

    def read(self, row: int) -> Tensor:
        """The state in a row that is held, good until it changes."""
        return self.memory[row]

    def write(self, row: int, state: Tensor) -> None:
        """Put a state that was read, from any device, into a row that is held."""
        self.memory[row].copy_(state)

    def check_scrubbed(self, rows: Collection[int]) -> None:
        # NaN is no zero either. Four times as fast as any(), and who generates without a server waits for it.
        assert not any(any(self.memory[row].aminmax()) for row in rows), "a free state row is not scrubbed"

    def check_integrity(self, held: Collection[int]) -> None:
        """Assert that the rows not in `held` are exactly the free ones, and that those freed lately hold nothing."""
        free = set(self._free)
        assert len(free) == len(self._free), "a state row is free twice"
        assert free.isdisjoint(held), "a state row is free and held"
        assert len(free) + len(held) == self.rows, "a state row is neither free nor held"
        self.check_scrubbed(free & self._unchecked)
        self._unchecked.clear()


def _zeros(rows: int, size: int, device: str) -> Tensor:
    """On a cache line, and all touched now, when nobody waits for it: the prefix cache counts on that, too."""
    if device != "cpu":
        return torch.zeros(rows, size, dtype=torch.float32, device=device)
    # NumPy asks for huge pages and torch does not: a step of many sequences would look up a page for every kilobyte.
    memory = aligned(rows * size, np.float32)
    memory.fill(0)
    return torch.from_numpy(memory).view(rows, size)


def row_count(config: EngineConfig, row_bytes: int, multiple: int) -> int:
    """Rows of so many bytes for an engine that cuts prompts at multiples of so many tokens.

    Raises `ConfigError` where not even one fits.
    """
    if config.max_rows is not None:
        return config.max_rows
    # Beside all rows but one, a step has room for such a multiple.
    rows = min(config.state_memory // row_bytes, MAX_ROWS, max(1, config.max_step_tokens + 1 - multiple))
    if rows == 0:
        raise ConfigError(
            f"state_memory is {config.state_memory:,} bytes, but one state row takes {row_bytes:,}: give at least that",
            param="state_memory",
        )
    return rows
