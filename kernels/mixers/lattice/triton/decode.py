"""One token of many sequences through a layer's mixer, in one launch; reference: `mix`, one token a row.

One program has one head of one row: convolution, SiLU, unit q and k, gates, recurrence in the pending-factor form of
`cpu.recurrence` (equations there), read-out, output norm and gate. The anchor is loaded once and stays in registers for
h = v - A k, w = A^T h and y; it is written at a chunk's last token only.

    z [N, in_width], out [N, out_width]    float32 or bfloat16, columns as `MixerShape` has them
    pool [rows, row_size]                  float32 or bfloat16, as `StateLayout` has it
    rows, positions [N]                    int64 on the device; a row of -1 is none: its output is zeros

Values are [1, d] and tiles of them [1, n, d]: of [n, d] Triton 3.7 makes a kernel of a quarter more registers. Sums are
float32. What bounds it is memory: the anchor, and half of the pending factors on average, for about 6 m d +
4 (C - 1) (m + d) FLOPs, 1.5 for each byte of a float32 anchor (counted in `benchmarks/roofline.py`). So a program asks
for all that it needs before it waits for any of it. What takes time after that is latency, of barriers between warps
above all: sums share them where they can, and a thread adds up what it has first.
Splitting a head over programs would need sums across them (w and the norms run over d), so a batch of few rows leaves
multiprocessors idle: its step takes the time of one program, which is latency.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.shape import MixerWeights
from lattice_serve.kernels.mixers.lattice.triton.common import (
    DECODING,
    ENCODING,
    INDICES,
    check_arguments,
    forget_gate,
    geometry,
    load,
    step_size,
    unit_lengths,
)
from lattice_serve.kernels.pointwise.triton import silu
from lattice_serve.kernels.triton.dependent_launch import after_last, dependent


@triton.jit
def _inputs_before(
    p_tail: tl.tensor, o_n: tl.tensor, mask: tl.tensor, ring: tl.tensor, line: tl.constexpr, taps: tl.constexpr
) -> tl.tuple:
    """What the convolution of channels o_n takes of tokens before; this one's belongs into line `ring` of the tail."""
    x = tl.tuple(())
    for i_tap in tl.static_range(taps - 1):
        i_line = ring + i_tap
        i_line = tl.where(i_line < taps - 1, i_line, i_line - (taps - 1))
        x += tl.tuple((load(p_tail + i_line * line + o_n, mask),))
    return x


