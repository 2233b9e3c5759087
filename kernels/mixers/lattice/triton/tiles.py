"""Where prefill's kernels leave things for each other: for each chunk and head a tile of scratch and some steps."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import triton
import triton.language as tl

from lattice_serve.kernels.mixers.chunks import LEAST_ROWS
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.triton.common import geometry, tile_width


@cache
def tile_rows(C: int) -> int:
    """Rows b_t of a tile: a tensor core has no smaller product than one of 16."""
    return max(LEAST_ROWS, triton.next_power_of_2(C))


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
