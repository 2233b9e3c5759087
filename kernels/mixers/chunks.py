"""Segments on a device, and the chunks of tokens that their prompts are cut into for prefill."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lattice_serve.kernels.mixers.segments import IntArray, Segments
from lattice_serve.kernels.triton.upload import upload

LEAST_ROWS = 16
"""A tensor core has no smaller product; tokens of a tile where C = 1."""


def tile_tokens(C: int) -> int:
    """Tokens of a tile: a chunk, but where that is one token, several."""
    return C if C > 1 else LEAST_ROWS


@dataclass(frozen=True, slots=True)
class DeviceSegments:
    """`Segments` and their chunks, as int64 tensors on a device. A row of -1 is none: a segment, or a chunk, of no
    tokens, which all kernels leave out."""

    rows: Tensor
    positions: Tensor
    starts: Tensor
    firsts: Tensor
    """[n] the first chunk of each segment."""
    chunks: Tensor
    """[5 x chunks] row, position, start and end of a chunk's segment, and the token of the batch that its tile begins
    with, before its segment's where that goes on with a chunk."""

    @classmethod
    def of(cls, segments: Segments, C: int, device: torch.device | str) -> DeviceSegments:
        """By one copy, which does not wait for the device. C: tokens of a chunk."""
        n, chunks = len(segments.rows), int(_counts(segments, C).sum())
        return cls.within(upload(torch.from_numpy(list_segments(segments, C, n, chunks)), torch.device(device)), n)

    @classmethod
    def within(cls, joined: Tensor, n: int) -> DeviceSegments:
        """Parts of what `list_segments` made for n segments."""
        return cls(*joined.split((n, n, n + 1, n, len(joined) - 4 * n - 1)))


def list_segments(segments: Segments, C: int, n: int, chunks: int) -> IntArray:
    """[4 n + 1 + 5 chunks] what `DeviceSegments` has, one after another, filled up to n segments and so many chunks."""
    counts, rows, positions, starts = _counts(segments, C), segments.rows, segments.positions, segments.starts
    of, firsts = np.repeat(np.arange(len(rows)), counts), np.cumsum(counts) - counts
    begins = (starts[:-1] - positions % C)[of] + (np.arange(len(of)) - firsts[of]) * tile_tokens(C)
    listed = np.stack((rows[of], positions[of], starts[:-1][of], starts[1:][of], begins), 1)
    no_segments, no_chunks = np.full(n - len(rows), -1), np.full((chunks - len(of)) * 5, -1)
    ends = np.full(n - len(rows), starts[-1])
    parts = (rows, no_segments, positions, no_segments, starts, ends, firsts, no_segments, listed.ravel(), no_chunks)
    return np.concatenate(parts)


def _counts(segments: Segments, C: int) -> IntArray:
    """[n] the chunks that each segment touches: fewer than two more than its tokens would fill."""
    starts = segments.starts
    counts: IntArray = -(-(starts[1:] - starts[:-1] + segments.positions % C) // tile_tokens(C))
    return counts
