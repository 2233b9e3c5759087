"""SiLU in Triton's kernels."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e^-x), of two approximations that a GPU has. `tl.sigmoid` looks after denormal numbers in its power and
    its quotient, where here is no need: on NVIDIA's that is thirteen instructions a value, this is six."""
    root = tl.rsqrt(1 + tl.exp2(-x * _LOG2_E))
    return root * root


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    return x * sigmoid(x)
