"""What prefill's kernels go by: the chunks that prompts are cut into, and for each a tile of scratch a head and some
steps, where they leave things for each other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.triton.common import geometry, tile_width
from lattice_serve.kernels.mixers.segments import IntArray, Segments
from lattice_serve.kernels.triton.upload import upload

_ROWS = 16
"""A tensor core has no smaller product; tokens of a tile where C = 1."""


def tile_tokens(C: int) -> int:
    """Tokens of a tile: a chunk, but where that is one token, several."""
    return C if C > 1 else _ROWS


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


@cache
def tile_rows(C: int) -> int:
    """Rows b_t of a tile: a tensor core has no smaller product than one of 16."""
    return max(_ROWS, triton.next_power_of_2(C))


@cache
def tile_lines(layout: StateLayout) -> tuple[tuple[int, ...], int]:
    """Where a tile of one head has its parts, in elements, and its size: q | -k | c [b_t, b_m] | v [b_t, b_d] |
    A^T, the memory that the chunk begins with [b_m, b_d]."""
    s = layout.shape
    b_d, b_m, b_t = tile_width(s.d), tile_width(s.m), tile_rows(s.C)
    sizes = (b_t * b_m, b_t * b_m, b_t * b_m, b_t * b_d, b_m * b_d)
    *places, size = itertools.accumulate(sizes, initial=0)
    return tuple(places), size


def tile_options(layout: StateLayout, names: str, **more: Any) -> dict[str, Any]:
    constants = geometry(layout)
    places, size = tile_lines(layout)
    tile = {"b_t": tile_rows(layout.shape.C), "tile_places": places, "tile_size": size}
    return {name: constants[name] for name in names.split()} | tile | more


@triton.jit
def steps_of(p_steps: tl.tensor, i: tl.tensor, b_t: tl.constexpr) -> tl.tensor:
    """Of tile i of a head: gamma [b_t], a [b_t] and a word, which is not 0 when a span that begins here may be read."""
    return p_steps + i * (2 * b_t + 1)


@triton.jit
def say(p_steps: tl.tensor, b_t: tl.constexpr) -> None:
    """Whoever has waited for the word here sees all that this program has written."""
    tl.debug_barrier()
    tl.atomic_xchg((p_steps + 2 * b_t).to(tl.pointer_type(tl.int32)), 1, sem="release")


@triton.jit
def wait_for(p_steps: tl.tensor, b_t: tl.constexpr) -> None:
    while tl.atomic_or((p_steps + 2 * b_t).to(tl.pointer_type(tl.int32)), 0, sem="acquire") == 0:
        pass


@triton.jit
def chunk_of(p_chunks: tl.tensor, i: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Row, position, start and end of chunk i's segment, and the token that its tile begins with."""
    p_chunks += 5 * i
    return (
        tl.load(p_chunks), tl.load(p_chunks + 1), tl.load(p_chunks + 2), tl.load(p_chunks + 3), tl.load(p_chunks + 4),
    )  # fmt: skip
