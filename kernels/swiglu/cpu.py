"""SwiGLU on the CPU, element by element."""

from __future__ import annotations

from typing import Any

from numba import njit

from lattice_serve.kernels.cpu.math import silu
from lattice_serve.kernels.cpu.vector import load
from lattice_serve.kernels.lanes import LANES
from lattice_serve.kernels.linear.activations import put


@njit(cache=True)
def swiglu(x: Any, o_x: int, n: int, out: Any, row: int, K: int, k: int) -> None:
    """`kernels.swiglu.swiglu` of n elements, to k and on of a row of activations of K, to the end of the last vector.

    From o_x of x, float32 [..], on there is a vector of gates, one of ups, and so on in turn.
    """
    for i in range(0, n, LANES):
        put(out, row, K, k + i, silu(load(x, o_x + 2 * i)) * load(x, o_x + 2 * i + LANES))
