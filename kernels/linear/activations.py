"""How the rows that a weight is multiplied with lie in memory: as the unit that multiplies wants to read them.

The type of the array says which that is, so that kernels are compiled for it:

    float32 [rows, padded(K)]                    fused multiply-adds
    uint32 [rows, padded(K) / 2]                 VDPBF16PS: the bits of two bfloat16, even k in the lower half
    uint16 [ceil(rows / 16), ceil(K / 32), 16, 32]     AMX: tiles, the bits of bfloat16

Where there is no k any more there are zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from lattice_serve.kernels.cpu.amx import TILE, TILE_K
from lattice_serve.kernels.cpu.vector import load, store, store_bf16
from lattice_serve.kernels.cpu_features import Products, available_products
from lattice_serve.kernels.lanes import LANES, aligned, padded

_TYPES = {"float32": (np.float32, 1), "avx512_bf16": (np.uint32, 2), "amx": (np.uint16, 1)}


def activations(products: Products, rows: int, K: int) -> Any:
    """Room for so many rows of K, flat, zeros. Raises ValueError for what this processor does not have."""
    if products not in available_products():
        raise ValueError(f"products: this processor has {', '.join(available_products())}, not {products}")
    dtype, halves = _TYPES[products]
    if products == "amx":
        return aligned(-(-rows // TILE) * TILE * -(-K // TILE_K) * TILE_K, dtype)
    return aligned(rows * padded(K) // halves, dtype)


def put(x: Any, row: int, K: int, k: int, value: Any) -> None:
    """Write a vector to k to k + 16, k a multiple of 16, of a row of activations of K; in compiled code only."""
    raise NotImplementedError


@overload(put, strict=False)
def _put(x: Any, row: Any, K: Any, k: Any, value: Any) -> Any:
    if x.dtype == types.float32:
        return lambda x, row, K, k, value: store(x, row * padded(K) + k, value)
    if x.dtype == types.uint32:
        return lambda x, row, K, k, value: store_bf16(x, (row * padded(K) + k) // 2, value)

    def tiled(x: Any, row: int, K: int, k: int, value: Any) -> None:
        tile = row // TILE * -(-K // TILE_K) + k // TILE_K
        store_bf16(x, (tile * TILE + row % TILE) * TILE_K + k % TILE_K, value)

    return tiled


def rows_from(x: Any, row: int, K: int) -> Any:
    """Activations of K from a row on, a multiple of 16; in compiled code only."""
    raise NotImplementedError


@overload(rows_from, strict=False)
def _rows_from(x: Any, row: Any, K: Any) -> Any:
    if x.dtype == types.float32:
        return lambda x, row, K: x[row * padded(K) :]
    if x.dtype == types.uint32:
        return lambda x, row, K: x[row * padded(K) // 2 :]
    return lambda x, row, K: x[row * -(-K // TILE_K) * TILE_K :]


@njit(cache=True)
def fill(rows: Any, M: int, K: int, x: Any) -> None:
    """Write rows, float32 [M padded(K)], to activations."""
    for row in range(M):
        for k in range(0, K, LANES):
            put(x, row, K, k, load(rows, row * padded(K) + k))
