"""A packed weight's product by itself, on one thread."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lattice_serve.kernels.linear.activations import activations, write_rows
from lattice_serve.kernels.linear.cpu import linear, panel_count, scratch_size
from lattice_serve.kernels.linear.operands import Matrix, Output
from lattice_serve.kernels.linear.packing import PackedWeight
from lattice_serve.kernels.numba.features import Products
from lattice_serve.kernels.numba.lanes import aligned, padded
from lattice_serve.kernels.numba.types import Floats, Rows, Strips
from lattice_serve.kernels.numba.vector import pointer


class Product:
    """x weight^T of a weight [N, K], packed."""

    def __init__(self, weight: Tensor, quantization: Literal["int8"] | None = None) -> None:
        self._weight = PackedWeight.of(weight, quantization)
        self.nbytes = self._weight.nbytes

    def __call__(self, x: Tensor, products: Products = "float32") -> Tensor:
        """Returns [M, N] float32 of x [M, K] float32.

        Unless products are of float32, x is rounded: to bfloat16, or to whole numbers of two bytes.
        """
        weight, M, N, K = self._weight, len(x), padded(self._weight.N), self._weight.K
        rows, out = np.zeros((M, padded(K)), dtype=np.float32), aligned(M * N, np.float32)
        rows[:, :K] = x.numpy()
        given = activations(products, M, K)
        write_rows(rows.reshape(-1), M, K, given)
        scratch = aligned(scratch_size(K), np.float32)
        _linear(weight.strips, weight.scales, weight.N, K, given, M, out, N, scratch)
        return torch.from_numpy(out.reshape(M, N)[:, : weight.N])


@njit(cache=True)  # type: ignore[untyped-decorator]
def _linear(
    strips: Strips, scales: Floats, N: int, K: int, x: Rows, M: int, out: Floats, stride: int, scratch: Floats
) -> None:
    weight = Matrix(pointer(strips, 0), pointer(scales, 0), N, K)
    linear(weight, x, M, Output(pointer(out, 0), stride, False), 0, panel_count(N), scratch)
