"""SiLU inside Triton kernels; and residual add with RMSNorm in one launch (reference: `pointwise.reference`).

`add_rms_norm` first adds what a product left, ``x += parts[0]; x += parts[1]; ...``, and then writes the norm of x.

    x [M, n]         float32, the residual stream, updated in place
    parts [P, M, n]  float32, what a product over shares of its inputs left, one part a share; added in their order
    weight [n]       float32
    out [M, n]       float32 or bfloat16

One program has one row in registers, so a row's bits depend on nothing but the row. Bound by memory:
``(2 + P) 4 + out's size`` bytes an element.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.triton.dependent_launch import after_last, dependent

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Returns 1 / (1 + e^-x), by two approximations that a GPU has. `tl.sigmoid` takes care of denormal numbers in its
    power and its quotient, which is not needed here: thirteen instructions a value on NVIDIA's GPUs, this takes six."""
    root = tl.rsqrt(1 + tl.exp2(-x * _LOG2_E))
    return root * root


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """Returns x / (1 + e^-x)."""
    return x * sigmoid(x)


@triton.jit(do_not_specialize=["M"])
def _add_rms_norm(
    p_x: tl.tensor, p_parts: tl.tensor, p_weight: tl.tensor, p_out: tl.tensor, M: tl.tensor, eps: tl.tensor,
    P: tl.constexpr, n: tl.constexpr, b_n: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, b_n)
    inside = o_n < n
    p_row = p_x + i_row * n + o_n
    after_last(early)
    x = tl.load(p_row, mask=inside, other=0.0)
    for i_part in tl.static_range(P):
        x += tl.load(p_parts + (i_row + i_part * M) * n + o_n, mask=inside, other=0.0)
    if P > 0:
        tl.store(p_row, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
    weight = tl.load(p_weight + o_n, mask=inside, other=0.0)
    tl.store(p_out + i_row * n + o_n, x * scale * weight, mask=inside)


@cache
def _block(n: int) -> int:
    """Values that a program takes at once."""
    return int(triton.next_power_of_2(n))


def add_rms_norm(x: Tensor, parts: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Add `parts` [P, M, n] to x [M, n] in place, and write the norm of that to `out` [M, n], which is returned.

    Without parts x stays as it is. Raises ValueError, naming what does not fit.
    """
    M, n = x.shape
    wanted = {"x": (x, (M, n)), "weight": (weight, (n,)), "out": (out, (M, n))}
    if parts is not None:
        wanted["parts"] = (parts, (len(parts), M, n))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(f"{name} must be contiguous {[*shape]} on {x.device}, not {[*tensor.shape]}")
        kinds = (torch.float32, torch.bfloat16) if name == "out" else (torch.float32,)
        if tensor.dtype not in kinds:
            raise ValueError(f"{name} must be {' or '.join(map(str, kinds))}, not {tensor.dtype}")
    if M:
        b_n = _block(n)
        _add_rms_norm[(M,)](
            x, x if parts is None else parts, weight, out, M, eps,
            P=0 if parts is None else len(parts), n=n, b_n=b_n, num_warps=min(max(b_n // 512, 1), 8),
            **dependent(x.device),
        )  # fmt: skip
    return out
