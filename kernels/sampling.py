"""Draws one token from each row of logits on the CPU, in two passes over a row; `engine.sampler` does it with tensors.

The exponential between the passes is torch's, so both ways draw the same token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lattice_serve.kernels.numba.types import Doubles, Floats, Ints


def draw(
    logits: Tensor,
    highest: Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    shares: Sequence[float],
    grid: float,
) -> Tensor:
    """Returns tokens [len(rows)] int64 drawn from those rows of logits [B, V] float32.

    highest [B] float32: the largest logit of each row of logits. temperatures: no denormal numbers. shares: uniform
    numbers in [0, 1). grid: a power of two, at least V, which makes sums of weights exact (see `engine.sampler`). The
    token of a row that is not finite means nothing.
    """
    weights = torch.empty(len(rows), logits.shape[1], dtype=torch.float64)
    _scale(logits.numpy(), highest.numpy(), np.array(rows), np.array(temperatures), weights.numpy())
    tokens = torch.empty(len(rows), dtype=torch.int64)
    _pick(weights.exp_().numpy(), np.array(shares), grid, tokens.numpy())
    return tokens


# Compiled when this is imported: no request waits for it.
@njit("void(float32[:, :], float32[:], int64[:], float64[:], float64[:, :])", cache=True)
def _scale(logits: Floats, highest: Floats, rows: Ints, temperatures: Doubles, out: Doubles) -> None:
    for i in range(len(rows)):
        row = rows[i]
        most = np.float64(highest[row])
        for k in range(logits.shape[1]):
            out[i, k] = (np.float64(logits[row, k]) - most) / temperatures[i]


@njit("void(float64[:, :], float64[:], float64, int64[:])", cache=True)
def _pick(weights: Doubles, shares: Doubles, grid: float, tokens: Ints) -> None:
    V = weights.shape[1]
    for i in range(len(tokens)):
        total = 0.0
        for k in range(V):
            weights[i, k] = (weights[i, k] + grid) - grid
            total += weights[i, k]
        place = shares[i] * total
        k, sum_ = 0, weights[i, 0]
        while sum_ <= place and k < V - 1:
            k += 1
            sum_ += weights[i, k]
        tokens[i] = k
