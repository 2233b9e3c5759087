"""Norms, SwiGLU and the short convolution in torch: the reference, on any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns ``x / sqrt(mean(x^2) + eps) * weight`` of x [..., n] and weight [n], over the last dimension.

    The result has x's dtype; it is computed in float32 or wider. Source: Zhang and Sennrich, arXiv 1910.07467,
    equation 4.
    """
    wide = x.float() if x.element_size() < 4 else x
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """Returns ``x / sqrt(sum(x^2) + eps)`` of x [..., n]; a row of zeros stays zeros."""
    return x * (x.square().sum(dim=-1, keepdim=True) + eps).rsqrt()


def swiglu(gate_up: Tensor) -> Tensor:
    """Returns ``silu(gate) * up`` [..., n] of gate_up [..., 2 n], the gate first.

    Source: Shazeer, arXiv 2002.05202, equation 6.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def short_conv(x: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the causal depthwise convolution of x, and the inputs that the next call needs as its `tail`.

    ``y_t = sum_j weight[:, j] x_{t - K + 1 + j}`` for every channel, of x [B, T, n], weight [n, K] and tail
    [B, K - 1, n], the inputs before x (zeros at a sequence's start). Returns y [B, T, n] and a new
    tensor [B, K - 1, n].
    Sums of shifted products: their backward is many times faster on a CPU than that of conv1d.
    """
    taps, T = weight.shape[1], x.shape[1]
    inputs = torch.cat((tail.to(x.dtype), x), dim=1)
    y = inputs[:, :T] * weight[:, 0]
    for j in range(1, taps):
        y = torch.addcmul(y, inputs[:, j : j + T], weight[:, j])
    return y, inputs[:, T:].clone()
