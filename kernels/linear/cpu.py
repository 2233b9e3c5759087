"""``x weight^T`` on the CPU, every output added up in one order: k = 0, 1, 2, ... with fused multiply-adds.

So a row's bits depend on nothing but the row: not on how many rows there are, not on its place among them, not on the
number of threads. Weights are packed once into strips of 16 outputs, k by k, that are read from start to end: few rows
are multiplied at the speed of memory, many at that of the processor's multipliers, 6 rows to a load of weights.
Sums are float32 whatever the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from lattice_serve.kernels.cpu.vector import load, store, tile
from lattice_serve.kernels.lanes import LANES, padded
from lattice_serve.kernels.linear.quantize import quantize

PANEL = 64
"""Outputs that a thread takes at once: four strips."""
_ROWS = 6
"""Rows of a tile of one vector: 12 sums in the 16 registers of AVX2."""
SUMS = _ROWS * LANES
"""Floats that `linear` wants of its thread."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] in strips [K, 16], N filled up with zeros."""

    N: int
    K: int
    strips: Any
    """float32 or int8 [padded(N) K], or uint32 [padded(N) (K + 1) // 2] with the bits of two bfloat16."""
    scales: Any
    """float32 [padded(N)], one an output, where the strips are int8; else [0]."""

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """weight [N, K], float32 or bfloat16."""
        N, K = weight.shape
        return cls(N, K, _pack(weight), np.zeros(0, dtype=np.float32))

    @classmethod
    def quantized(cls, weight: Tensor) -> PackedWeight:
        """weight [N, K] as int8 with a scale for each output; see `linear.quantize`."""
        whole, scales = quantize(weight)
        filled = torch.zeros(padded(len(weight)))
        filled[: len(weight)] = scales
        N, K = weight.shape
        return cls(N, K, _pack(whole), filled.numpy())

    @property
    def nbytes(self) -> int:
        return int(self.strips.nbytes + self.scales.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] float32 and contiguous -> [M, N] float32. Raises ValueError when it is not."""
        if x.ndim != 2 or x.shape[1] != self.K or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"x must be contiguous float32 [M, {self.K}], not {x.dtype} {tuple(x.shape)}")
        out = x.new_empty(len(x), padded(self.N))
        scratch = np.empty(SUMS, dtype=np.float32)
        linear(
            self.strips, 0, self.scales, 0, self.N, self.K, x.numpy().reshape(-1), self.K, len(x),
            out.numpy().reshape(-1), out.shape[1], False, 0, panel_count(self.N), scratch, 0,
        )  # fmt: skip
        return out[:, : self.N]


def _pack(weight: Tensor) -> Any:
    N, K = weight.shape
    halves = 2 if weight.dtype == torch.bfloat16 else 1
    whole = weight.detach().new_zeros(padded(N), -(-K // halves) * halves)
    whole[:N, :K] = weight.detach()
    strips = whole.view(-1, LANES, whole.shape[1] // halves, halves).movedim(1, 2).flatten()
    return strips.view(torch.uint32).numpy() if halves == 2 else strips.numpy()


@njit(cache=True)
def panel_count(N: int) -> int:
    return -(-N // PANEL)


@njit(cache=True)
def _emit(sums: Any, o_sums: int, scales: Any, o_s: int, scaled: bool, add: bool, out: Any, o_out: int, n: int) -> None:
    """n sums to their place."""
    for j in range(0, n, LANES):
        value = load(sums, o_sums + j)
        if scaled:
            value = value * load(scales, o_s + j)
        if add:
            value = load(out, o_out + j) + value
        store(out, o_out + j, value)


@njit(cache=True)
def _rows(rows: int, x: Any, o_x: int, x_row: int, w: Any, o_w: int, K: int, sums: Any, o_sums: int) -> None:
    """A tile of up to `_ROWS` rows and one strip."""
    if rows == 6:
        tile(6, 1, 0, x, o_x, x_row, 1, w, o_w, LANES, 0, K, sums, o_sums, LANES)
    elif rows == 5:
        tile(5, 1, 0, x, o_x, x_row, 1, w, o_w, LANES, 0, K, sums, o_sums, LANES)
    elif rows == 4:
        tile(4, 1, 0, x, o_x, x_row, 1, w, o_w, LANES, 0, K, sums, o_sums, LANES)
    elif rows == 3:
        tile(3, 1, 0, x, o_x, x_row, 1, w, o_w, LANES, 0, K, sums, o_sums, LANES)
    elif rows == 2:
        tile(2, 1, 0, x, o_x, x_row, 1, w, o_w, LANES, 0, K, sums, o_sums, LANES)
    else:
        tile(1, 1, 0, x, o_x, x_row, 1, w, o_w, LANES, 0, K, sums, o_sums, LANES)


def _strip_size(K: int, w: Any) -> int:
    """Elements of one strip."""
    return LANES * (-(-K // 2) if w.dtype == np.uint32 else K)


@overload(_strip_size, strict=False)
def _strip_size_of(K: Any, w: Any) -> Any:
    if w.dtype == types.uint32:
        return lambda K, w: LANES * ((K + 1) // 2)
    return lambda K, w: LANES * K


@njit(cache=True)
def linear(
    w: Any, o_w: int, scales: Any, o_s: int, N: int, K: int, x: Any, x_row: int, M: int, out: Any, out_row: int,
    add: bool, first: int, last: int, sums: Any, o_sums: int,
) -> None:  # fmt: skip
    """Panels `first` to `last` of a packed weight: out [M, out_row] = x [M, x_row] weight^T, or that added to out.

    The strips begin at o_w of w, the scales at o_s of scales, `SUMS` floats at o_sums of sums are for scratch; all
    arrays are [..]. Outputs beyond N up to `padded(N)` become 0.
    """
    scaled = len(scales) > 0
    size = _strip_size(K, w)
    whole = padded(N)
    for panel in range(first, last):
        begin = panel * PANEL
        width = min(PANEL, whole - begin)
        o_p = o_w + begin // LANES * size
        if M == 1 and width == PANEL:
            tile(1, 4, 0, x, 0, 0, 1, w, o_p, LANES, size, K, sums, o_sums, 0)
            _emit(sums, o_sums, scales, o_s + begin, scaled, add, out, begin, PANEL)
            continue
        for j in range(0, width, LANES):
            o_j = o_p + j // LANES * size
            i = 0
            while i < M:
                # As many tiles as it takes, all but equally tall: a low one would leave the processor waiting.
                rows = -(-(M - i) // -(-(M - i) // _ROWS))
                _rows(rows, x, i * x_row, x_row, w, o_j, K, sums, o_sums)
                for r in range(rows):
                    o_out = (i + r) * out_row + begin + j
                    _emit(sums, o_sums + r * LANES, scales, o_s + begin + j, scaled, add, out, o_out, LANES)
                i += rows
