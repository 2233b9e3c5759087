"""What this machine allows at the moment, bytes and floating-point operations a second: what benchmarks are held to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from numba import njit

from lattice_serve.kernels.numba.amx import BYTE_TILE_K, TILE, TILE_BYTES, TILE_K, block, configure, release
from lattice_serve.kernels.numba.dots import tile
from lattice_serve.kernels.numba.features import Products
from lattice_serve.kernels.numba.lanes import LANES, aligned
from lattice_serve.kernels.numba.types import Bytes, Floats, Int32s, Strips
from lattice_serve.kernels.numba.vector import load, splat, store
from lattice_serve.kernels.numba.vnni import dots

_STREAMS = 4
"""Places that a thread reads at in turn: more bytes a second than at one."""
_K = 256
"""Depth of the tile that is run over and over: its operands stay in the first cache."""
_TILES = 4000
_PASSES, _ROUNDS = 5, 8
"""Rounds of a pass are long enough together for the system to give each thread a processor of its own."""


def bandwidth(threads: int, size: int) -> float:
    """Bytes a second that so many threads read together, over and over, of so many bytes: the best of a few passes.

    How much of them stays in the last cache is the machine's affair, and that of its neighbours.
    """
    streams = threads * _STREAMS
    share = max(1, size // streams // (8 * LANES)) * 2 * LANES
    buffer = aligned(streams * share, np.float32)
    buffer.fill(1)  # zeros that nobody has written are one page
    outs = [np.empty(LANES, dtype=np.float32) for _ in range(threads)]
    seconds = _best(threads, lambda thread: _read(buffer, thread * _STREAMS * share, share, outs[thread]))
    return buffer.nbytes / seconds


def flops(threads: int, products: Products) -> float:
    """Operations a second (a multiply-add is two) of the tiles that such products are made of."""
    if products in ("amx_int8", "avx512_vnni"):  # two lines of bytes are a row
        lines, run = (2 * TILE, _byte_blocks) if products == "amx_int8" else (8, _dots)
        bytes_ = [[_bytes(2 * TILE * _K) for _ in range(2)] for _ in range(threads)]
        sums = [aligned(4 * TILE * LANES, np.int32) for _ in range(threads)]
        seconds = _best(threads, lambda thread: run(*bytes_[thread], sums[thread]))
        return 2.0 * (lines // 2) * 2 * LANES * _K * _TILES * threads / seconds
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


def _bytes(count: int) -> Bytes:
    """So many random ones; as `_halves`."""
    whole = aligned(count, np.int8)
    whole[:] = np.random.default_rng(0).integers(-127, 128, count)
    return whole


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

    def rounds(thread: int) -> None:
        for _ in range(_ROUNDS):
            work(thread)

    work(0)
    taken = []
    for _ in range(_PASSES):
        team = [threading.Thread(target=rounds, args=(thread,)) for thread in range(threads)]
        began = perf_counter()
        for member in team:
            member.start()
        for member in team:
            member.join()
        taken.append((perf_counter() - began) / _ROUNDS)
    return min(taken)


@njit(nogil=True, cache=True)
def _read(buffer: Floats, first: int, count: int, out: Floats) -> None:
    """The sum of `_STREAMS` parts of the buffer, two vectors of each at a time, so that no sum waits for another."""
    a = b = c = d = e = f = g = h = splat(np.float32(0))
    for i in range(first, first + count, 2 * LANES):
        a, b = a + load(buffer, i), b + load(buffer, i + LANES)
        c, d = c + load(buffer, i + count), d + load(buffer, i + count + LANES)
        e, f = e + load(buffer, i + 2 * count), f + load(buffer, i + 2 * count + LANES)
        g, h = g + load(buffer, i + 3 * count), h + load(buffer, i + 3 * count + LANES)
    store(out, 0, ((a + b) + (c + d)) + ((e + f) + (g + h)))


@njit(nogil=True, cache=True)
def _tiles(x: Strips, w: Strips, K: int, out: Floats) -> None:
    for _ in range(_TILES):
        tile(6, 1, x, K, w, LANES, 0, K, out, LANES)


@njit(nogil=True, cache=True)
def _wide_tiles(x: Strips, w: Strips, K: int, out: Floats) -> None:
    for _ in range(_TILES):
        tile(6, 2, x, K, w, LANES, K * LANES, K, out, 2 * LANES)


@njit(nogil=True, cache=True)
def _blocks(x: Strips, w: Strips, out: Floats) -> None:
    configure(TILE)
    size, row = _K // TILE_K * TILE_BYTES, 2 * 4 * LANES
    for _ in range(_TILES):
        block(2, 2, 0, x.ctypes.data, size, w.ctypes.data, size, _K // TILE_K, False, out.ctypes.data, row)
    release()


@njit(nogil=True, cache=True)
def _byte_blocks(x: Bytes, w: Bytes, sums: Int32s) -> None:
    configure(TILE)
    size, row = _K // BYTE_TILE_K * TILE_BYTES, 2 * 4 * LANES
    for _ in range(_TILES):
        block(2, 2, 1, x.ctypes.data, size, w.ctypes.data, size, _K // BYTE_TILE_K, False, sums.ctypes.data, row)
    release()


@njit(nogil=True, cache=True)
def _dots(x: Bytes, w: Bytes, sums: Int32s) -> None:
    size, row, offsets = _K // BYTE_TILE_K * TILE_BYTES, 2 * 4 * LANES, np.zeros(8, dtype=np.int32)
    for _ in range(_TILES):
        dots(8, 2, x.ctypes.data, w.ctypes.data, size, _K // BYTE_TILE_K, offsets.ctypes.data, sums.ctypes.data, row)
