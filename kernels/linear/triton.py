"""``x weight^T`` on GPUs, weights float or int8 with a scale an output; sums are float32.

    x [M, K]        float32 or bfloat16
    weight [N, K]   of x's dtype, or int8 as `linear.quantize` makes it: its values are exact in bfloat16
    scales [N]      float32, where the weight is int8
    out [P, M, N]   float32 or bfloat16: the sums over P parts of K, which the next kernel adds up; P = 1 is the product

Every sum goes through K in one order, that of the phase's tiles (`linear.tiles`), so a row's bits do not depend on
the number of rows: what a library's product cannot promise. Decode is bound by reading the weight: N K bytes, half of
bfloat16's where it is int8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.linear.tiles import Phase, architecture


@triton.jit(do_not_specialize=["M"])
def _linear(
    p_x: tl.tensor, p_weight: tl.tensor, p_scales: tl.tensor, p_out: tl.tensor, M: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, steps: tl.constexpr, scaled: tl.constexpr, kind: tl.constexpr,
    b_m: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr,
) -> None:  # fmt: skip
    i_part = tl.program_id(2)
    o_m = tl.program_id(0).to(tl.int64) * b_m + tl.arange(0, b_m)
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    o_k = i_part * steps * b_k + tl.arange(0, b_k)
    in_m, in_n = o_m < M, o_n < N
    p_x += o_m[:, None] * K + o_k[None, :]
    p_weight += o_n.to(tl.int64)[None, :] * K + o_k[:, None]
    sums = tl.zeros((b_m, b_n), dtype=tl.float32)
    for i_k in range(steps):
        in_k = o_k + i_k * b_k < K
        x = tl.load(p_x + i_k * b_k, mask=in_m[:, None] & in_k[None, :], other=0.0)
        weight = tl.load(p_weight + i_k * b_k, mask=in_n[None, :] & in_k[:, None], other=0)
        sums = tl.dot(x.to(kind), weight.to(kind), sums, input_precision="ieee")
    if scaled:
        sums *= tl.load(p_scales + o_n, mask=in_n, other=0.0)[None, :]
    p_out += (o_m + i_part * M)[:, None] * N + o_n[None, :]
    tl.store(p_out, sums, mask=in_m[:, None] & in_n[None, :])


def parts(device: torch.device, phase: Phase, weight: Tensor, itemsize: int) -> int:
    """P for a product whose sum is left to the next kernel, of activations of so many bytes."""
    return architecture(device).splits(phase, weight.shape[0], weight.shape[1], itemsize)


def linear(x: Tensor, weight: Tensor, scales: Tensor | None, phase: Phase, out: Tensor) -> Tensor:
    """The product of x [M, K] and weight [N, K], in the tiles of `phase`, into `out` [P, M, N], which is returned.

    Raises ValueError, naming what does not fit.
    """
    (M, K), N = x.shape, len(weight)
    if x.dtype not in (torch.float32, torch.bfloat16) or out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x and out must be float32 or bfloat16, not {x.dtype} and {out.dtype}")
    if weight.dtype != (x.dtype if scales is None else torch.int8):
        raise ValueError(f"weight is {weight.dtype}: give x's dtype, {x.dtype}, or int8 with its scales")
    shapes = {"weight": (weight, (N, K)), "out": (out, (out.shape[0], M, N)), "x": (x, (M, K))}
    if scales is not None:
        shapes["scales"] = (scales, (N,))
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(f"{name} must be contiguous {[*shape]} on {x.device}, not {[*tensor.shape]}")
    if M:
        tiles = architecture(x.device).tiles(phase)
        b_k = tiles.k_bytes // x.element_size()
        P = len(out)
        # Triton's interpreter takes the bits of a bfloat16 for an integer when it multiplies.
        kind = tl.float32 if x.device.type == "cpu" or x.dtype == torch.float32 else tl.bfloat16
        _linear[(triton.cdiv(M, tiles.b_m), triton.cdiv(N, tiles.b_n), P)](
            x, weight, x if scales is None else scales, out, M,
            N=N, K=K, steps=triton.cdiv(triton.cdiv(K, b_k), P), scaled=scales is not None, kind=kind,
            b_m=tiles.b_m, b_n=tiles.b_n, b_k=b_k, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out
