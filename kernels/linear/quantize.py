"""Weights as int8 with one scale an output: the rule of every device."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and float32 scales [N]; symmetric: a scale is its row's largest |weight| / 127.

    A row of zeros has the scale 0.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    whole = (wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
    return whole.to(torch.int8), scales
