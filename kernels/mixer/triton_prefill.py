"""Segments of many tokens through a layer's mixer, in three launches; reference: `mixer.reference`, segment by segment.

The chunk form of `kernels.lattice.chunk` (equations there), parted by what has to wait. A chunk needs the memory that
the one before it left, but little of its work is on the way from one memory to the next:

    prepare    one program a chunk and head: convolution, SiLU, unit q and k, gates and their products
    advance    one program a segment and head, chunk after chunk with the memory in registers:
               H = V - K A^T,  N = H^T (M[last] * c),  b = diag(A^T N),  R = A (a - b) + N,  A' = R, columns made unit
    read       one program a chunk and head: y of its tokens from the memory before them, output norm and gate

A chunk is a tile of b_t = max(16, C) rows; a segment may start and end anywhere in one: rows before it are the pending
factors from the state, rows past it have c = 0 and mu = 1, which changes nothing. Tiles of segment i begin at tile
``starts[i] // C + 2 i``: room for its chunks, however they lie, without a look at the device. For C = 1 there is no
chunk form; then one program a segment and head goes through the tokens with sums.

    z [T, in_width], out [T, out_width]    float32 or bfloat16, columns as `MixerShape` has them
    pool [rows, row_size]                  float32 or bfloat16, as `StateLayout` has it
    rows, positions [n], starts [n + 1]    int64 on the device, as `Segments` has them

What bounds it: a sequence's chunks follow one another, each by two products that wait for each other, until n H
programs fill the device; then the FLOPs of tensor cores, 2 b_t (4 m d + b_t (2 d + 4 m)) a chunk, and the
4 (m d + b_t (m + d)) bytes that `advance` leaves for `read`. Neither d nor m can be split over programs without sums
across them in every chunk.
"""

from __future__ import annotations

from typing import Any

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
    load,
    load_anchor,
    shift_tail,
    silu,
    step_size,
    unit_length,
    unit_rows,
)
from lattice_serve.kernels.mixer.triton_tiles import tile_lines, tile_options, tile_tokens
from lattice_serve.kernels.mixer.triton_tokens import mix_tokens, token_options

PRECISIONS = ("ieee", "tf32", "tf32x3")


