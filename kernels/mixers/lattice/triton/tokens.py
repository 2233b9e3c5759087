"""Segments of many tokens through a mixer where C = 1, token after token: each changes the memory of the next."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

from lattice_serve.kernels.mixers.chunks import tile_tokens
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.triton.common import (
    DECODING,
    ENCODING,
    INDICES,
    forget_gate,
    keep_tail,
    load,
    load_anchor,
    step_size,
    unit_rows,
)
from lattice_serve.kernels.mixers.lattice.triton.tiles import tile_options
from lattice_serve.kernels.pointwise.triton import silu
from lattice_serve.kernels.triton.dependent_launch import after_last


@triton.jit(do_not_specialize_on_alignment=INDICES)
def mix_tokens(
    p_z: tl.tensor, p_tiles: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor, p_positions: tl.tensor,
    p_starts: tl.tensor, p_firsts: tl.tensor, p_bias: tl.tensor, p_norm: tl.tensor, p_out: tl.tensor,
    z_stride: tl.tensor, out_stride: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, floor: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    objective: tl.constexpr, use_forget_gate: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr,
    tile_places: tl.constexpr, tile_size: tl.constexpr, rows: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    """One segment of one head, C = 1: R_t = A (mu - c w) + c h, and y = A' q with A' the columns of R made unit."""
    i_segment, i_head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(p_starts + i_segment), tl.load(p_starts + i_segment + 1)
    row = tl.load(p_rows + i_segment)
    after_last(early)
    if row < 0:
        return
    p_state = p_pool + row * row_size + o_layer + i_head * head_size
    o_d, o_m = tl.arange(0, b_d), tl.arange(0, b_m)
    in_d, in_m = o_d < d, o_m < m
    o_A, in_A = o_m[:, None] * line_d + o_d[None, :], in_m[:, None] & in_d[None, :]
    width: tl.constexpr = H * (2 * m + d)
    norm = load(p_norm + o_d, in_d)
    A = load_anchor(p_state + o_A, in_A)
    i_first = tl.load(p_firsts + i_segment)
    for i_t in range(start, end):
        i_tile, i_line = i_first + (i_t - start) // rows, (i_t - start) % rows
        p_tile = p_tiles + (i_tile * H + i_head) * tile_size
        q = tl.load(p_tile + tile_places[0] + i_line * b_m + o_m)
        k = -tl.load(p_tile + tile_places[1] + i_line * b_m + o_m)
        h = tl.load(p_tile + tile_places[3] + i_line * b_d + o_d)
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
    tl.store(p_state + o_A, A, mask=in_A)
    position, p_tail = tl.load(p_positions + i_segment), p_state + places[6]
    keep_tail(p_z, z_stride, i_head, start, end, position, p_tail, o_d, o_m, H, d, m, line_d, line_m, taps)


@cache
def token_options(layout: StateLayout) -> dict[str, Any]:
    """Constants that `_mix_tokens` is launched with."""
    s = layout.shape
    names = "H d m taps line_d line_m places head_size objective use_forget_gate b_d b_m"
    return tile_options(layout, names, rows=tile_tokens(s.C), num_warps=4 if s.d * s.m <= 64 * 64 else 8)
