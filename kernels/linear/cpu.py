"""``x weight^T`` on the CPU, every output added up in one order: k = 0, 1, 2, ... with fused multiply-adds.

So a row's bits depend on nothing but the row: not on how many rows there are, not on its place among them, not on the
number of threads. Weights are packed once into panels of `PANEL` outputs, k by k, that are read from start to end: at
few rows the product runs at the speed of memory, at many from the cache. Weights may be float32 or bfloat16, which is
widened on the way; sums are float32 either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from lattice_serve.kernels.numba_math import as_float32

PANEL = 32
"""Outputs of a panel: 4 vectors of AVX2, 2 of AVX-512, 8 of NEON."""

_IN_ORDER = {"contract", "nsz"}
"""Multiply and add may fuse; sums keep their order."""


@njit(fastmath=_IN_ORDER, cache=True)
def _one_row(x: Any, i: int, w: Any, o_w: int, K: int, acc: Any) -> None:
    for j in range(PANEL):
        acc[j] = 0
    whole = K // 4 * 4
    for k in range(0, whole, 4):
        a0, a1, a2, a3 = x[i, k], x[i, k + 1], x[i, k + 2], x[i, k + 3]
        p = w[o_w + k * PANEL : o_w + (k + 4) * PANEL]
        for j in range(PANEL):
            total = acc[j] + a0 * as_float32(p[j])
            total = total + a1 * as_float32(p[PANEL + j])
            total = total + a2 * as_float32(p[2 * PANEL + j])
            acc[j] = total + a3 * as_float32(p[3 * PANEL + j])
    for k in range(whole, K):
        p = w[o_w + k * PANEL : o_w + (k + 1) * PANEL]
        for j in range(PANEL):
            acc[j] = acc[j] + x[i, k] * as_float32(p[j])


@njit(fastmath=_IN_ORDER, cache=True)
def _two_rows(x: Any, i: int, w: Any, o_w: int, K: int, acc: Any) -> None:
    for j in range(2 * PANEL):
        acc[j] = 0
    whole = K // 4 * 4
    for k in range(0, whole, 4):
        a0, a1, a2, a3 = x[i, k], x[i, k + 1], x[i, k + 2], x[i, k + 3]
        b0, b1, b2, b3 = x[i + 1, k], x[i + 1, k + 1], x[i + 1, k + 2], x[i + 1, k + 3]
        p = w[o_w + k * PANEL : o_w + (k + 4) * PANEL]
        for j in range(PANEL):
            w0, w1 = as_float32(p[j]), as_float32(p[PANEL + j])
            w2, w3 = as_float32(p[2 * PANEL + j]), as_float32(p[3 * PANEL + j])
            acc[j] = (((acc[j] + a0 * w0) + a1 * w1) + a2 * w2) + a3 * w3
            acc[PANEL + j] = (((acc[PANEL + j] + b0 * w0) + b1 * w1) + b2 * w2) + b3 * w3
    for k in range(whole, K):
        p = w[o_w + k * PANEL : o_w + (k + 1) * PANEL]
        for j in range(PANEL):
            w0 = as_float32(p[j])
            acc[j] = acc[j] + x[i, k] * w0
            acc[PANEL + j] = acc[PANEL + j] + x[i + 1, k] * w0


@njit(parallel=True, fastmath=_IN_ORDER, cache=True)
def _linear(x: Any, w: Any, out: Any) -> None:
    M, K = x.shape
    N = out.shape[1]
    for panel in prange(-(-N // PANEL)):
        acc = np.empty(2 * PANEL, dtype=np.float32)
        first = panel * PANEL
        width = min(PANEL, N - first)
        o_w = panel * K * PANEL
        for i in range(0, M - 1, 2):
            _two_rows(x, i, w, o_w, K, acc)
            for j in range(width):
                out[i, first + j] = acc[j]
                out[i + 1, first + j] = acc[PANEL + j]
        if M % 2 == 1:
            _one_row(x, M - 1, w, o_w, K, acc)
            for j in range(width):
                out[M - 1, first + j] = acc[j]


class PackedWeight:
    """A weight [N, K], float32 or bfloat16, in panels; the last one is filled up with zeros."""

    def __init__(self, weight: Tensor) -> None:
        self.N, self.K = weight.shape
        panels = -(-self.N // PANEL)
        padded = weight.new_zeros(panels * PANEL, self.K)
        padded[: self.N] = weight.detach()
        packed = padded.unflatten(0, (panels, PANEL)).mT.contiguous().flatten()
        self._panels: Any = packed.view(torch.uint16).numpy() if packed.dtype == torch.bfloat16 else packed.numpy()

    @property
    def nbytes(self) -> int:
        return int(self._panels.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] float32 and contiguous -> [M, N] float32. Raises ValueError when it is not."""
        if x.ndim != 2 or x.shape[1] != self.K or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"x must be contiguous float32 [M, {self.K}], not {x.dtype} {tuple(x.shape)}")
        out = x.new_empty(len(x), self.N)
        _linear(x.numpy(), self._panels, out.numpy())
        return out
