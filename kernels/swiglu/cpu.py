"""SwiGLU on the CPU, element by element."""

from __future__ import annotations

from typing import Any

from numba import njit

from lattice_serve.kernels.cpu.math import silu
from lattice_serve.kernels.cpu.vector import load
from lattice_serve.kernels.lanes import LANES
from lattice_serve.kernels.linear.activations import put


@njit(cache=True)
def swiglu(gate: Any, o_gate: int, up: Any, o_up: int, first: int, last: int, K: int, out: Any, row: int) -> None:
    """`kernels.swiglu.swiglu` of elements first to last of lines at o_gate and o_up, up to the end of the last vector.

    first is a multiple of 16. They go to a row of activations of K; the lines are float32 [..].
    """
    for i in range(first, last, LANES):
        put(out, row, K, i, silu(load(gate, o_gate + i)) * load(up, o_up + i))
