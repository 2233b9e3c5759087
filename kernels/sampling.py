"""One token of each row of logits, drawn at its temperature, on the CPU: what `engine.sampler` does with tensors, in
two passes over a row and no more.

The exponential between them is torch's, so that a draw is the same token whichever way it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor


def draw(
    logits: Tensor,
    highest: Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    shares: Sequence[float],
    grid: float,
) -> Tensor:
    """Tokens [len(rows)] int64 of those rows of logits [B, V] float32, whose largest are highest [B] float32.

    temperatures: no denormal numbers; shares: uniform numbers in [0, 1); grid: a power of two, V or more, which makes
    sums of weights exact (see `engine.sampler`). What a row gives that is not finite means nothing.
    """
    weights = torch.empty(len(rows), logits.shape[1], dtype=torch.float64)
    _scale(logits.numpy(), highest.numpy(), np.array(rows), np.array(temperatures), weights.numpy())
    tokens = torch.empty(len(rows), dtype=torch.int64)
    _pick(weights.exp_().numpy(), np.array(shares), grid, tokens.numpy())
    return tokens


# Compiled when this is imported: no request waits for it.
@njit("void(float32[:, :], float32[:], int64[:], float64[:], float64[:, :])", cache=True)
def _scale(logits: Any, highest: Any, rows: Any, temperatures: Any, out: Any) -> None:
    for i in range(len(rows)):
        row = rows[i]
        most = np.float64(highest[row])
        for k in range(logits.shape[1]):
            out[i, k] = (np.float64(logits[row, k]) - most) / temperatures[i]


@njit("void(float64[:, :], float64[:], float64, int64[:])", cache=True)
def _pick(weights: Any, shares: Any, grid: float, tokens: Any) -> None:
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
