"""RMSNorm on the CPU, one row at a time, so that a row's bits depend on nothing but the row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from lattice_serve.kernels.cpu.vector import fma, load, splat, total
from lattice_serve.kernels.lanes import LANES
from lattice_serve.kernels.linear.activations import put, settle


@njit(cache=True)
def rms_norm(x: Any, o_x: int, n: int, weight: Any, o_weight: int, eps: float, out: Any, row: int) -> None:
    """`kernels.norm.rms_norm` of n elements at o_x of x, to a row of activations; other arrays are float32 [..].

    Behind the n there are zeros up to a whole vector, in the weight too; they are written as well.
    """
    squares = splat(np.float32(0))
    for i in range(0, n, LANES):
        value = load(x, o_x + i)
        squares = fma(value, value, squares)
    scale = splat(np.float32(1) / np.sqrt(total(squares) / np.float32(n) + eps))
    for i in range(0, n, LANES):
        put(out, row, n, i, load(x, o_x + i) * scale * load(weight, o_weight + i))
    settle(out, row, n)