@triton.jit
def _convolve(
    p_z: tl.tensor, z_stride: tl.tensor, i_t: tl.tensor, inside: tl.tensor, start: tl.tensor, p_tail: tl.tensor,
    p_conv: tl.tensor, o_n: tl.tensor, in_n: tl.tensor, line: tl.constexpr, taps: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """SiLU of the convolution [b_t, n] at tokens i_t of a segment that starts at `start`, its tail before it."""
    x = tl.zeros((i_t.shape[0], o_n.shape[0]), tl.float32)
    mask = inside[:, None] & in_n[None, :]
    for i_tap in tl.static_range(taps):
        i_from = i_t - (taps - 1) + i_tap
        own = (i_from >= start)[:, None]
        now = load(p_z + i_from[:, None] * z_stride + o_n[None, :], mask & own)
        # the tail's last line is the token before the segment
        before = load(p_tail + (i_from - start + taps - 1)[:, None] * line + o_n[None, :], mask & (own == 0))
        x += (now + before) * load(p_conv + o_n * taps + i_tap, in_n)[None, :]
    return silu(x)


@triton.jit
def _segment_of(i_tile: tl.tensor, p_starts: tl.tensor, n: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """Of the n segments, the last whose tiles begin at i_tile or before it."""
    low, high = n * 0, n
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(p_starts + middle) // tile + 2 * middle <= i_tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["n"])
def _prepare(
    p_z: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_positions: tl.tensor, p_starts: tl.tensor,
    p_conv: tl.tensor, p_bias: tl.tensor, p_tiles: tl.tensor,
    z_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, floor: tl.tensor, n: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, C: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    use_forget_gate: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr,
    tile_places: tl.constexpr, tile_size: tl.constexpr, rows: tl.constexpr,
) -> None:  # fmt: skip
    """What a tile of one head is before any memory is known, as `tile_places` has it."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_segment = _segment_of(i_tile, p_starts, n, rows)
    start, end = tl.load(p_starts + i_segment), tl.load(p_starts + i_segment + 1)
    pending = (tl.load(p_positions + i_segment) % C).to(tl.int32)
    i_chunk = i_tile - (start // rows + 2 * i_segment)
    if i_chunk * rows >= pending + end - start:
        return
    o_d, o_m, o_t = tl.arange(0, b_d), tl.arange(0, b_m), tl.arange(0, b_t)
    in_d, in_m = o_d < d, o_m < m
    i_t = start - pending + i_chunk * rows + o_t.to(tl.int64)
    now = (o_t < rows) & (i_t >= start) & (i_t < end)
    old = (o_t < pending) & (i_chunk == 0)
    p_state = p_pool + tl.load(p_rows + i_segment) * row_size + o_layer + i_head * head_size
    p_tile = p_tiles + (i_tile * H + i_head).to(tl.int64) * tile_size
    o_tm, o_td = o_t[:, None] * b_m + o_m[None, :], o_t[:, None] + o_d[None, :] * b_t
    o_q, o_k, o_v = i_head * m, (H + i_head) * m, 2 * H * m + i_head * d
    width: tl.constexpr = H * (2 * m + d)
    p_gates = p_z + i_t * z_stride + width + H * d + i_head
    gamma = tl.where(now, step_size(p_gates, p_bias + i_head, now), 0.0)
    log_mu = tl.zeros((b_t,), tl.float32)
    if use_forget_gate:
        log_mu = tl.where(now, tl.log(forget_gate(p_gates + H, p_bias + H + i_head, now, floor)), 0.0)
    log_a = tl.cumsum(log_mu, 0)
    log_end = tl.sum(log_mu, axis=0)
    log_old = tl.log(tl.load(p_state + places[5], mask=(pending > 0) & (i_chunk == 0), other=1.0).to(tl.float32))
    p_now = p_tile + tile_places[5] + o_t
    tl.store(p_now, log_a + log_old)
    tl.store(p_now + b_t, gamma)
    tl.store(p_now + 2 * b_t, tl.exp(log_end - log_a))

    line: tl.constexpr = 2 * line_m + line_d
    p_tail = p_state + places[6]
    q = _convolve(p_z + o_q, z_stride, i_t, now, start, p_tail, p_conv + o_q * taps, o_m, in_m, line, taps)
    tl.store(p_tile + tile_places[0] + o_tm, unit_length(q, 1))
    p_tail += line_m
    k = _convolve(p_z + o_k, z_stride, i_t, now, start, p_tail, p_conv + o_k * taps, o_m, in_m, line, taps)
    k = unit_length(k, 1)
    tl.store(p_tile + tile_places[1] + o_tm, k)
    c = gamma[:, None] * k
    c += load(p_state + places[2] + o_t[:, None] * line_m + o_m[None, :], old[:, None] & in_m[None, :])
    tl.store(p_tile + tile_places[2] + o_tm, c)
    tl.store(p_tile + tile_places[3] + o_t[:, None] + o_m[None, :] * b_t, c * tl.exp(log_end - log_a)[:, None])
    p_tail += line_m
    v = _convolve(p_z + o_v, z_stride, i_t, now, start, p_tail, p_conv + o_v * taps, o_d, in_d, line, taps)
    v += load(p_state + places[1] + o_t[:, None] * line_d + o_d[None, :], old[:, None] & in_d[None, :])
    tl.store(p_tile + tile_places[4] + o_td, v)


@triton.jit
def _advance(
    p_z: tl.tensor, p_tiles: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_positions: tl.tensor,
    p_starts: tl.tensor, z_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, C: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    objective: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr,
    tile_places: tl.constexpr, tile_size: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    """The state after one segment of one head; into its tiles, for `_read`: the memory each began with, h and c."""
    i_segment, i_head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(p_starts + i_segment), tl.load(p_starts + i_segment + 1)
    base = start - tl.load(p_positions + i_segment) % C
    p_state = p_pool + tl.load(p_rows + i_segment) * row_size + o_layer + i_head * head_size
    o_d, o_m, o_t = tl.arange(0, b_d), tl.arange(0, b_m), tl.arange(0, b_t)
    in_d, in_m = o_d < d, o_m < m
    o_A, in_A = o_m[:, None] * line_d + o_d[None, :], in_m[:, None] & in_d[None, :]
    p_tile = p_tiles + ((start // C + 2 * i_segment) * H + i_head) * tile_size
    p_k = p_tile + tile_places[1] + o_t[:, None] * b_m + o_m[None, :]
    p_c = p_tile + tile_places[3] + o_m[:, None] * b_t + o_t[None, :]
    p_h = p_tile + tile_places[4] + o_d[:, None] * b_t + o_t[None, :]
    p_A = p_tile + tile_places[6] + o_m[:, None] * b_d + o_d[None, :]
    p_a = p_tile + tile_places[5] + C - 1
    A = load_anchor(p_state + o_A, in_A)
    # Every warp may hold a copy of what another is going to write.
    tl.debug_barrier()
    k, c, h, log_a = tl.load(p_k), tl.load(p_c), tl.load(p_h), tl.load(p_a)
    for i_t in range(base, end, C):
        # Loads of the next chunk are on their way while this one is worked on; behind the last tile there is room.
        o_next = H * tile_size
        following = tl.load(p_k + o_next), tl.load(p_c + o_next), tl.load(p_h + o_next), tl.load(p_a + o_next)
        tl.store(p_A, A)
        if objective == DECODING:
            h -= tl.dot(tl.trans(A), tl.trans(k), input_precision=precision)
            tl.store(p_h, h)
        if objective == ENCODING:
            p_gates = p_tile + tile_places[5] + b_t + o_t
            p_whole = p_tile + tile_places[2] + o_m[:, None] + o_t[None, :] * b_m
            W = tl.load(p_gates)[None, :] * tl.dot(A, h, input_precision=precision)
            tl.store(p_whole, tl.load(p_whole) - W)
            c -= tl.load(p_gates + b_t)[None, :] * W
        N = tl.dot(c, tl.trans(h), input_precision=precision)
        a_end, b_end = tl.exp(log_a), tl.sum(A * N, axis=1)
        used = (end - i_t).to(tl.int32)
        if used < C:
            in_use = (o_t < used)[None, :]
            tl.store(p_state + places[1] + o_t[None, :] * line_d + o_d[:, None], h, mask=in_use & in_d[:, None])
            tl.store(p_state + places[2] + o_t[None, :] * line_m + o_m[:, None], c, mask=in_use & in_m[:, None])
            tl.store(p_state + places[3] + o_m, b_end, mask=in_m)
            tl.store(p_state + places[5], a_end)
        A = tl.where(used < C, A, unit_rows(A * (a_end - b_end)[:, None] + N))
        k, c, h, log_a = following
        p_tile += o_next
        p_k += o_next
        p_c += o_next
        p_h += o_next
        p_A += o_next
        p_a += o_next
    if end - base >= C:
        tl.store(p_state + o_A, A, mask=in_A)
    shift_tail(p_z, z_stride, i_head, start, end, p_state + places[6], o_d, o_m, H, d, m, line_d, line_m, taps)


@triton.jit(do_not_specialize=["n"])
def _read(
    p_z: tl.tensor, p_tiles: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_positions: tl.tensor,
    p_starts: tl.tensor, p_norm: tl.tensor, p_out: tl.tensor,
    z_stride: tl.tensor, out_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, eps: tl.tensor, n: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, C: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr, tile_places: tl.constexpr, tile_size: tl.constexpr,
    precision: tl.constexpr,
) -> None:  # fmt: skip
    """Outputs of one chunk of one head; also e of the state, where the chunk is not finished."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_segment = _segment_of(i_tile, p_starts, n, C)
    start, end = tl.load(p_starts + i_segment), tl.load(p_starts + i_segment + 1)
    pending = tl.load(p_positions + i_segment) % C
    i_chunk = i_tile - (start // C + 2 * i_segment)
    if i_chunk * C >= pending + end - start:
        return
    o_d, o_m, o_t = tl.arange(0, b_d), tl.arange(0, b_m), tl.arange(0, b_t)
    in_d, in_m = o_d < d, o_m < m
    first = start - pending + i_chunk * C
    i_t = first + o_t.to(tl.int64)
    now = (o_t < C) & (i_t >= start) & (i_t < end)
    now_d = now[:, None] & in_d[None, :]
    p_tile = p_tiles + (i_tile * H + i_head).to(tl.int64) * tile_size
    o_tm = o_t[:, None] * b_m + o_m[None, :]
    q, c = tl.load(p_tile + tile_places[0] + o_tm), tl.load(p_tile + tile_places[2] + o_tm)
    h = tl.trans(tl.load(p_tile + tile_places[4] + o_d[:, None] * b_t + o_t[None, :]))
    A = tl.load(p_tile + tile_places[6] + o_m[:, None] * b_d + o_d[None, :])
    log_a = tl.load(p_tile + tile_places[5] + o_t)

    # The diagonals of M, 1, are left out of the products and added as they are.
    below = o_t[:, None] > o_t[None, :]
    L = tl.where(below, tl.exp(log_a[:, None] - log_a[None, :]), 0.0)
    a = tl.exp(log_a)[:, None]
    W = tl.dot(h, tl.trans(A), input_precision=precision)
    cW = c * W
    b_below = tl.dot(L, cW, input_precision=precision)
    b = b_below + cW
    G = tl.dot(h, tl.trans(h), input_precision=precision)
    cross = tl.dot(L * G, c, input_precision=precision) - W * b_below
    u = c * (2 * cross + c * (tl.sum(h * h, axis=1)[:, None] - W * W))
    e = tl.maximum(tl.dot(L * L, u, input_precision=precision) + u, 0.0)
    qn = q * tl.rsqrt(a * a + e)
    y = tl.dot(qn * (a - b), A, input_precision=precision)
    weights = tl.where(below, L, (o_t[:, None] == o_t[None, :]).to(tl.float32))
    weights *= tl.dot(qn, tl.trans(c), input_precision=precision)
    y = tl.dot(weights, h, y, input_precision=precision)

    y *= tl.rsqrt(tl.sum(y * y, axis=1) / d + eps)[:, None] * load(p_norm + o_d, in_d)[None, :]
    p_gate = p_z + i_t[:, None] * z_stride + H * (2 * m + d)
    y *= silu(load(p_gate + i_head * d + o_d[None, :], now_d))
    tl.store(p_out + i_t[:, None] * out_stride + i_head * d + o_d[None, :], y, mask=now_d)
    if end - first < C:
        p_e = p_pool + tl.load(p_rows + i_segment) * row_size + o_layer + i_head * head_size + places[4]
        tl.store(p_e + o_m, tl.sum(tl.where((o_t == b_t - 1)[:, None], e, 0.0), axis=0), mask=in_m)


def prepare_options(layout: StateLayout) -> dict[str, Any]:
    """Constants that `_prepare` is launched with."""
    names = "H d m C taps line_d line_m places head_size use_forget_gate b_d b_m"
    return tile_options(layout, names, rows=tile_tokens(layout.shape.C), num_warps=4)


def advance_options(layout: StateLayout, precision: str) -> dict[str, Any]:
    """Constants that `_advance` is launched with."""
    s = layout.shape
    names = "H d m C taps line_d line_m places head_size objective b_d b_m"
    return tile_options(layout, names, precision=precision, num_warps=4 if s.d * s.m <= 64 * 64 else 8)


def read_options(layout: StateLayout, precision: str) -> dict[str, Any]:
    """Constants that `_read` is launched with."""
    s = layout.shape
    names = "H d m C places head_size b_d b_m"
    return tile_options(layout, names, precision=precision, num_warps=2 if s.d * s.m <= 64 * 64 else 8)


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
    bits, "tf32x3" is close to float32 by three such products, "ieee" is float32, with tensor cores on AMD only. On
    NVIDIA the default is tf32 for activations in bfloat16, whose own rounding is coarser, else tf32x3; on AMD ieee.
    Returns `out` [T, out_width]. Raises ValueError, naming what does not fit; what `segments` hold is on the device and
    is not looked at.
    """
    if precision is None:
        precision = "ieee" if torch.version.hip else "tf32" if z.dtype == torch.bfloat16 else "tf32x3"
    rows, positions, starts = segments.rows, segments.positions, segments.starts
    check_arguments(z, pool, layer, weights, layout, out, rows=rows, positions=positions, starts=starts)
    if not len(rows) == len(positions) == len(starts) - 1:
        raise ValueError(f"segments have {len(rows)} rows, {len(positions)} positions and {len(starts)} starts")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: give {', '.join(PRECISIONS)}")
    s, n, T = layout.shape, len(rows), len(z)
    if not n:
        return out
    o_layer = layer * layout.layer_size
    # One tile more than there can be, for `_advance` looks ahead.
    tiles = T // tile_tokens(s.C) + 2 * n
    scratch = torch.empty(((tiles + 1) * s.H, tile_lines(layout)[1]), dtype=torch.float32, device=z.device)
    _prepare[(tiles, s.H)](
        z, pool, rows, positions, starts, weights.conv, weights.gate_bias, scratch,
        z.stride(0), layout.row_size, o_layer, s.mu_floor, n,
        **prepare_options(layout),
    )  # fmt: skip
    if s.C == 1:
        mix_tokens[(n, s.H)](
            z, scratch, pool, rows, starts, weights.gate_bias, weights.norm, out,
            z.stride(0), out.stride(0), layout.row_size, o_layer, s.mu_floor, s.norm_eps,
            **token_options(layout),
        )  # fmt: skip
        return out
    _advance[(n, s.H)](
        z, scratch, pool, rows, positions, starts, z.stride(0), layout.row_size, o_layer,
        **advance_options(layout, precision),
    )  # fmt: skip
    _read[(tiles, s.H)](
        z, scratch, pool, rows, positions, starts, weights.norm, out,
        z.stride(0), out.stride(0), layout.row_size, o_layer, s.norm_eps, n,
        **read_options(layout, precision),
    )  # fmt: skip
    return out
