"""Segments of many tokens through a layer's mixer, in two launches; reference: `mixer.reference`, segment by segment.

First the convolution, SiLU and unit q and k of all tokens at once, into float32 scratch; then one program a segment and
head goes through the tokens with the anchor in registers: by the chunk form of `kernels.lattice.chunk` (equations
there) with products on tensor cores, or for C = 1 token by token with sums. A tile's row is a token's place in a chunk,
so a segment may start and end anywhere in one: rows before it are the pending factors from the state, rows past
it have c = 0 and mu = 1, which changes nothing.

    z [T, in_width], out [T, out_width]    float32 or bfloat16, columns as `MixerShape` has them
    pool [rows, row_size]                  float32 or bfloat16, as `StateLayout` has it
    rows, positions [n], starts [n + 1]    int64 on the device, as `Segments` has them

What bounds it: chunks of a head follow one another, as each takes the memory that the one before it left: time is the
chunks of the longest segment times the latency of one, until n H programs fill the device; then FLOPs. A chunk of
b_t = max(16, C) rows takes 8 b_t m d + 2 b_t^2 (2 d + 4 m) of them on tensor cores (half of b_t^2 is zeros: the decay
is triangular), for C < 16 with 16 rows all the same: a tensor core has no smaller product. Neither d nor m can be split
over programs without sums across them in every chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.segments import DeviceSegments
from lattice_serve.kernels.mixer.shape import MixerWeights
from lattice_serve.kernels.mixer.triton_parts import (
    DECODING,
    ENCODING,
    check_arguments,
    forget_gate,
    geometry,
    load,
    load_anchor,
    shift_tail,
    silu,
    step_size,
    unit_length,
    unit_rows,
)

PRECISIONS = ("ieee", "tf32", "tf32x3")
_TOKENS = 16


@triton.jit
def _convolve(
    p_z: tl.tensor, z_stride: tl.tensor, o_t: tl.tensor, first: tl.tensor, end: tl.tensor, p_tail: tl.tensor,
    p_conv: tl.tensor, o_n: tl.tensor, mask: tl.tensor,
    line: tl.constexpr, taps: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """SiLU of the convolution [b_t, n] at tokens o_t of segments that start at `first`, with tails p_tail [b_t]."""
    x = tl.zeros((o_t.shape[0], o_n.shape[0]), tl.float32)
    inside = (o_t < end)[:, None] & mask[None, :]
    for i_tap in tl.static_range(taps):
        i_t = o_t - (taps - 1) + i_tap
        own = (i_t >= first)[:, None]
        now = load(p_z + i_t[:, None] * z_stride + o_n[None, :], inside & own)
        # the tail's last line is the token before the segment
        before = load(p_tail[:, None] + (i_t - first + taps - 1)[:, None] * line + o_n[None, :], inside & (own == 0))
        x += (now + before) * load(p_conv + o_n * taps + i_tap, mask)[None, :]
    return silu(x)


@triton.jit
def _convolve_tokens(
    p_z: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_starts: tl.tensor, p_conv: tl.tensor, p_u: tl.tensor,
    z_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, T: tl.tensor, n: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, taps: tl.constexpr, line_d: tl.constexpr, line_m: tl.constexpr,
    o_tail: tl.constexpr, head_size: tl.constexpr, b_t: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr,
) -> None:  # fmt: skip
    """q | k | v of b_t tokens of one head, as the recurrence takes them, into p_u [T, conv_width] float32."""
    i_head = tl.program_id(1)
    o_t = tl.program_id(0).to(tl.int64) * b_t + tl.arange(0, b_t)
    o_d, o_m = tl.arange(0, b_d), tl.arange(0, b_m)
    in_t, in_d, in_m = o_t < T, o_d < d, o_m < m
    segment = tl.zeros((b_t,), tl.int32)
    for i_segment in range(1, n):
        segment += (tl.load(p_starts + i_segment) <= o_t).to(tl.int32)
    first = tl.load(p_starts + segment)
    p_tail = p_pool + tl.load(p_rows + segment) * row_size + o_layer + i_head * head_size + o_tail
    o_q, o_k, o_v = i_head * m, (H + i_head) * m, 2 * H * m + i_head * d
    line: tl.constexpr = 2 * line_m + line_d
    q = _convolve(p_z + o_q, z_stride, o_t, first, T, p_tail, p_conv + o_q * taps, o_m, in_m, line, taps)
    k = _convolve(p_z + o_k, z_stride, o_t, first, T, p_tail + line_m, p_conv + o_k * taps, o_m, in_m, line, taps)
    v = _convolve(p_z + o_v, z_stride, o_t, first, T, p_tail + 2 * line_m, p_conv + o_v * taps, o_d, in_d, line, taps)
    p_u += o_t[:, None] * (H * (2 * m + d))
    tl.store(p_u + o_q + o_m[None, :], unit_length(q, 1), mask=in_t[:, None] & in_m[None, :])
    tl.store(p_u + o_k + o_m[None, :], unit_length(k, 1), mask=in_t[:, None] & in_m[None, :])
    tl.store(p_u + o_v + o_d[None, :], v, mask=in_t[:, None] & in_d[None, :])


@triton.jit
def _mix_chunks(
    p_z: tl.tensor, p_u: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_positions: tl.tensor,
    p_starts: tl.tensor, p_bias: tl.tensor, p_norm: tl.tensor, p_out: tl.tensor,
    z_stride: tl.tensor, out_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, floor: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, C: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    objective: tl.constexpr, use_forget_gate: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr,
    precision: tl.constexpr,
) -> None:  # fmt: skip
    """One segment of one head, C > 1."""
    i_segment, i_head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(p_starts + i_segment), tl.load(p_starts + i_segment + 1)
    pending = (tl.load(p_positions + i_segment) % C).to(tl.int32)
    p_state = p_pool + tl.load(p_rows + i_segment) * row_size + o_layer + i_head * head_size
    o_d, o_m, o_t = tl.arange(0, b_d), tl.arange(0, b_m), tl.arange(0, b_t)
    in_d, in_m = o_d < d, o_m < m
    o_A, in_A = o_m[:, None] * line_d + o_d[None, :], in_m[:, None] & in_d[None, :]
    p_h = p_state + places[1] + o_t[:, None] * line_d + o_d[None, :]
    p_c = p_state + places[2] + o_t[:, None] * line_m + o_m[None, :]
    p_b, p_e, p_a = p_state + places[3], p_state + places[4], p_state + places[5]
    width: tl.constexpr = H * (2 * m + d)
    p_gates = p_z + width + H * d + i_head
    norm = load(p_norm + o_d, in_d)
    A = load_anchor(p_state + o_A, in_A)
    base = start - pending
    for i_chunk in range(tl.cdiv(pending + (end - start), C)):
        i_t = base + i_chunk * C + o_t.to(tl.int64)
        now = (o_t < C) & (i_t >= start) & (i_t < end)
        old = (o_t < pending) & (i_chunk == 0)
        now_m, now_d = now[:, None] & in_m[None, :], now[:, None] & in_d[None, :]
        p_token = p_u + i_t[:, None] * width
        q = load(p_token + i_head * m + o_m[None, :], now_m)
        k = load(p_token + (H + i_head) * m + o_m[None, :], now_m)
        v = load(p_token + 2 * H * m + i_head * d + o_d[None, :], now_d)
        h_old, c_old = load(p_h, old[:, None] & in_d[None, :]), load(p_c, old[:, None] & in_m[None, :])
        a_old = tl.load(p_a, mask=(pending > 0) & (i_chunk == 0), other=1.0).to(tl.float32)
        gamma = tl.where(now, step_size(p_gates + i_t * z_stride, p_bias + i_head, now), 0.0)
        log_mu = tl.zeros((b_t,), tl.float32)
        if use_forget_gate:
            mu = forget_gate(p_gates + H + i_t * z_stride, p_bias + H + i_head, now, floor)
            log_mu = tl.where(now, tl.log(mu), 0.0)
        log_a = tl.cumsum(log_mu, 0)
        log_end = tl.sum(log_mu, 0)
        below = o_t[:, None] > o_t[None, :]
        # The diagonals of M, 1, are left out of the products and added as they are.
        L = tl.where(below, tl.exp(log_a[:, None] - log_a[None, :]), 0.0)
        a = a_old * tl.exp(log_a)

        h = v + h_old
        if objective == DECODING:
            h -= tl.dot(k, A, input_precision=precision)
        W = tl.dot(h, tl.trans(A), input_precision=precision)
        if objective == ENCODING:
            k = tl.where(now_m, k - W, 0.0)
        c = gamma[:, None] * k + c_old
        cW = c * W
        b_below = tl.dot(L, cW, input_precision=precision)
        b = b_below + cW
        G = tl.dot(h, tl.trans(h), input_precision=precision)
        cross = tl.dot(L * G, c, input_precision=precision) - W * b_below
        u = c * (2 * cross + c * (tl.sum(h * h, axis=1)[:, None] - W * W))
        e = tl.maximum(tl.dot(L * L, u, input_precision=precision) + u, 0.0)
        qn = q * tl.rsqrt((a * a)[:, None] + e)
        y = tl.dot(qn * (a[:, None] - b), A, input_precision=precision)
        weights = tl.where(below, L, (o_t[:, None] == o_t[None, :]).to(tl.float32))
        weights *= tl.dot(qn, tl.trans(c), input_precision=precision)
        y = tl.dot(weights, h, y, input_precision=precision)

        y *= tl.rsqrt(tl.sum(y * y, axis=1) / d + eps)[:, None] * norm[None, :]
        y *= silu(load(p_z + i_t[:, None] * z_stride + width + i_head * d + o_d[None, :], now_d))
        tl.store(p_out + i_t[:, None] * out_stride + i_head * d + o_d[None, :], y, mask=now_d)

        left = tl.exp(log_end - log_a)[:, None]
        b_end = tl.sum(left * cW, axis=0)
        a_end = a_old * tl.exp(log_end)
        c *= left
        used = (end - base) - i_chunk * C
        if used >= C:
            A = unit_rows(tl.dot(tl.trans(c), h, A * (a_end - b_end)[:, None], input_precision=precision))
        else:
            tl.debug_barrier()
            tl.store(p_h, h, mask=(o_t < used)[:, None] & in_d[None, :])
            tl.store(p_c, c, mask=(o_t < used)[:, None] & in_m[None, :])
            tl.store(p_b + o_m, b_end, mask=in_m)
            tl.store(p_e + o_m, tl.sum(tl.where((o_t == b_t - 1)[:, None], e, 0.0), axis=0), mask=in_m)
            tl.store(p_a, a_end)
    if end - base >= C:
        tl.debug_barrier()
        tl.store(p_state + o_A, A, mask=in_A)
    shift_tail(p_z, z_stride, i_head, start, end, p_state + places[6], o_d, o_m, H, d, m, line_d, line_m, taps)


@triton.jit
def _mix_tokens(
    p_z: tl.tensor, p_u: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_starts: tl.tensor, p_bias: tl.tensor,
    p_norm: tl.tensor, p_out: tl.tensor,
    z_stride: tl.tensor, out_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, floor: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, o_tail: tl.constexpr, head_size: tl.constexpr,
    objective: tl.constexpr, use_forget_gate: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr,
) -> None:  # fmt: skip
    """One segment of one head, C = 1: R_t = A (mu - c w) + c h, and y = A' q with A' the columns of R made unit."""
    i_segment, i_head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(p_starts + i_segment), tl.load(p_starts + i_segment + 1)
    p_state = p_pool + tl.load(p_rows + i_segment) * row_size + o_layer + i_head * head_size
    o_d, o_m = tl.arange(0, b_d), tl.arange(0, b_m)
    in_d, in_m = o_d < d, o_m < m
    o_A, in_A = o_m[:, None] * line_d + o_d[None, :], in_m[:, None] & in_d[None, :]
    width: tl.constexpr = H * (2 * m + d)
    norm = load(p_norm + o_d, in_d)
    A = load_anchor(p_state + o_A, in_A)
    for i_t in range(start, end):
        p_token = p_u + i_t * width
        q, k = load(p_token + i_head * m + o_m, in_m), load(p_token + (H + i_head) * m + o_m, in_m)
        h = load(p_token + 2 * H * m + i_head * d + o_d, in_d)
        p_gates = p_z + i_t * z_stride + width + H * d + i_head
        gamma = step_size(p_gates, p_bias + i_head, True)
        mu = 1.0
        if use_forget_gate:
            mu = forget_gate(p_gates + H, p_bias + H + i_head, True, floor)
        if objective == DECODING:
            h -= tl.sum(A * k[:, None], axis=0)
        w = tl.sum(A * h[None, :], axis=1)
        if objective == ENCODING:
            k -= w
        c = gamma * k
        A = unit_rows(A * (mu - c * w)[:, None] + c[:, None] * h[None, :])
        y = tl.sum(A * q[:, None], axis=0)
        y *= tl.rsqrt(tl.sum(y * y, axis=0) / d + eps) * norm
        y *= silu(load(p_z + i_t * z_stride + width + i_head * d + o_d, in_d))
        tl.store(p_out + i_t * out_stride + i_head * d + o_d, y, mask=in_d)
    tl.debug_barrier()
    tl.store(p_state + o_A, A, mask=in_A)
    shift_tail(p_z, z_stride, i_head, start, end, p_state + o_tail, o_d, o_m, H, d, m, line_d, line_m, taps)


def mix_prefill(
    z: Tensor,
    pool: Tensor,
    layer: int,
    segments: DeviceSegments,
    weights: MixerWeights,
    layout: StateLayout,
    out: Tensor,
    *,
    precision: str | None = None,
) -> Tensor:
    """Run the tokens z [T, in_width] of `segments` through layer `layer`; their rows of `pool` are updated.

    H, in the layout, may be a share of the model's. `precision` is that of the products (C > 1): "tf32" rounds to 10
    bits, "tf32x3" is close to float32 by three such products, "ieee" is float32, with tensor cores on AMD only. The
    default is tf32x3 on NVIDIA, ieee on AMD. Returns `out` [T, out_width]. Raises ValueError, naming what does not fit;
    what `segments` hold is on the device and is not looked at.
    """
    precision = precision or ("ieee" if torch.version.hip else "tf32x3")
    rows, positions, starts = segments.rows, segments.positions, segments.starts
    check_arguments(z, pool, layer, weights, layout, out, rows=rows, positions=positions, starts=starts)
    if not len(rows) == len(positions) == len(starts) - 1:
        raise ValueError(f"segments have {len(rows)} rows, {len(positions)} positions and {len(starts)} starts")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: give {', '.join(PRECISIONS)}")
    s, n, T = layout.shape, len(rows), len(z)
    if not n:
        return out
    constants = geometry(layout)
    o_layer = layer * layout.layer_size
    # By what the compilers make of it: registers spill with fewer warps on NVIDIA, with more on AMD.
    num_warps = 4 if torch.version.hip and s.d * s.m <= 64 * 64 else 8
    u = torch.empty((T, s.conv_width), dtype=torch.float32, device=z.device)
    shared = {name: constants[name] for name in ("H", "d", "m", "taps", "line_d", "line_m", "head_size", "b_d", "b_m")}
    o_tail = layout.offsets[-1]
    _convolve_tokens[(triton.cdiv(T, _TOKENS), s.H)](
        z, pool, rows, starts, weights.conv, u, z.stride(0), layout.row_size, o_layer, T, n,
        **shared, o_tail=o_tail, b_t=_TOKENS,
    )  # fmt: skip
    if s.C == 1:
        _mix_tokens[(n, s.H)](
            z, u, pool, rows, starts, weights.gate_bias, weights.norm, out,
            z.stride(0), out.stride(0), layout.row_size, o_layer, s.mu_floor, s.norm_eps,
            **shared, o_tail=o_tail, objective=constants["objective"], use_forget_gate=s.use_forget_gate,
            num_warps=num_warps,
        )  # fmt: skip
    else:
        _mix_chunks[(n, s.H)](
            z, u, pool, rows, positions, starts, weights.gate_bias, weights.norm, out,
            z.stride(0), out.stride(0), layout.row_size, o_layer, s.mu_floor, s.norm_eps,
            **constants, b_t=max(16, triton.next_power_of_2(s.C)), precision=precision, num_warps=num_warps,
        )  # fmt: skip
    return out
