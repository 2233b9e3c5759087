"""RMSNorm on the CPU: one row at a time, so a row's bits depend on nothing but the row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from torch import Tensor

from lattice_serve.kernels.numba_math import REDUCE


@njit(parallel=True, fastmath=REDUCE, cache=True)
def _rms_norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    rows, n = x.shape
    for i in prange(rows):
        total = np.float32(0)
        for j in range(n):
            total += x[i, j] * x[i, j]
        scale = 1 / np.sqrt(total / np.float32(n) + eps)
        for j in range(n):
            out[i, j] = x[i, j] * scale * weight[j]


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """x [N, n], weight [n], out [N, n], all float32 and contiguous: `kernels.norm.rms_norm`, written to out."""
    _rms_norm(x.numpy(), weight.numpy(), np.float32(eps), out.numpy())
    return out
