"""RMSNorm and SwiGLU on the CPU, one row at a time: the bits of a row depend on nothing but the row."""

from __future__ import annotations

import numpy as np
from numba import njit

from lattice_serve.kernels.linear.activations import quantize_row, write
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.math import silu
from lattice_serve.kernels.numba.types import Floats, Rows
from lattice_serve.kernels.numba.vector import fma, load, splat, total


@njit(cache=True)
def rms_norm(x: Floats, o_x: int, n: int, weight: Floats, o_weight: int, eps: float, out: Rows, row: int) -> None:
    """`kernels.pointwise.rms_norm` of n elements at o_x of x, to a row of activations; other arrays are float32 [..].

    Behind the n there are zeros up to a whole vector, in the weight too; they are written as well.
    """
    squares = splat(np.float32(0))
    for i in range(0, n, LANES):
        value = load(x, o_x + i)
        squares = fma(value, value, squares)
    scale = splat(np.float32(1) / np.sqrt(total(squares) / np.float32(n) + eps))
    for i in range(0, n, LANES):
        write(out, row, n, i, load(x, o_x + i) * scale * load(weight, o_weight + i))
    quantize_row(out, row, n)


@njit(cache=True)
def swiglu(x: Floats, o_x: int, n: int, out: Rows, row: int, K: int, k: int) -> None:
    """`kernels.pointwise.swiglu` of n elements, to k and on of a row of activations of K, in whole vectors.

    From o_x of x, float32 [..], on there is a vector of gates, one of ups, and so on in turn.
    """
    for i in range(0, n, LANES):
        write(out, row, K, k + i, silu(load(x, o_x + 2 * i)) * load(x, o_x + 2 * i + LANES))
