"""The first of prefill's three launches (`prefill`): all that a chunk is before any memory is known."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from lattice_serve.kernels.mixers.chunks import tile_tokens
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.triton.common import (
    INDICES,
    forget_gate,
    load,
    step_size,
    tile_width,
    unit_length,
)
from lattice_serve.kernels.mixers.lattice.triton.tiles import chunk_of, steps_of, tile_options, tile_rows
from lattice_serve.kernels.pointwise.triton import silu
from lattice_serve.kernels.triton.dependent_launch import after_last


@triton.jit
def _inputs(
    p_z: tl.tensor, z_stride: tl.tensor, i_t: tl.tensor, inside: tl.tensor, o_n: tl.tensor, in_n: tl.tensor,
    taps: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """What the convolution at tokens i_t of the segment at p_z takes of the segment itself."""
    x = tl.tuple(())
    for i_tap in tl.static_range(taps):
        i_from = i_t - (taps - 1) + i_tap
        mask = (inside & (i_from >= 0))[:, None] & in_n[None, :]
        x += tl.tuple((tl.load(p_z + i_from.to(tl.int64)[:, None] * z_stride + o_n[None, :], mask=mask, other=0.0),))
    return x


@triton.jit
def _convolve(
    x: tl.tuple, i_t: tl.tensor, inside: tl.tensor, ring: tl.tensor, p_tail: tl.tensor, p_conv: tl.tensor,
    begins: tl.tensor, o_n: tl.tensor, in_n: tl.tensor, line: tl.constexpr, taps: tl.constexpr, width: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """SiLU of the convolution [b_t, n] at tokens i_t of a segment whose first token's line of the tail is `ring`."""
    y = tl.zeros((i_t.shape[0], o_n.shape[0]), tl.float32)
    for i_tap in tl.static_range(taps):
        value = x[i_tap].to(tl.float32)
        if i_tap < taps - 1:  # noqa: SIM102 -- a constant here, a tensor there
            if begins:
                i_from = i_t - (taps - 1) + i_tap
                i_line = (ring + i_from + taps - 1) % (taps - 1)
                before = (inside & (i_from < 0))[:, None] & in_n[None, :]
                value += load(p_tail + i_line[:, None] * line + o_n[None, :], before)
        y += value * load(p_conv + i_tap * width + o_n, in_n)[None, :]
    return silu(y)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def prepare(
    p_z: tl.tensor, p_pool: tl.tensor, p_chunks: tl.tensor, p_conv: tl.tensor, p_bias: tl.tensor, p_tiles: tl.tensor,
    p_steps: tl.tensor, z_units: tl.tensor, row_size: tl.tensor, o_layer: tl.tensor, floor: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    use_forget_gate: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr,
    tile_places: tl.constexpr, tile_size: tl.constexpr, rows: tl.constexpr, unit: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    """What a tile of one head is before any memory is known, as `tile_places` has it."""
    i_tile, i_head = tl.program_id(0) // H, tl.program_id(0) % H
    after_last(early)
    row, position, start, end, first = chunk_of(p_chunks, i_tile)
    if row < 0:
        return
    o_d, o_m, o_t = tl.arange(0, b_d), tl.arange(0, b_m), tl.arange(0, b_t)
    in_d, in_m = o_d < d, o_m < m
    i_t = (first - start).to(tl.int32) + o_t
    now = (o_t < rows) & (i_t >= 0) & (i_t < end - start)
    old = i_t < 0
    p_state = p_pool + row * row_size + o_layer + i_head * head_size
    p_tile = p_tiles + (i_tile * H + i_head).to(tl.int64) * tile_size
    o_tm, o_td = o_t[:, None] * b_m + o_m[None, :], o_t[:, None] * b_d + o_d[None, :]
    o_q, o_k, o_v = i_head * m, (H + i_head) * m, 2 * H * m + i_head * d
    width: tl.constexpr = H * (2 * m + d)
    z_stride = z_units * unit
    p_z += start * z_stride
    x_q = _inputs(p_z + o_q, z_stride, i_t, now, o_m, in_m, taps)
    x_k = _inputs(p_z + o_k, z_stride, i_t, now, o_m, in_m, taps)
    x_v = _inputs(p_z + o_v, z_stride, i_t, now, o_d, in_d, taps)
    tl.debug_barrier()  # no load moves behind it: all are on their way together
    p_gates = p_z + i_t.to(tl.int64) * z_stride + width + H * d + i_head
    gamma = tl.where(now, step_size(p_gates, p_bias + i_head, now), 0.0)
    a_old = tl.load(p_state + places[5], mask=first < start, other=1.0).to(tl.float32)
    a = a_old + tl.zeros((b_t,), tl.float32)
    if use_forget_gate:
        a *= tl.cumprod(tl.where(now, forget_gate(p_gates + H, p_bias + H + i_head, now, floor), 1.0), 0)
    gamma /= a
    p_step = steps_of(p_steps, i_tile * H + i_head, b_t)
    tl.store(p_step + o_t, gamma)
    tl.store(p_step + b_t + o_t, a)
    if early:
        tl.store(p_step + 2 * b_t, 0.0)

    line: tl.constexpr = 2 * line_m + line_d
    begins = first - start < taps - 1
    p_tail, ring = p_state + places[6], (position % max(taps - 1, 1)).to(tl.int32)
    q = _convolve(x_q, i_t, now, ring, p_tail, p_conv + o_q, begins, o_m, in_m, line, taps, width)
    tl.store(p_tile + tile_places[0] + o_tm, unit_length(q))
    p_tail += line_m
    k = _convolve(x_k, i_t, now, ring, p_tail, p_conv + o_k, begins, o_m, in_m, line, taps, width)
    k = unit_length(k)
    tl.store(p_tile + tile_places[1] + o_tm, -k)
    c = gamma[:, None] * k
    c += load(p_state + places[2] + o_t[:, None] * line_m + o_m[None, :], old[:, None] & in_m[None, :])
    tl.store(p_tile + tile_places[2] + o_tm, c)
    p_tail += line_m
    v = _convolve(x_v, i_t, now, ring, p_tail, p_conv + o_v, begins, o_d, in_d, line, taps, width)
    v += load(p_state + places[1] + o_t[:, None] * line_d + o_d[None, :], old[:, None] & in_d[None, :])
    tl.store(p_tile + tile_places[3] + o_td, v)


@cache
def prepare_options(layout: StateLayout, unit: int) -> dict[str, Any]:
    """Constants that `prepare` is launched with."""
    s = layout.shape
    names = "H d m taps line_d line_m places head_size use_forget_gate b_d b_m"
    # So many lanes that each has a whole vector of bfloat16 of a tile.
    vectors = tile_rows(s.C) * min(tile_width(s.d), tile_width(s.m)) // 8
    num_warps = min(4, max(1, vectors // (64 if torch.version.hip else 32)))
    return tile_options(layout, names, rows=tile_tokens(s.C), unit=unit, num_warps=num_warps)
