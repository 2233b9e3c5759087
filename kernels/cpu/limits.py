"""What this machine allows at the moment, bytes and floating-point operations a second: what benchmarks are held to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from numba import njit

from lattice_serve.kernels.cpu.vector import load, splat, store, tile
from lattice_serve.kernels.lanes import LANES

_BUFFER_BYTES = 256 << 20
"""Far more than any cache holds."""
_K = 256
"""Depth of the tile that is run over and over: its operands stay in the first cache."""
_TILES = 4000
_PASSES = 5


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory together: the best of a few passes."""
    buffer = np.ones(_BUFFER_BYTES // 4, dtype=np.float32)
    share = len(buffer) // threads // (8 * LANES) * 8 * LANES
    outs = [np.empty(LANES, dtype=np.float32) for _ in range(threads)]
    seconds = _best(threads, lambda thread: _read(buffer, thread * share, share, outs[thread]))
    return 4 * share * threads / seconds


def flops(threads: int) -> float:
    """Float32 operations a second (a multiply-add is two) of the tile that matrix products are made of."""
    xs, ws, outs = (
        [np.ones(size, dtype=np.float32) for _ in range(threads)] for size in (6 * _K, _K * LANES, 6 * LANES)
    )
    seconds = _best(threads, lambda thread: _tiles(xs[thread], ws[thread], outs[thread]))
    return 2.0 * 6 * LANES * _K * _TILES * threads / seconds


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
def _tiles(x: Any, w: Any, out: Any) -> None:
    for _ in range(_TILES):
        tile(6, 1, 0, x, 0, _K, 1, w, 0, LANES, 0, _K, out, 0, LANES)
