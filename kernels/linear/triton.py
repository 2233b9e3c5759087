"""``x weight^T`` on GPUs, weights float or int8 with a scale an output; sums are float32.

    x [M, K]        float32 or bfloat16
    weight [N, K]   of x's dtype, or int8 as `linear.quantize` makes it: its values are exact in bfloat16
    scales [N]      float32, where the weight is int8
    out [P, M, N]   float32 or bfloat16: the sums over P parts of K, which the next kernel adds up; P = 1 is the product

`gated_linear` has a weight [2 n, K], the gate's outputs first, and out [M, n] = silu(gate) up: SwiGLU at no cost.

Every sum goes through K in one order (`linear.tiles`), so a row's bits do not depend on the number of rows: what a
library's product cannot promise. Decode is bound by reading the weight: N K bytes, half of bfloat16's where it is int8.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.linear.tiles import Phase, Tiles, architecture, part
from lattice_serve.kernels.pointwise.triton import silu
from lattice_serve.kernels.triton.dependent_launch import after_last, dependent


@triton.jit(do_not_specialize=["M"])
def _linear(
    p_x: tl.tensor, p_weight: tl.tensor, p_scales: tl.tensor, p_out: tl.tensor, M: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, part: tl.constexpr, scaled: tl.constexpr, kind: tl.constexpr,
    b_m: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    i_part = tl.program_id(2)
    o_m = tl.program_id(0).to(tl.int64) * b_m + tl.arange(0, b_m)
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    o_k = i_part * part + tl.arange(0, b_k)
    in_m, in_n = o_m < M, o_n < N
    after_last(early)
    p_x += o_m[:, None] * K + o_k[None, :]
    p_weight += o_n.to(tl.int64)[None, :] * K + o_k[:, None]
    sums = tl.zeros((b_m, b_n), dtype=tl.float32)
    for i_k in range(part // b_k):
        in_k = o_k + i_k * b_k < K
        x = tl.load(p_x + i_k * b_k, mask=in_m[:, None] & in_k[None, :], other=0.0)
        weight = tl.load(p_weight + i_k * b_k, mask=in_n[None, :] & in_k[:, None], other=0)
        sums = tl.dot(x.to(kind), weight.to(kind), sums, input_precision="ieee")
    if scaled:
        sums *= tl.load(p_scales + o_n, mask=in_n, other=0.0)[None, :]
    p_out += (o_m + i_part * M)[:, None] * N + o_n[None, :]
    tl.store(p_out, sums, mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["M"])
def _gated_linear(
    p_x: tl.tensor, p_weight: tl.tensor, p_scales: tl.tensor, p_out: tl.tensor, M: tl.tensor,
    n: tl.constexpr, K: tl.constexpr, part: tl.constexpr, scaled: tl.constexpr, kind: tl.constexpr,
    b_m: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * b_m + tl.arange(0, b_m)
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    o_k = tl.arange(0, b_k)
    in_m, in_n = o_m < M, o_n < n
    after_last(early)
    p_x += o_m[:, None] * K + o_k[None, :]
    p_gate = p_weight + o_n.to(tl.int64)[None, :] * K + o_k[:, None]
    p_up = p_gate + n * K
    gate, up = tl.zeros((b_m, b_n), dtype=tl.float32), tl.zeros((b_m, b_n), dtype=tl.float32)
    for i_k in range(part // b_k):
        in_k = o_k + i_k * b_k < K
        mask = in_n[None, :] & in_k[:, None]
        x = tl.load(p_x + i_k * b_k, mask=in_m[:, None] & in_k[None, :], other=0.0).to(kind)
        gate = tl.dot(x, tl.load(p_gate + i_k * b_k, mask=mask, other=0).to(kind), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(p_up + i_k * b_k, mask=mask, other=0).to(kind), up, input_precision="ieee")
    if scaled:
        gate *= tl.load(p_scales + o_n, mask=in_n, other=0.0)[None, :]
        up *= tl.load(p_scales + n + o_n, mask=in_n, other=0.0)[None, :]
    p_out += o_m[:, None] * n + o_n[None, :]
    tl.store(p_out, silu(gate) * up, mask=in_m[:, None] & in_n[None, :])


def parts(device: torch.device, phase: Phase, weight: Tensor, itemsize: int) -> int:
    """P for a product whose sum is left to the next kernel, of activations of so many bytes."""
    return architecture(device).splits(phase, weight.shape[0], weight.shape[1], itemsize)


def linear_options(tiles: Tiles, K: int, P: int, itemsize: int) -> dict[str, Any]:
    """Constants that both kernels are launched with, but for the shape and the dtypes."""
    return {
        "K": K, "part": part(K, P, itemsize), "b_m": tiles.b_m, "b_n": tiles.b_n, "b_k": tiles.k_bytes // itemsize,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip


def linear(x: Tensor, weight: Tensor, scales: Tensor | None, phase: Phase, out: Tensor) -> Tensor:
    """The product of x [M, K] and weight [N, K], in the tiles of `phase`, into `out` [P, M, N], which is returned.

    Raises ValueError, naming what does not fit.
    """
    (M, K), N, P = x.shape, weight.shape[0], out.shape[0]
    _check(x, weight, scales, out, (N, K), (P, M, N))
    if M:
        tiles, options = _plan(x.device, x.dtype, M, N, K, scales is not None, phase, P)
        _linear[(-(-M // tiles.b_m), -(-N // tiles.b_n), P)](
            x, weight, x if scales is None else scales, out, M, N=N, **options, **dependent(x.device)
        )
    return out


def gated_linear(x: Tensor, weight: Tensor, scales: Tensor | None, phase: Phase, out: Tensor) -> Tensor:
    """``silu(gate) up`` of x [M, K] and weight [2 n, K], the gate first, into `out` [M, n], which is returned.

    Raises ValueError, naming what does not fit.
    """
    (M, K), n = x.shape, weight.shape[0] // 2
    _check(x, weight, scales, out, (2 * n, K), (M, n))
    if M:
        tiles, options = _plan(x.device, x.dtype, M, 2 * n, K, scales is not None, phase, 1)
        _gated_linear[(-(-M // tiles.b_m), -(-n // tiles.b_n))](
            x, weight, x if scales is None else scales, out, M, n=n, **options, **dependent(x.device)
        )
    return out


@lru_cache(1 << 12)
def _plan(
    device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, scaled: bool, phase: Phase, P: int
) -> tuple[Tiles, dict[str, Any]]:
    """Tiles and constants for activations [M, K] and a weight [N, K]."""
    tiles = architecture(device).tiles(phase, M, N, dtype.itemsize)
    # Triton's interpreter takes the bits of a bfloat16 for an integer when it multiplies.
    kind = tl.float32 if device.type == "cpu" or dtype == torch.float32 else tl.bfloat16
    return tiles, linear_options(tiles, K, P, dtype.itemsize) | {"scaled": scaled, "kind": kind}


def _check(
    x: Tensor, weight: Tensor, scales: Tensor | None, out: Tensor, of_weight: tuple[int, int], of_out: tuple[int, ...]
) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16) or out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x and out must be float32 or bfloat16, not {x.dtype} and {out.dtype}")
    if weight.dtype != (x.dtype if scales is None else torch.int8):
        raise ValueError(f"weight is {weight.dtype}: give x's dtype, {x.dtype}, or int8 with its scales")
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weight": (weight, of_weight), "out": (out, of_out), "x": (x, tuple(x.shape))
    }  # fmt: skip
    if scales is not None:
        shapes["scales"] = (scales, of_weight[:1])
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(f"{name} must be contiguous {[*shape]} on {x.device}, not {[*tensor.shape]}")
