"""What prefill's kernels go by: the chunks that prompts are cut into, and for each a tile of scratch a head, where they
leave things for each other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.segments import Segments
from lattice_serve.kernels.mixer.triton_parts import geometry, tile_width

_ROWS = 16
"""A tensor core has no smaller product; tokens of a tile where C = 1."""


def tile_tokens(C: int) -> int:
    """Tokens of a tile: a chunk, but where that is one token, several."""
    return C if C > 1 else _ROWS


@dataclass(frozen=True, slots=True)
class DeviceSegments:
    """`Segments` and their chunks, as int64 tensors on a device."""

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
        rows, positions, starts, ends = segments.rows, segments.positions, segments.starts[:-1], segments.starts[1:]
        n, tokens, begins = len(rows), tile_tokens(C), starts - positions % C
        counts = -(-(ends - begins) // tokens)
        firsts = np.cumsum(counts) - counts
        of = np.repeat(np.arange(n), counts)
        begins = begins[of] + (np.arange(len(of)) - firsts[of]) * tokens
        chunks = np.stack((rows[of], positions[of], starts[of], ends[of], begins), 1).ravel()
        joined = torch.from_numpy(np.concatenate((rows, positions, segments.starts, firsts, chunks)))
        if torch.device(device).type == "cuda":
            joined = joined.pin_memory()
        return cls(*joined.to(device, non_blocking=True).split((n, n, n + 1, n, len(chunks))))


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
