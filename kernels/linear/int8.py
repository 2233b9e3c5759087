"""Panels of a packed int8 weight by whole numbers: tiles of the matrix unit for many rows, vectors for few.

A row of activations is two lines of bytes (`kernels.linear.activations`), each multiplied with the weight as it is:

    y = (256 high + low) row_scale weight_scale + what was there

high and low are int32 and exact, so it makes no difference what worked them out, and in which order.
"""

from __future__ import annotations

import numpy as np

from lattice_serve.kernels.linear.bf16 import MANY, STRIPS, next_part, part_depth
from lattice_serve.kernels.linear.operands import Destination
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
from lattice_serve.kernels.numba.types import Floats, Int32s
from lattice_serve.kernels.numba.vector import fma, load, splat, store, widened
from lattice_serve.kernels.numba.vnni import dots

LARGEST_K = 65536
"""Of more products of bytes a sum might not fit int32."""
FEW = 1
"""Rows that vectors multiply sooner than tiles: they read ahead while they wait for memory."""


@njit_inner()
def _emit(
    sums: Int32s, o_sums: int, line: int, first: int, row_scales: Floats, rows: int, column: int, to: Destination
) -> None:
    """Writes the outputs of so many rows from `first` on, from sums of lines of so many outputs."""
    for r in range(rows):
        high, low, o = o_sums + 2 * r * line, o_sums + (2 * r + 1) * line, (first + r) * to.stride + column
        scale = splat(row_scales[first + r])
        for j in range(0, line, LANES):
            value = fma(splat(np.float32(256)), widened(sums, high + j), widened(sums, low + j))
            value = value * scale * load(to.scales, column + j)
            if to.add:
                value = load(to.begin, o + j) + value
            store(to.begin, o + j, value)


@njit_inner()
def by_vectors_of_bytes(
    w: int, size: int, strips: int, steps: int, x: int, offsets: int, row_scales: Floats, M: int, sums: Int32s,
    column: int, to: Destination,
) -> None:  # fmt: skip
    """A panel of strips that are `size` bytes apart, in so many tiles each; column: of its first output.

    w, x and offsets are addresses, the last two of fields of the activations. sums: int32 [1024], to be used.
    """
    lines, place = 2 * M, sums.ctypes.data
    i = 0
    while i < lines:
        # Groups of lines that go into a tile; of the last one some may be nobody's, and are left where they are.
        group = 2 if lines - i == 2 else 4 if lines - i == 4 else 8
        width = 1 if strips < STRIPS else STRIPS if group == 2 else 2
        at = x + i // TILE * steps * TILE_BYTES + i % TILE * 4 * LANES
        offset, next_line = offsets + 4 * i, 4 * width * LANES
        for s in range(0, strips, width):
            o_w = w + s * size
            if group == 2 and width == STRIPS:
                dots(2, 4, at, o_w, size, steps, offset, place, next_line)
            elif group == 2:
                dots(2, 1, at, o_w, size, steps, offset, place, next_line)
            elif group == 4 and width == 2:
                dots(4, 2, at, o_w, size, steps, offset, place, next_line)
            elif group == 4:
                dots(4, 1, at, o_w, size, steps, offset, place, next_line)
            elif width == 2:
                dots(8, 2, at, o_w, size, steps, offset, place, next_line)
            else:
                dots(8, 1, at, o_w, size, steps, offset, place, next_line)
            _emit(sums, 0, width * LANES, i // 2, row_scales, min(group, lines - i) // 2, column + s * LANES, to)
        i += group


@njit_inner()
def by_tiles_of_bytes(
    w: int, size: int, strips: int, steps: int, x: int, row_scales: Floats, M: int, sums: Int32s, column: int,
    to: Destination,
) -> None:  # fmt: skip
    """The same by the matrix unit, which has the same sums."""
    lines, place, i = 2 * M, sums.ctypes.data, 0
    if M >= MANY and strips == STRIPS and 2 * LANES * lines <= len(sums):
        i = _by_streams_of_bytes(w, size, steps, x, row_scales, lines, sums, column, to)
    while i < lines:
        group, height, width = block_shape(lines - i, strips)
        if i == 0 or group < TILE:
            configure(min(group, TILE))
        at, next_tile = x + i // TILE * steps * TILE_BYTES, steps * TILE_BYTES
        for s in range(0, strips, width):
            o_w, next_line = w + s * size, 4 * width * LANES
            if height == 2:
                block(2, 2, 1, at, next_tile, o_w, size, steps, False, place, next_line)
            elif width == STRIPS:
                block(1, 4, 1, at, next_tile, o_w, size, steps, False, place, next_line)
            else:
                block(1, 1, 1, at, next_tile, o_w, size, steps, False, place, next_line)
            _emit(sums, 0, width * LANES, i // 2, row_scales, group // 2, column + s * LANES, to)
        i += group
    release()


@njit_inner()
def _by_streams_of_bytes(
    w: int, size: int, steps: int, x: int, row_scales: Floats, lines: int, sums: Int32s, column: int, to: Destination
) -> int:
    """Two tiles of lines at a time, as in `linear.bf16`; how many lines that were."""
    configure(TILE)
    row, blocks, x_next = 2 * LANES, lines // (2 * TILE), steps * TILE_BYTES
    depth, asked = part_depth(steps), -(-TILE // blocks)
    for s in range(0, STRIPS, 2):
        for k in range(0, steps, depth):
            count, o_w = min(depth, steps - k), w + s * size + k * TILE_BYTES
            wanted = next_part(w, size, steps, s, k)
            for i in range(blocks):
                o = i * 2 * TILE * row if depth < steps else 0
                place, at = sums.ctypes.data + 4 * o, x + 2 * i * x_next + k * TILE_BYTES
                begin(k > 0, place, 4 * row)
                for step in range(count):
                    multiply(1, at + step * TILE_BYTES, x_next, o_w + step * TILE_BYTES, size)
                    for _ in range(asked):
                        ask(wanted)
                        ask(wanted + size)
                        wanted += 4 * LANES
                end(place, 4 * row)
                if k + depth >= steps:
                    _emit(sums, o, row, i * TILE, row_scales, TILE, column + s * LANES, to)
    return blocks * 2 * TILE
