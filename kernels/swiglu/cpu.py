"""SwiGLU on the CPU, element by element."""

from __future__ import annotations

from typing import Any

from numba import njit

from lattice_serve.kernels.cpu.math import silu
from lattice_serve.kernels.cpu.vector import load, store
from lattice_serve.kernels.lanes import LANES


@njit(cache=True)
def swiglu(gate: Any, o_gate: int, up: Any, o_up: int, n: int, out: Any, o_out: int) -> None:
    """`kernels.swiglu.swiglu` of n elements at o_gate and o_up, to o_out of out, up to the end of the last vector.

    Arrays are float32 [..].
    """
    for i in range(0, n, LANES):
        store(out, o_out + i, silu(load(gate, o_gate + i)) * load(up, o_up + i))
