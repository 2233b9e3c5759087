"""SwiGLU on the CPU, one element at a time: bits depend on nothing but the element's own inputs."""

from __future__ import annotations

from typing import Any

from numba import njit, prange
from torch import Tensor

from lattice_serve.kernels.numba_math import REDUCE, silu


@njit(parallel=True, fastmath=REDUCE, cache=True)
def _swiglu(gate_up: Any, out: Any) -> None:
    rows, n = out.shape
    for i in prange(rows):
        for j in range(n):
            out[i, j] = silu(gate_up[i, j]) * gate_up[i, n + j]


def swiglu(gate_up: Tensor, out: Tensor) -> Tensor:
    """gate_up [N, 2 n], out [N, n], float32 and contiguous: `kernels.swiglu.swiglu`, written to out."""
    _swiglu(gate_up.numpy(), out.numpy())
    return out
