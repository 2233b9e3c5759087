"""``x weight^T`` on the CPU, every output added up in one order: k = 0, 1, 2, ..., whatever the number of rows.

So a row's bits depend on nothing but the row: not on how many rows there are, not on its place among them, not on the
number of threads. Weights are packed (`linear.packing`), and read from start to end: few rows are multiplied at the
speed of memory, many at that of the processor's multipliers. Sums are float32.

What multiplies follows from how the activations lie (`kernels.linear.activations`): float32 by fused multiply-adds
with weights that are widened on the way; bfloat16 by VDPBF16PS, in pairs of k, or by AMX, 32 of k at once; whole
numbers with weights of int8 by AMX or by vectors of bytes (`kernels.linear.int8`). A single row of bfloat16 is not left
to AMX, but to vectors that add up as it does (`kernels.numba.bf16_row`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload, register_jitable

from lattice_serve.kernels.linear.activations import ByteTiles
from lattice_serve.kernels.linear.bf16 import STRIPS, by_tiles_of_halves, stream_steps
from lattice_serve.kernels.linear.int8 import FEW, by_tiles_of_bytes, by_vectors_of_bytes
from lattice_serve.kernels.linear.operands import Destination, Matrix, Output
from lattice_serve.kernels.linear.overlap import SwigluRows, no_work, take_turns
from lattice_serve.kernels.numba.amx import BYTE_TILE_K, TILE, TILE_K
from lattice_serve.kernels.numba.bf16_row import flush_denormals, line, restore_denormals
from lattice_serve.kernels.numba.dots import tile
from lattice_serve.kernels.numba.inner import njit_inner
from lattice_serve.kernels.numba.lanes import LANES, padded
from lattice_serve.kernels.numba.types import Floats, Rows, Strips
from lattice_serve.kernels.numba.vector import address, load, pointer, pointer_to, splat, store

PANEL = STRIPS * LANES
"""Outputs that a thread takes at once: four strips."""
_ROWS = 6
"""Rows of a tile of one vector: 12 sums in the 16 registers of AVX2."""
_SUMS = 4 * TILE * TILE
"""Floats of the sums of a block of tiles, or of the few rows of vectors."""


def scratch_size(K: int) -> int:
    """Returns the floats that `linear` needs of its thread, on a cache line."""
    return _SUMS + STRIPS * _filled_size(K)


@njit(cache=True)
def panel_count(N: int) -> int:
    return -(-N // PANEL)


@njit_inner()
def _emit(sums: Floats, o_sums: int, row: int, column: int, n: int, to: Destination, scaled: bool) -> None:
    """Writes n sums to outputs `column` and on of a row."""
    out, o = to.begin, row * to.stride + column
    for j in range(0, n, LANES):
        value = load(sums, o_sums + j)
        if scaled:
            value = value * load(to.scales, column + j)
        if to.add:
            value = load(out, o + j) + value
        store(out, o + j, value)


@njit_inner()
def _rows(rows: int, x: Rows, x_row: int, w: Strips, K: int, sums: Floats) -> None:
    """Sums of a tile of up to `_ROWS` rows and one strip; x, w: pointers to where they begin."""
    if rows == 6:
        tile(6, 1, x, x_row, w, LANES, 0, K, sums, LANES)
    elif rows == 5:
        tile(5, 1, x, x_row, w, LANES, 0, K, sums, LANES)
    elif rows == 4:
        tile(4, 1, x, x_row, w, LANES, 0, K, sums, LANES)
    elif rows == 3:
        tile(3, 1, x, x_row, w, LANES, 0, K, sums, LANES)
    elif rows == 2:
        tile(2, 1, x, x_row, w, LANES, 0, K, sums, LANES)
    else:
        tile(1, 1, x, x_row, w, LANES, 0, K, sums, LANES)


@njit_inner()
def _by_vectors(
    w: Strips, size: int, strips: int, steps: int, x: Rows, x_row: int, M: int, sums: Floats, column: int,
    to: Destination, scaled: bool,
) -> None:  # fmt: skip
    """A panel of strips that are `size` apart, in so many steps along x_row; column: of its first output."""
    if M == 1 and strips == STRIPS:
        tile(1, 4, x, 0, w, LANES, size, steps, sums, 0)
        _emit(sums, 0, 0, column, PANEL, to, scaled)
        return
    for s in range(strips):
        i = 0
        while i < M:
            # As many tiles as it takes, all but equally tall: a low one would leave the processor waiting.
            rows = -(-(M - i) // -(-(M - i) // _ROWS))
            _rows(rows, pointer(x, i * x_row), x_row, pointer(w, s * size), steps, sums)
            for r in range(rows):
                _emit(sums, r * LANES, i + r, column + s * LANES, LANES, to, scaled)
            i += rows


@njit_inner()
def _strips_of(panel: int, N: int) -> int:
    return min(STRIPS, padded(N) // LANES - panel * STRIPS)


def _panels(
    w: Matrix, x: Rows, M: int, first: int, last: int, scratch: Floats, to: Destination, overlapped: SwigluRows
) -> int:
    """Panels by what multiplies activations such as x, and the overlapped turns that were taken meanwhile; in compiled
    code only.

    What is looked up in arrays is looked up once for all of them: at one row a panel takes but a microsecond.
    """
    raise NotImplementedError


@overload(_panels, strict=False)
def _panels_of(w: Any, x: Any, M: Any, first: Any, last: Any, scratch: Any, to: Any, overlapped: Any) -> Any:
    def by_float32(
        w: Matrix, x: Rows, M: int, first: int, last: int, scratch: Floats, to: Destination, overlapped: SwigluRows
    ) -> int:
        weights, K = w.strips, w.K
        size = strip_size(K, weights)
        for panel in range(first, last):
            at, strips = pointer(weights, panel * STRIPS * size), _strips_of(panel, w.N)
            _by_vectors(at, size, strips, K, x, padded(K), M, scratch, panel * PANEL, to, False)
        return 0

    def by_float32_of_int8(
        w: Matrix, x: Rows, M: int, first: int, last: int, scratch: Floats, to: Destination, overlapped: SwigluRows
    ) -> int:
        K = w.K
        fours, size, steps = pointer_to(w.strips, np.int32), strip_size(K, w.strips) // 4, -(-K // 4) * 4
        for panel in range(first, last):
            at, strips = pointer(fours, panel * STRIPS * size), _strips_of(panel, w.N)
            _by_vectors(at, size, strips, steps, x, padded(K), M, scratch, panel * PANEL, to, True)
        return 0

    def by_pairs(
        w: Matrix, x: Rows, M: int, first: int, last: int, scratch: Floats, to: Destination, overlapped: SwigluRows
    ) -> int:
        weights, K = w.strips, w.K
        size = strip_size(K, weights)
        for panel in range(first, last):
            at, strips = pointer(weights, panel * STRIPS * size), _strips_of(panel, w.N)
            _by_vectors(at, size, strips, (K + 1) // 2, x, padded(K) // 2, M, scratch, panel * PANEL, to, False)
        return 0

    def by_tiles(
        w: Matrix, x: Rows, M: int, first: int, last: int, scratch: Floats, to: Destination, overlapped: SwigluRows
    ) -> int:
        weights, K, stride, add = w.strips, w.K, to.stride, to.add
        size, steps, out = strip_size(K, weights), -(-K // TILE_K), address(to.begin)
        weights_at, filled_at, rows = address(weights), scratch.ctypes.data + 4 * _SUMS, x.ctypes.data
        turn, share = np.int64(0), -(-overlapped.rows // max(1, (last - first) * stream_steps(M, steps)))
        control = flush_denormals()
        for panel in range(first, last):
            o, strips = panel * STRIPS * size, _strips_of(panel, w.N)
            at, bytes_ = weights_at + 4 * o, 4 * size
            if K % TILE_K > 0:
                _fill_tiles(weights, o, strips, K, scratch, _SUMS)
                at, bytes_ = filled_at, 4 * _filled_size(K)
            place = out + 4 * panel * PANEL
            if M != 1:
                turn = by_tiles_of_halves(
                    at, bytes_, strips, steps, rows, M, place, stride, add, overlapped, turn, share
                )  # fmt: skip
            elif strips == STRIPS:
                line(4, rows, at, bytes_, steps, add, place)
            else:
                for s in range(strips):
                    line(1, rows, at + s * bytes_, bytes_, steps, add, place + 4 * s * LANES)
        restore_denormals(control)
        return turn

    def by_byte_tiles(
        w: Matrix, x: Rows, M: int, first: int, last: int, scratch: Floats, to: Destination, overlapped: SwigluRows
    ) -> int:
        size, steps, sums = strip_size(w.K, w.strips), -(-w.K // BYTE_TILE_K), scratch.view(np.int32)
        weights, lines, offsets = address(w.strips), x.lines.ctypes.data, x.offsets.ctypes.data
        for panel in range(first, last):
            at, strips = weights + panel * STRIPS * size, _strips_of(panel, w.N)
            if M <= FEW:
                by_vectors_of_bytes(at, size, strips, steps, lines, offsets, x.scales, M, sums, panel * PANEL, to)
            else:
                by_tiles_of_bytes(at, size, strips, steps, lines, x.scales, M, sums, panel * PANEL, to)
        return 0

    def by_byte_vectors(
        w: Matrix, x: Rows, M: int, first: int, last: int, scratch: Floats, to: Destination, overlapped: SwigluRows
    ) -> int:
        size, steps, sums = strip_size(w.K, w.strips), -(-w.K // BYTE_TILE_K), scratch.view(np.int32)
        weights, lines, offsets = address(w.strips), x.lines.ctypes.data, x.offsets.ctypes.data
        for panel in range(first, last):
            at, strips = weights + panel * STRIPS * size, _strips_of(panel, w.N)
            by_vectors_of_bytes(at, size, strips, steps, lines, offsets, x.scales, M, sums, panel * PANEL, to)
        return 0

    if isinstance(x, types.BaseTuple):
        return by_byte_tiles if x.instance_class is ByteTiles else by_byte_vectors
    if x.dtype == types.float32:
        return by_float32_of_int8 if w.types[0].dtype == types.int8 else by_float32
    return by_pairs if x.dtype == types.uint32 else by_tiles


def strip_size(K: int, strips: Strips) -> int:
    """Returns the elements of one strip; in compiled code only."""
    raise NotImplementedError


@overload(strip_size, strict=False)
def _strip_size_of(K: Any, strips: Any) -> Any:
    if strips.dtype == types.uint32:
        return lambda K, strips: LANES * ((K + 1) // 2)
    if strips.dtype == types.int8:
        return lambda K, strips: LANES * (-(-K // BYTE_TILE_K) * BYTE_TILE_K)
    return lambda K, strips: LANES * K


@register_jitable
def _filled_size(K: int) -> int:
    """Floats of a strip of bfloat16, in pairs and with zeros to the end of the last tile."""
    return -(-K // TILE_K) * TILE * TILE


@njit_inner()
def _fill_tiles(w: Strips, o_w: int, strips: int, K: int, out: Floats, o_out: int) -> None:
    """Strips of bfloat16 to strips that are `_filled_size` apart."""
    size, bits = strip_size(K, w), pointer_to(w, np.float32)
    for s in range(strips):
        o, to = o_w + s * size, o_out + s * _filled_size(K)
        for i in range(0, size, LANES):
            store(out, to + i, load(bits, o + i))
        for i in range(size, _filled_size(K), LANES):
            store(out, to + i, splat(np.float32(0)))


# Both are put in place where they are called, so that products are compiled once, not for each literal argument.
@njit(inline="always")
def linear(w: Matrix, x: Rows, M: int, out: Output, first: int, last: int, scratch: Floats) -> None:
    """Writes panels `first` to `last` of x [M, K] weight^T, or adds them to what is there.

    x: `activations` of M rows of K. out: where the first output of panel `first` goes. Outputs beyond N up to
    `padded(N)` become 0. scratch: `scratch_size` floats on a cache line.
    """
    linear_overlapped(w, x, M, out, first, last, scratch, no_work(out.begin, x))


@njit(inline="always")
def linear_overlapped(
    w: Matrix, x: Rows, M: int, out: Output, first: int, last: int, scratch: Floats, overlapped: SwigluRows
) -> None:
    """`linear`, and other work meanwhile where there is time, else after it."""
    to = Destination(w.scales, pointer(out.begin, -first * PANEL), out.stride, out.add)
    turn = _panels(w, x, M, np.int64(first), last, scratch, to, overlapped)
    take_turns(overlapped, np.int64(turn), overlapped.rows)
