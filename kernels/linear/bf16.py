"""Panels of a packed bfloat16 weight by tiles of the matrix unit.

For few rows weights are read once, from memory; for many they are kept in a cache, part by part. An output is added up
in the same order by either (`kernels.numba.amx`).
"""

from __future__ import annotations

from numba.extending import register_jitable

from lattice_serve.kernels.linear.overlap import SwigluRows, take_turns
from lattice_serve.kernels.numba.amx import (
    TILE,
    TILE_BYTES,
    ask,
    begin,
    block,
    block_shape,
    configure,
    end,
    multiply,
    release,
)
from lattice_serve.kernels.numba.inner import njit_inner
from lattice_serve.kernels.numba.lanes import LANES

STRIPS = 4
"""Of a whole panel."""
MANY = 8 * TILE
"""Rows from which on weights are used often enough to be kept in the first-level cache, part by part. For fewer they
come from memory, strip by strip."""
_DEPTH = 12
"""Tiles of a strip in such a part: two strips are half of the cache."""


@register_jitable
def stream_steps(M: int, steps: int) -> int:
    """Of a whole panel, those between which there is time for other work."""
    return M // (2 * TILE) * (STRIPS // 2) * steps if M >= MANY else 0


@register_jitable
def part_depth(steps: int) -> int:
    """Tiles of a part, all but equally many in each."""
    return -(-steps // -(-steps // _DEPTH))


@register_jitable
def next_part(w: int, size: int, steps: int, s: int, k: int) -> int:
    """Address of the part behind that of strips s and s + 1 from tile k on; behind the last strip lies a panel."""
    k += part_depth(steps)
    return w + s * size + k * TILE_BYTES if k < steps else w + (s + 2) * size


@njit_inner()
def by_tiles_of_halves(
    w: int, size: int, strips: int, steps: int, x: int, M: int, out: int, out_row: int, add: bool,
    overlapped: SwigluRows, turn: int, share: int,
) -> int:  # fmt: skip
    """A panel of strips that are `size` bytes apart, worked out where it goes to; w, x and out are addresses.

    A step does `share` turns of the overlapped work, if it has time for any; returns the next one.
    """
    x_next, next_row, i = steps * TILE_BYTES, 4 * out_row, 0
    if M >= MANY and strips == STRIPS:
        turn = _by_streams(w, size, steps, x, M, out, out_row, add, overlapped, turn, share)
        i = M // (2 * TILE) * 2 * TILE
    while i < M:
        rows, height, width = block_shape(M - i, strips)
        if i == 0 or rows < TILE:
            configure(min(rows, TILE))
        at = x + i // TILE * x_next
        for s in range(0, strips, width):
            place = out + 4 * (i * out_row + s * LANES)
            if height == 2:
                block(2, 2, 0, at, x_next, w + s * size, size, steps, add, place, next_row)
            elif width == STRIPS:
                block(1, 4, 0, at, x_next, w + s * size, size, steps, add, place, next_row)
            else:
                block(1, 1, 0, at, x_next, w + s * size, size, steps, add, place, next_row)
        i += rows
    release()
    return turn


@njit_inner()
def _by_streams(
    w: int, size: int, steps: int, x: int, M: int, out: int, out_row: int, add: bool, overlapped: SwigluRows, turn: int,
    share: int,
) -> int:  # fmt: skip
    """The same of a whole panel and of many rows, two tiles of them at a time, as long as there are two.

    A part of two strips stays in the first-level cache while all rows pass by. Meanwhile the next part is asked for,
    which comes from memory, and vectors do the overlapped work.
    """
    configure(TILE)
    x_next, next_row, blocks = steps * TILE_BYTES, 4 * out_row, M // (2 * TILE)
    depth, lines = part_depth(steps), -(-TILE // blocks)
    for s in range(0, STRIPS, 2):
        for k in range(0, steps, depth):
            count, o_w = min(depth, steps - k), w + s * size + k * TILE_BYTES
            wanted = next_part(w, size, steps, s, k)
            for i in range(blocks):
                place, at = out + 4 * (i * 2 * TILE * out_row + s * LANES), x + 2 * i * x_next + k * TILE_BYTES
                begin(add or k > 0, place, next_row)
                for step in range(count):
                    multiply(0, at + step * TILE_BYTES, x_next, o_w + step * TILE_BYTES, size)
                    for _ in range(lines):
                        ask(wanted)
                        ask(wanted + size)
                        wanted += 4 * LANES
                    if share > 0:
                        turn = take_turns(overlapped, turn, share)
                end(place, next_row)
    return turn