@triton.jit
def _convolve(
    before: tl.tuple, x: tl.tensor, p_conv: tl.tensor, o_n: tl.tensor, mask: tl.tensor,
    taps: tl.constexpr, width: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """SiLU of the convolution of channels o_n."""
    y = x * load(p_conv + (taps - 1) * width + o_n, mask)
    for i_tap in tl.static_range(taps - 1):
        y += before[i_tap] * load(p_conv + i_tap * width + o_n, mask)
    return silu(y)


@triton.jit
def _over_d(x: tl.tensor) -> tl.tensor:
    """Sums over d of a tile [1, n, d]."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def _square(x: tl.tensor) -> tl.tensor:
    """|x|^2 [1] of values [1, d], summed as tiles are, where a warp has all of them."""
    return _over_d(x[:, None, :] * x[:, None, :])


@triton.jit
def _within(x: tl.tensor, b_l: tl.constexpr) -> tl.tensor:
    """Of a tile [1, n, d], sums over those of n that one thread has: every b_l-th."""
    return tl.sum(tl.reshape(x, (1, x.shape[1] // b_l, b_l, x.shape[2])), axis=1)


@triton.jit
def _unit(R: tl.tensor) -> tl.tensor:
    """Slots of R [1, m, d] to norm 1; one of zeros, which only fills a tile, stays one."""
    square = _over_d(R * R)
    return R * tl.rsqrt(tl.where(square > 0, square, 1.0))[None, :, None]


@triton.jit(do_not_specialize_on_alignment=INDICES)
def _mix_token(
    p_z: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_positions: tl.tensor, p_conv: tl.tensor,
    p_bias: tl.tensor, p_norm: tl.tensor, p_out: tl.tensor,
    z_stride: tl.tensor, out_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, floor: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, C: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    objective: tl.constexpr, use_forget_gate: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_s: tl.constexpr,
    b_l: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, position = tl.load(p_rows + i_token), tl.load(p_positions + i_token)
    o_d = tl.arange(0, b_d)[None, :]
    o_m, o_s = tl.arange(0, b_m), tl.arange(0, b_s)
    in_d, in_m = o_d < d, o_m < m
    p_y = p_out + i_token * out_stride + i_head * d + o_d
    if (i_row < 0) | (position < 0):  # a position never is: so both are waited for at once
        after_last(early)
        tl.store(p_y, tl.zeros((1, b_d), tl.float32), mask=in_d)
        return
    slot = (position % C).to(tl.int32)
    p_state = p_pool + i_row * row_size + o_layer + i_head * head_size
    p_now = p_z + i_token * z_stride
    o_A, in_A = o_m[None, :, None] * line_d + o_d[:, None, :], in_m[None, :, None] & in_d[:, None, :]
    A = load(p_state + o_A, in_A)
    if C > 1:
        p_h, p_c = p_state + places[1], p_state + places[2]
        p_b, p_e, p_a = p_state + places[3], p_state + places[4], p_state + places[5]
        used, pending = o_s < slot, slot > 0
        h_old = load(p_h + o_s[None, :, None] * line_d + o_d[:, None, :], used[None, :, None] & in_d[:, None, :])
        c_old = load(p_c + o_s[:, None] * line_m + o_m[None, :], used[:, None] & in_m[None, :])
        b_old, e_old = load(p_b + o_m, in_m & pending), load(p_e + o_m, in_m & pending)
        a_old = tl.load(p_a, mask=pending, other=1.0).to(tl.float32)

    line: tl.constexpr = 2 * line_m + line_d
    width: tl.constexpr = H * (2 * m + d)
    p_tail = p_state + places[6]
    ring = (position % max(taps - 1, 1)).to(tl.int32)
    o_q, o_k, o_v = i_head * m, (H + i_head) * m, 2 * H * m + i_head * d
    before_q = _inputs_before(p_tail, o_m, in_m, ring, line, taps)
    before_k = _inputs_before(p_tail + line_m, o_m, in_m, ring, line, taps)
    before_v = _inputs_before(p_tail + 2 * line_m, o_d, in_d, ring, line, taps)
    after_last(early)
    x_q, x_k, x_v = load(p_now + o_q + o_m, in_m), load(p_now + o_k + o_m, in_m), load(p_now + o_v + o_d, in_d)
    p_gates = p_now + 2 * H * (m + d) + i_head
    gamma = step_size(p_gates, p_bias + i_head, True)
    a = 1.0
    if use_forget_gate:
        a = forget_gate(p_gates + H, p_bias + H + i_head, True, floor)
    gate, norm = load(p_now + H * (2 * m + d) + i_head * d + o_d, in_d), load(p_norm + o_d, in_d)
    # No load moves behind it; and all warps have read what one replaces below, of which every one may hold a copy.
    tl.debug_barrier()

    if p_pool.dtype.element_ty == tl.bfloat16:
        # Rounded, a slot has not quite norm 1, which the recurrence builds on.
        A = _unit(A)
    q = _convolve(before_q, x_q, p_conv + o_q, o_m, in_m, taps, width)
    k = _convolve(before_k, x_k, p_conv + o_k, o_m, in_m, taps, width)
    h = _convolve(before_v, x_v, p_conv + o_v, o_d, in_d, taps, width)
    if taps > 1:
        p_line = p_tail + ring * line
        tl.store(p_line + o_m, x_q, mask=in_m)
        tl.store(p_line + line_m + o_m, x_k, mask=in_m)
        tl.store(p_line + 2 * line_m + o_d, x_v, mask=in_d)
    q, k = unit_lengths(q, k)
    if C > 1:
        a *= a_old
    gamma /= a

    if objective == DECODING:
        h -= tl.sum(A * k[None, :, None], axis=1)
    if C > 1:
        sums = tl.sum(c_old * _over_d(h_old * h[:, None, :])[:, None], axis=0)
    w = _over_d(A * h[:, None, :])
    c = gamma * (k - w) if objective == ENCODING else gamma * k
    b = c * w
    e = c * c * (_square(h) - w * w)
    if C > 1:
        e += e_old + 2 * c * (sums - w * b_old)
        b += b_old
    e = tl.maximum(e, 0.0)
    qn = q * tl.rsqrt(1 + e)
    x = A * (qn * (1 - b))[None, :, None]
    if C > 1:
        x = _within(x, b_l) + _within(h_old * tl.sum(c_old * qn[None, :], axis=1)[None, :, None], b_l)
    y = tl.sum(x, axis=1) + tl.sum(c * qn, axis=0) * h
    y *= tl.rsqrt(_square(y) / d + eps)[None, :] * norm * silu(gate)
    tl.store(p_y, y, mask=in_d)

    if C == 1:
        R = A * (1 - b)[None, :, None] + c[None, :, None] * h[:, None, :]
        tl.store(p_state + o_A, _unit(R), mask=in_A)
    elif slot == C - 1:
        R = A * (1 - b)[None, :, None] + c[None, :, None] * h[:, None, :]
        few: tl.constexpr = b_s if b_s < 8 else 8
        for i_first in range(0, C - 1, few):
            c_few, h_few = tl.tuple(()), tl.tuple(())
            for i_s in tl.static_range(few):
                there = i_first + i_s < C - 1
                c_few += tl.tuple((load(p_c + (i_first + i_s) * line_m + o_m, in_m & there),))
                h_few += tl.tuple((load(p_h + (i_first + i_s) * line_d + o_d, in_d & there),))
            for i_s in tl.static_range(few):
                R += c_few[i_s][None, :, None] * h_few[i_s][:, None, :]
        tl.store(p_state + o_A, _unit(R), mask=in_A)
    else:
        tl.store(p_h + slot * line_d + o_d, h, mask=in_d)
        tl.store(p_c + slot * line_m + o_m, c, mask=in_m)
        tl.store(p_b + o_m, b, mask=in_m)
        tl.store(p_e + o_m, e, mask=in_m)
        tl.store(p_a, a)


@cache
def decode_options(layout: StateLayout) -> dict[str, Any]:
    """Constants that `_mix_token` is launched with."""
    s = layout.shape
    constants = geometry(layout) | {"b_s": triton.next_power_of_2(s.C)}
    # As few warps as have the registers for it: what takes time is sums across them.
    num_warps = 1 if s.d * s.m <= 32 * 32 else 2 if s.d * s.m <= 64 * 64 else 4
    # A warp loads 128 values, of one line or more: so many slots, or tokens, are in different threads.
    b_l = min(constants["b_s"], triton.cdiv(128, constants["b_d"]) * num_warps)
    return constants | {"b_l": b_l, "num_warps": num_warps}


def mix_decode(
    z: Tensor,
    pool: Tensor,
    layer: int,
    rows: Tensor,
    positions: Tensor,
    weights: MixerWeights,
    layout: StateLayout,
    out: Tensor,
    *,
    ahead: bool = False,
) -> Tensor:
    """Run token i, z [N, in_width] row i, through layer `layer` at state row rows[i] of `pool`, which is updated.

    positions [N]: tokens that each sequence has seen before, which are left as they are. No two rows may be equal, but
    those of -1, whose rows of `out` [N, out_width] become zeros. H, in the layout, may be a share of the model's.
    Every tensor stays where it is, so a CUDA graph may hold the launch. ahead: the launch before this one writes
    nothing but z, so that the rest may be read before it ends. Raises ValueError, naming what does not fit.
    """
    check_arguments(z, pool, layer, weights, layout, out, rows=rows, positions=positions)
    s, N = layout.shape, len(z)
    for name, index in (("rows", rows), ("positions", positions)):
        if len(index) != N:
            raise ValueError(f"{name} has {len(index)} entries, z {N} tokens")
    if N:
        _mix_token[(N, s.H)](
            z, pool, rows, positions, weights.conv, weights.gate_bias, weights.norm, out,
            z.stride(0), out.stride(0), layout.row_size, layer * layout.layer_size, s.mu_floor, s.norm_eps,
            **decode_options(layout),
            **(dependent(z.device) if ahead else {"early": False}),
        )  # fmt: skip
    return out
