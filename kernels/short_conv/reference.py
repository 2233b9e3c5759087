"""The short convolution as shifted products: on CPU its backward is many times faster than conv1d's."""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """``y_t = sum_j weight[:, j] x_{t - K + 1 + j}`` for every channel on its own.

    x [B, T, n], weight [n, K], tail [B, K - 1, n]: the inputs before x (zeros at a sequence's start).
    Returns y [B, T, n] and the new tail, a tensor of its own.
    """
    taps, T = weight.shape[1], x.shape[1]
    inputs = torch.cat((tail.to(x.dtype), x), dim=1)
    y = inputs[:, :T] * weight[:, 0]
    for j in range(1, taps):
        y = torch.addcmul(y, inputs[:, j : j + T], weight[:, j])
    return y, inputs[:, T:].clone()
