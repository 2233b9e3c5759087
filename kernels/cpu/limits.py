"""What this machine allows at the moment, bytes and floating-point operations a second: what benchmarks are held to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from numba import njit

from lattice_serve.kernels.cpu.amx import TILE, TILE_BYTES, TILE_K, block, configure, release
from lattice_serve.kernels.cpu.products import tile
from lattice_serve.kernels.cpu.vector import load, splat, store
from lattice_serve.kernels.cpu_features import Products
from lattice_serve.kernels.lanes import LANES, aligned

_BUFFER_BYTES = 256 << 20
"""Far more than any cache holds."""
_K = 256
"""Depth of the tile that is run over and over: its operands stay in the first cache."""
_TILES = 40000
"""Some 10 ms: the start of a thread must not count."""
_PASSES = 5


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory together: the best of a few passes."""
    buffer = aligned(_BUFFER_BYTES // 4, np.float32)
    buffer.fill(1)  # zeros that nobody has written are one page
    share = len(buffer) // threads // (8 * LANES) * 8 * LANES
    outs = [np.empty(LANES, dtype=np.float32) for _ in range(threads)]
    seconds = _best(threads, lambda thread: _read(buffer, thread * share, share, outs[thread]))
    return 4 * share * threads / seconds


def flops(threads: int, products: Products) -> float:
    """Operations a second (a multiply-add is two) of the tiles that such products are made of."""
    if products == "amx":
        xs = [_halves(2 * TILE * _K, np.uint16) for _ in range(threads)]
        ws = [_halves(2 * LANES * _K, np.uint32) for _ in range(threads)]
        outs = [aligned(4 * TILE * LANES, np.float32) for _ in range(threads)]
        seconds = _best(threads, lambda thread: _blocks(xs[thread], ws[thread], outs[thread]))
        return 2.0 * 2 * TILE * 2 * LANES * _K * _TILES * threads / seconds
    dtype, halves = (np.uint32, 2) if products == "avx512_bf16" else (np.float32, 1)
    xs, ws = ([_halves(2 * size * _K // halves, dtype) for _ in range(threads)] for size in (6, 2 * LANES))
    outs = [aligned(2 * 6 * LANES, np.float32) for _ in range(threads)]

    def rate(vectors: int, tiles: Any) -> float:
        seconds = _best(threads, lambda thread: tiles(xs[thread], ws[thread], _K // halves, outs[thread]))
        return 2.0 * 6 * vectors * LANES * _K * _TILES * threads / seconds

    # The wide tile loads less, but has more sums than AVX2 has registers.
    return max(rate(1, _tiles), rate(2, _wide_tiles))


def _halves(count: int, dtype: Any) -> Any:
    """The bits of so many random bfloat16, as elements of `dtype`.

    Zeros are multiplied faster, by a tenth here, for they cost less power, and those that nobody has written lie in one
    page. Two bfloat16 are a float32.
    """
    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    array = aligned(2 * count // np.dtype(dtype).itemsize, dtype)
    array.view(np.uint16)[:] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return array


def _best(threads: int, work: Callable[[int], Any]) -> float:
    """Seconds that `work` takes on all threads at once; the first pass compiles it, and does not count."""
    work(0)
    taken = []
    for _ in range(_PASSES):
        team = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
        began = perf_counter()
        for member in team:
            member.start()
        for member in team:
            member.join()
        taken.append(perf_counter() - began)
    return min(taken)


@njit(nogil=True, cache=True)
def _read(buffer: Any, first: int, count: int, out: Any) -> None:
    """The sum of a part of the buffer, eight vectors at a time, so that no sum waits for another."""
    a = b = c = d = e = f = g = h = splat(np.float32(0))
    for i in range(first, first + count, 8 * LANES):
        a, b = a + load(buffer, i), b + load(buffer, i + LANES)
        c, d = c + load(buffer, i + 2 * LANES), d + load(buffer, i + 3 * LANES)
        e, f = e + load(buffer, i + 4 * LANES), f + load(buffer, i + 5 * LANES)
        g, h = g + load(buffer, i + 6 * LANES), h + load(buffer, i + 7 * LANES)
    store(out, 0, ((a + b) + (c + d)) + ((e + f) + (g + h)))


@njit(nogil=True, cache=True)
def _tiles(x: Any, w: Any, K: int, out: Any) -> None:
    for _ in range(_TILES):
        tile(6, 1, x, 0, K, w, 0, LANES, 0, K, out, 0, LANES)


@njit(nogil=True, cache=True)
def _wide_tiles(x: Any, w: Any, K: int, out: Any) -> None:
    for _ in range(_TILES):
        tile(6, 2, x, 0, K, w, 0, LANES, K * LANES, K, out, 0, 2 * LANES)


@njit(nogil=True, cache=True)
def _blocks(x: Any, w: Any, out: Any) -> None:
    configure(TILE)
    size, row = _K // TILE_K * TILE_BYTES, 2 * 4 * LANES
    for _ in range(_TILES):
        block(2, 2, 0, x.ctypes.data, size, w.ctypes.data, size, _K // TILE_K, False, out.ctypes.data, row)
    release()
