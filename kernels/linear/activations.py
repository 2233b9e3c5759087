"""How the rows that a weight is multiplied with lie in memory: as the unit that multiplies wants to read them.

The type says which that is, so that kernels are compiled for it:

    float32 [rows, padded(K)]                    fused multiply-adds
    uint32 [rows, padded(K) / 2]                 VDPBF16PS: the bits of two bfloat16, even k in the lower half
    uint16 [ceil(rows / 16), ceil(K / 32), 16, 32]     AMX: tiles, the bits of bfloat16
    `ByteTiles`, `ByteVectors`                   AMX of int8, AVX512_VNNI: whole numbers of two bytes, a scale a row

Where there is no k any more there are zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from lattice_serve.kernels.numba.amx import BYTE_TILE_K, TILE, TILE_K
from lattice_serve.kernels.numba.features import Products
from lattice_serve.kernels.numba.inner import njit_inner
from lattice_serve.kernels.numba.lanes import LANES, aligned, padded
from lattice_serve.kernels.numba.types import Bytes, Floats, Int32s, Rows, Vector
from lattice_serve.kernels.numba.vector import (
    floor,
    fma,
    larger,
    largest,
    load,
    maximum,
    minimum,
    nearest,
    splat,
    store,
    store_bf16,
    store_int8,
    total,
)

_STEPS = 32639
"""The largest whole number whose higher byte, 256 times as much, is not beyond 127 when the lower is -128 to 127."""
_NEXT_BYTE, _HALF_BYTE = np.float32(1 / 256), np.float32(128)
_LEAST = np.float32(2**-100)
"""A row none of whose values is larger counts as zeros: its steps would be too small for float32."""


class ByteTiles(NamedTuple):
    """Rows of whole numbers, each the largest |x| / 32639 wide, for the matrix unit and for vectors beside it."""

    rows: Floats
    """float32 [rows, padded(K)]: what is written, before a row is whole and can be rounded."""
    lines: Bytes
    """int8 [ceil(2 rows / 16), ceil(K / 64), 16, 64]: two lines a row, the higher bytes and the lower, signed both."""
    offsets: Int32s
    """int32 [2 rows]: 128 times the sum of each line."""
    scales: Floats
    """float32 [rows]: how wide a whole number is. Not finite where the row is not."""


class ByteVectors(NamedTuple):
    """The same, where vectors are all that multiplies."""

    rows: Floats
    lines: Bytes
    offsets: Int32s
    scales: Floats


def activations(products: Products, rows: int, K: int) -> Rows:
    """Returns room for so many rows of K, all zeros, as `products` reads them."""
    if products == "amx":
        return aligned(-(-rows // TILE) * TILE * -(-K // TILE_K) * TILE_K, np.uint16)
    if products == "avx512_bf16":
        return aligned(rows * padded(K) // 2, np.uint32)
    plain = aligned(rows * padded(K), np.float32)
    if products == "float32":
        return plain
    lines = -(-2 * rows // TILE) * TILE
    kind = ByteTiles if products == "amx_int8" else ByteVectors
    return kind(
        plain, aligned(lines * -(-K // BYTE_TILE_K) * BYTE_TILE_K, np.int8), aligned(lines, np.int32),
        aligned(rows, np.float32),
    )  # fmt: skip


def write(x: Rows, row: int, K: int, k: int, value: Vector) -> None:
    """Writes a vector to k to k + 16, k a multiple of 16, of a row of activations of K; in compiled code only.

    A row of whole numbers must go through `quantize_row` when all of it is written.
    """
    raise NotImplementedError


@overload(write, strict=False)
def _write(x: Any, row: Any, K: Any, k: Any, value: Any) -> Any:
    if isinstance(x, types.BaseTuple):
        return lambda x, row, K, k, value: store(x.rows, row * padded(K) + k, value)
    if x.dtype == types.float32:
        return lambda x, row, K, k, value: store(x, row * padded(K) + k, value)
    if x.dtype == types.uint32:
        return lambda x, row, K, k, value: store_bf16(x, (row * padded(K) + k) // 2, value)

    def tiled(x: Any, row: int, K: int, k: int, value: Any) -> None:
        tile = row // TILE * -(-K // TILE_K) + k // TILE_K
        store_bf16(x, (tile * TILE + row % TILE) * TILE_K + k % TILE_K, value)

    return tiled


def is_quantized(x: Rows) -> bool:
    """Returns whether such activations are whole numbers, good only after `quantize_row`; in compiled code only."""
    raise NotImplementedError


@overload(is_quantized, strict=False)
def _is_quantized(x: Any) -> Any:
    quantized = isinstance(x, types.BaseTuple)
    return lambda x: quantized


def quantize_row(x: Rows, row: int, K: int) -> None:
    """Rounds a row of K that was written, if whole numbers are multiplied; in compiled code only."""
    raise NotImplementedError


@overload(quantize_row, strict=False)
def _quantize_row(x: Any, row: Any, K: Any) -> Any:
    if isinstance(x, types.BaseTuple):
        return lambda x, row, K: _round(x.rows, x.lines, x.offsets, x.scales, row, K)
    return lambda x, row, K: None


@njit_inner()
def _round(rows: Floats, lines: Bytes, offsets: Int32s, scales: Floats, row: int, K: int) -> None:
    """Rounds row `row` of K floats to whole numbers of two bytes, with a scale of its own."""
    begin, end, limit = row * padded(K), padded(K), splat(np.float32(_STEPS))
    most = splat(np.float32(0))
    for k in range(0, end, LANES):
        most = larger(most, load(rows, begin + k))
    peak = largest(most)
    scale = steps = np.float32(0)
    if not peak < _LEAST:  # NaN is not
        scale, steps = peak / np.float32(_STEPS), np.float32(_STEPS) / peak
    scales[row] = scale
    high_sums = low_sums = splat(np.float32(0))
    tile, line = 2 * row // TILE * -(-K // BYTE_TILE_K), 2 * row % TILE
    for k in range(0, end, LANES):
        # Held in bounds for the sake of what is not finite: it may be any number, as the scale is not finite either.
        value = maximum(minimum(nearest(load(rows, begin + k) * splat(steps)), limit), -limit)
        high = floor((value + splat(_HALF_BYTE)) * splat(_NEXT_BYTE))
        low = fma(high, splat(np.float32(-256)), value)
        o = ((tile + k // BYTE_TILE_K) * TILE + line) * BYTE_TILE_K + k % BYTE_TILE_K
        store_int8(lines, o, high)
        store_int8(lines, o + BYTE_TILE_K, low)
        high_sums, low_sums = high_sums + high, low_sums + low
    offsets[2 * row] = 128 * np.int32(total(high_sums))
    offsets[2 * row + 1] = 128 * np.int32(total(low_sums))


def rows_from(x: Rows, row: int, K: int) -> Rows:
    """Returns activations of K from a row on, a multiple of 16; in compiled code only."""
    raise NotImplementedError


@overload(rows_from, strict=False)
def _rows_from(x: Any, row: Any, K: Any) -> Any:
    if isinstance(x, types.BaseTuple):
        kind = ByteTiles if x.instance_class is ByteTiles else ByteVectors

        def of_bytes(x: Any, row: int, K: int) -> Any:
            lines = x.lines[2 * row * -(-K // BYTE_TILE_K) * BYTE_TILE_K :]
            return kind(x.rows[row * padded(K) :], lines, x.offsets[2 * row :], x.scales[row:])

        return of_bytes
    if x.dtype == types.float32:
        return lambda x, row, K: x[row * padded(K) :]
    if x.dtype == types.uint32:
        return lambda x, row, K: x[row * padded(K) // 2 :]
    return lambda x, row, K: x[row * -(-K // TILE_K) * TILE_K :]


@njit(cache=True)
def write_rows(rows: Floats, M: int, K: int, x: Rows) -> None:
    """Writes rows, float32 [M padded(K)], to activations."""
    for row in range(M):
        for k in range(0, K, LANES):
            write(x, row, K, k, load(rows, row * padded(K) + k))
        quantize_row(x, row, K)
