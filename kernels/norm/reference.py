"""Norms over the last dimension, on any device, differentiable."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n], weight [n] -> [..., n] in x's dtype: ``x / sqrt(mean(x^2) + eps) * weight``, in float32 or wider.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    wide = x.float() if x.element_size() < 4 else x
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x [..., n] -> ``x / sqrt(sum(x^2) + eps)``, so that a row of zeros stays one."""
    return x * (x.square().sum(dim=-1, keepdim=True) + eps).rsqrt()
