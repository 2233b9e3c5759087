"""Which tokens of a ragged batch belong to which state row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


@dataclass(frozen=True, slots=True)
class Segments:
    """n segments, one after another, each of one sequence."""

    rows: IntArray
    """[n] state rows, no two equal."""
    positions: IntArray
    """[n] tokens that each sequence has seen before."""
    starts: IntArray
    """[n + 1] segment i is tokens starts[i] to starts[i + 1] of the batch."""
    decodes: int = 0
    """The first so many segments are of tokens that the model itself has chosen, the others of prompts."""

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int, int]], decodes: int = 0) -> Segments:
        """From (row, position, length) of each segment. Raises ValueError for a row named twice or an empty segment."""
        rows, positions, lengths = zip(*segments, strict=True)
        if len(set(rows)) != len(rows):
            raise ValueError("a state row stands in two segments of a batch")
        if min(lengths) < 1:
            raise ValueError("a segment of a batch holds no token")
        starts = np.array([*accumulate(lengths, initial=0)], dtype=np.int64)
        return cls(np.array(rows, dtype=np.int64), np.array(positions, dtype=np.int64), starts, decodes)

    @property
    def prompts(self) -> Segments:
        """The segments after those of decode."""
        n = self.decodes
        return Segments(self.rows[n:], self.positions[n:], self.starts[n:] - self.starts[n])

    def moved_on(self) -> Segments:
        """The same segments of one token each, after it."""
        return Segments(self.rows, self.positions + 1, self.starts, self.decodes)

    def check(self, pool: Tensor, row_size: int) -> None:
        """Raises ValueError, naming the pool, unless it is float32 [rows, row_size] in one piece and holds the rows."""
        if pool.dtype != torch.float32 or pool.ndim != 2 or pool.shape[1] != row_size or not pool.is_contiguous():
            raise ValueError(f"pool must be contiguous float32 [rows, {row_size}], not {pool.dtype} {[*pool.shape]}")
        if not (self.rows.min() >= 0 and self.rows.max() < len(pool)):
            raise ValueError(f"pool has {len(pool)} rows: rows {self.rows.min()} to {self.rows.max()} are asked for")

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(row, position, start, end) of each segment."""
        starts = self.starts.tolist()
        return zip(self.rows.tolist(), self.positions.tolist(), starts[:-1], starts[1:], strict=True)
