"""What the mixer's Triton kernels share: small functions of a tile, and the check of a launcher's arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.shape import L2_EPS, MixerWeights
from lattice_serve.kernels.mixers.lattice.state import OBJECTIVES
from lattice_serve.kernels.pointwise.triton import sigmoid

DECODING = tl.constexpr(OBJECTIVES.index("decoding"))
ENCODING = tl.constexpr(OBJECTIVES.index("encoding"))
INDICES = ["p_rows", "p_positions", "p_starts", "p_firsts", "p_chunks"]
"""Arguments that lie behind one another: where depends on their number, which must not compile a kernel anew."""
_L2_EPS = tl.constexpr(L2_EPS)


@triton.jit
def load(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """In float32, 0 outside of the mask."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_anchor(p_A: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """A^T [m, d] in float32. Rounded to bfloat16 a column has not quite norm 1, which the recurrence builds on."""
    A = load(p_A, inside)
    if p_A.dtype.element_ty == tl.bfloat16:
        A = unit_rows(A)
    return A


@triton.jit
def unit_rows(R: tl.tensor) -> tl.tensor:
    """Rows of R [m, d] to norm 1; a row of zeros, which only fills a tile, stays one."""
    square = tl.sum(R * R, axis=1)
    return R * tl.rsqrt(tl.where(square > 0, square, 1.0))[:, None]


@triton.jit
def step_size(p_z: tl.tensor, p_bias: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """gamma of tokens."""
    return sigmoid(load(p_z, mask) + tl.load(p_bias).to(tl.float32))


@triton.jit
def forget_gate(p_z: tl.tensor, p_bias: tl.tensor, mask: tl.tensor, floor: tl.tensor) -> tl.tensor:
    """mu of tokens."""
    return floor + (1 - floor) * sigmoid(load(p_z, mask) + tl.load(p_bias).to(tl.float32))


@triton.jit
def unit_length(x: tl.tensor) -> tl.tensor:
    """Tokens' q or k [b_t, m] to length 1."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1) + _L2_EPS)[:, None]


@triton.jit
def _add_each(x: tl.tensor, y: tl.tensor, more_x: tl.tensor, more_y: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    return x + more_x, y + more_y


@triton.jit
def unit_lengths(q: tl.tensor, k: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """One token's q and k [m] to length 1, by one sum."""
    qq, kk = tl.reduce((q * q, k * k), 0, _add_each)
    return q * tl.rsqrt(qq + _L2_EPS), k * tl.rsqrt(kk + _L2_EPS)


@triton.jit
def _keep_inputs(
    p_z: tl.tensor, z_stride: tl.tensor, i_t: tl.tensor, own: tl.tensor, p_line: tl.tensor, o_n: tl.tensor,
    in_n: tl.tensor,
) -> None:  # fmt: skip
    mask = own[:, None] & in_n[None, :]
    x = load(p_z + i_t[:, None] * z_stride + o_n[None, :], mask)
    tl.store(p_line[:, None] + o_n[None, :], x, mask=mask)


@triton.jit
def keep_tail(
    p_z: tl.tensor, z_stride: tl.tensor, i_head: tl.tensor, start: tl.tensor, end: tl.tensor, position: tl.tensor,
    p_tail: tl.tensor, o_d: tl.tensor, o_m: tl.tensor, H: tl.constexpr, d: tl.constexpr, m: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, taps: tl.constexpr,
) -> None:  # fmt: skip
    """The convolution's last inputs of tokens `start` to `end`, the first of which is at `position`, into its tail."""
    if taps > 1:
        line: tl.constexpr = 2 * line_m + line_d
        o_tap = tl.arange(0, triton.next_power_of_2(taps))
        i_t = end - (taps - 1) + o_tap
        own = (o_tap < taps - 1) & (i_t >= start)
        i_line = tl.where(own, (position + i_t - start) % max(taps - 1, 1), 0)
        p_line, in_d, in_m = p_tail + i_line * line, o_d < d, o_m < m
        _keep_inputs(p_z + i_head * m, z_stride, i_t, own, p_line, o_m, in_m)
        _keep_inputs(p_z + (H + i_head) * m, z_stride, i_t, own, p_line + line_m, o_m, in_m)
        _keep_inputs(p_z + 2 * H * m + i_head * d, z_stride, i_t, own, p_line + 2 * line_m, o_d, in_d)


def tile_width(n: int) -> int:
    """Of a tile that holds n values or slots: no product of tensor cores takes less than 16."""
    return max(16, triton.next_power_of_2(n))


def geometry(layout: StateLayout) -> dict[str, Any]:
    """The kernels' constants: a layer's shape, and the lines and places of a head's block as in `StateLayout`."""
    s = layout.shape
    return {
        "H": s.H, "d": s.d, "m": s.m, "C": s.C, "taps": s.taps, "line_d": layout.d, "line_m": layout.m,
        "places": layout.offsets, "head_size": layout.head_size, "objective": OBJECTIVES.index(s.objective),
        "use_forget_gate": s.use_forget_gate, "b_d": tile_width(s.d), "b_m": tile_width(s.m),
    }  # fmt: skip


def check_arguments(
    z: Tensor, pool: Tensor, layer: int, weights: MixerWeights, layout: StateLayout, out: Tensor, **indices: Tensor
) -> None:
    """Raises ValueError, naming it, unless a launcher's arguments fit each other; `indices` are int64 [..]."""
    s, N = layout.shape, z.shape[0]
    kinds = (torch.float32, torch.bfloat16)
    if not 0 <= layer < layout.layers:
        raise ValueError(f"layer is {layer}: the layout has {layout.layers} layers")
    if pool.dtype not in kinds or pool.ndim != 2 or pool.shape[1] != layout.row_size or not pool.is_contiguous():
        raise ValueError(
            f"pool must be contiguous float32 or bfloat16 [rows, {layout.row_size}], not {pool.dtype} {[*pool.shape]}"
        )
    if pool.data_ptr() % 16:
        raise ValueError("pool must start at a multiple of 16 bytes")
    for name, x, width in (("z", z, s.in_width), ("out", out, s.out_width)):
        if x.dtype not in kinds or x.dtype != z.dtype or x.shape != (N, width) or x.stride(1) != 1:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, kinds))} [{N}, {width}] with one stride of 1 and of z's dtype, "
                f"not {x.dtype} {[*x.shape]} of strides {x.stride()}"
            )
    shapes = {"conv": (s.conv_width, s.taps), "gate_bias": (2 * s.H,), "norm": (s.d,)}
    for name, shape in shapes.items():
        weight: Tensor = getattr(weights, name)
        in_order = weight.mT if name == "conv" else weight
        if weight.shape != shape or not in_order.is_contiguous():
            raise ValueError(
                f"weights.{name} must be contiguous {[*shape]}, conv as `by_taps` has it, not {[*weight.shape]} of "
                f"strides {weight.stride()}"
            )
    for name, index in indices.items():
        if index.dtype != torch.int64 or index.ndim != 1 or not index.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 [..], not {index.dtype} {[*index.shape]}")
    tensors = {"pool": pool, "out": out, "weights.conv": weights.conv, **indices}
    for name, x in tensors.items():
        if x.device != z.device:
            raise ValueError(f"{name} is on {x.device}, z on {z.device}")
