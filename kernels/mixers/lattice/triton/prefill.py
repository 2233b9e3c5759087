"""Segments of many tokens through a layer's mixer, in three launches; reference: `mix`, segment by segment.

The chunk form of `mixers.lattice.chunk` (equations there), relative to a as `StateLayout` has it, which leaves sums
over the tokens before in the place of decays; parted by what has to wait. A chunk needs the memory that the one before
it left, but little of its work is on the way from one memory to the next:

    prepare    one program a chunk and head: convolution, SiLU, unit q and k, c = gamma k / a
    advance    one program a segment and head, chunk after chunk with the memory in registers:
               N = V^T c - A (K^T c),  b = diag(A^T N),  R = A (1 - b) + N,  A' = R, columns made unit
    read       one program a chunk and head: h and y of its tokens from the memory before them, output norm and gate

N is H^T c with H = V - K A^T written out: of its products only one waits for the memory. A chunk is a tile of
b_t = max(16, C) rows; a segment may start and end anywhere in one: rows before it are the pending factors from the
state, rows past it have c = 0, which changes nothing. For C = 1 there is no chunk form; then one program a segment and
head goes through the tokens with sums.

    z [T, in_width], out [T, out_width]    float32 or bfloat16, columns as `MixerShape` has them
    pool [rows, row_size]                  float32 or bfloat16, as `StateLayout` has it
    rows, positions, .., chunks            int64 on the device, as `DeviceSegments` has them

What bounds it: a sequence's chunks follow one another, each by a product and two sums that wait for each other, until
n H programs fill the device; then the bytes of the tiles, which each kernel leaves for the next. Neither d nor m can be
split over programs without sums across them in every chunk. Where launches may be `dependent`, `read` begins when
`advance` is halfway, on the multiprocessors that a few sequences leave idle, and waits for each chunk by itself.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lattice_serve.kernels.mixers.chunks import DeviceSegments
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.shape import MixerWeights
from lattice_serve.kernels.mixers.lattice.triton.common import (
    DECODING,
    ENCODING,
    INDICES,
    check_arguments,
    keep_tail,
    load,
    load_anchor,
    unit_rows,
)
from lattice_serve.kernels.mixers.lattice.triton.prepare import prepare, prepare_options
from lattice_serve.kernels.mixers.lattice.triton.tiles import (
    chunk_of,
    say,
    steps_of,
    tile_lines,
    tile_options,
    tile_rows,
    wait_for,
)
from lattice_serve.kernels.mixers.lattice.triton.tokens import mix_tokens, token_options
from lattice_serve.kernels.pointwise.triton import silu
from lattice_serve.kernels.triton.dependent_launch import after_last, dependent, let_next_begin

_SPAN = tl.constexpr(64)
"""Chunks of a segment after which `advance` says that they may be read: that takes it as long as a chunk does."""
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16")


@triton.jit
def _dot(
    x: tl.tensor, y: tl.tensor, precision: tl.constexpr, kind: tl.constexpr, more: tl.tensor | None = None
) -> tl.tensor:  # fmt: skip
    """x y + more, in float32; "bf16" rounds x and y first and multiplies them as `kind`."""
    if precision == "bf16":
        product = tl.dot(x.to(tl.bfloat16).to(kind), y.to(tl.bfloat16).to(kind), more, input_precision="ieee")
    else:
        product = tl.dot(x.to(tl.float32), y.to(tl.float32), more, input_precision=precision)
    return product


@triton.jit
def _upper(x: tl.tensor, split: tl.constexpr) -> tl.tensor:
    """Of x, what bfloat16 has of it, towards 0, if it is to be `split`."""
    if split and x.dtype == tl.float32:
        x = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _fine(x: tl.tensor, y: tl.tensor, precision: tl.constexpr, kind: tl.constexpr) -> tl.tensor:
    """x y like `_dot`, but "bf16" takes x and y, if they are float32, in two parts each, the lower of which are not
    multiplied with each other: 16 bits of them."""
    split: tl.constexpr = precision == "bf16"
    x_1, y_1 = _upper(x, split), _upper(y, split)
    product = _dot(x_1, y_1, precision, kind)
    if split and x.dtype == tl.float32:
        product = _dot(x - x_1, y_1, precision, kind, product)
    if split and y.dtype == tl.float32:
        product = _dot(x_1, y - y_1, precision, kind, product)
    return product


@triton.jit(do_not_specialize_on_alignment=INDICES)
def _advance(
    p_z: tl.tensor, p_tiles: tl.tensor, p_steps: tl.tensor, p_pool: tl.tensor, p_rows: tl.tensor,
    p_positions: tl.tensor, p_starts: tl.tensor, p_firsts: tl.tensor, z_stride: tl.tensor, row_size: tl.tensor,
    o_layer: tl.tensor, H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, C: tl.constexpr, taps: tl.constexpr,
    line_d: tl.constexpr, line_m: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    objective: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr,
    tile_places: tl.constexpr, tile_size: tl.constexpr, precision: tl.constexpr, kind: tl.constexpr,
    ahead: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    """The state after one segment of one head, but for e; into its tiles, for `_read`: the memory each began with."""
    i_segment, i_head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(p_starts + i_segment), tl.load(p_starts + i_segment + 1)
    row, position = tl.load(p_rows + i_segment), tl.load(p_positions + i_segment)
    if row < 0:
        return
    total = position % C + end - start
    p_state = p_pool + row * row_size + o_layer + i_head * head_size
    o_d, o_m, o_t = tl.arange(0, b_d), tl.arange(0, b_m), tl.arange(0, b_t)
    in_d, in_m = o_d < d, o_m < m
    o_A, in_A = o_m[:, None] * line_d + o_d[None, :], in_m[:, None] & in_d[None, :]
    i_first = tl.load(p_firsts + i_segment) * H + i_head
    p_first = p_tiles + i_first * tile_size
    o_tm, o_td = o_t[:, None] * b_m + o_m[None, :], o_t[:, None] * b_d + o_d[None, :]
    o_md = o_m[:, None] * b_d + o_d[None, :]
    A = load_anchor(p_state + o_A, in_A)
    full = total // C
    for i_span in range(0, full, _SPAN):
        if 2 * (i_span + _SPAN) >= full:
            let_next_begin(early)  # `read`
        for i_chunk in tl.range(i_span, tl.minimum(i_span + _SPAN, full), num_stages=ahead):
            p_tile = p_first + i_chunk * (H * tile_size)
            tl.store(p_tile + tile_places[4] + o_md, A)
            v, c = tl.load(p_tile + tile_places[3] + o_td), tl.load(p_tile + tile_places[2] + o_tm)
            if objective == DECODING:
                k = tl.load(p_tile + tile_places[1] + o_tm)  # negative
                P = _dot(tl.trans(c), k, precision, kind)
                N = _dot(P, A, precision, kind, _dot(tl.trans(c), v, precision, kind))
            elif objective == ENCODING:
                gamma = tl.load(steps_of(p_steps, i_first + i_chunk * H, b_t) + o_t)
                c -= (gamma[:, None] * _dot(v, tl.trans(A), precision, kind)).to(c.dtype)
                tl.store(p_tile + tile_places[2] + o_tm, c)
                N = _dot(tl.trans(c), v, precision, kind)
            else:
                N = _dot(tl.trans(c), v, precision, kind)
            A = unit_rows(A * (1 - tl.sum(A * N, axis=1))[:, None] + N)
        if early and i_span + _SPAN <= full:
            say(steps_of(p_steps, i_first + i_span * H, b_t), b_t)
    used = total % C
    if used > 0:
        i_tile = i_first + full * H
        p_tile = p_tiles + i_tile * tile_size
        tl.store(p_tile + tile_places[4] + o_md, A)
        h, c = tl.load(p_tile + tile_places[3] + o_td), tl.load(p_tile + tile_places[2] + o_tm)
        p_now = steps_of(p_steps, i_tile, b_t)
        if objective == DECODING:
            h = _dot(tl.load(p_tile + tile_places[1] + o_tm), A, precision, kind, h.to(tl.float32))
        if objective == ENCODING:
            c -= (tl.load(p_now + o_t)[:, None] * _dot(h, tl.trans(A), precision, kind)).to(c.dtype)
            tl.store(p_tile + tile_places[2] + o_tm, c)
        in_use = (o_t < used)[:, None]
        tl.store(p_state + places[1] + o_t[:, None] * line_d + o_d[None, :], h, mask=in_use & in_d[None, :])
        tl.store(p_state + places[2] + o_t[:, None] * line_m + o_m[None, :], c, mask=in_use & in_m[None, :])
        tl.store(p_state + places[3] + o_m, tl.sum(A * _dot(tl.trans(c), h, precision, kind), axis=1), mask=in_m)
        tl.store(p_state + places[5], tl.load(p_now + b_t + C - 1))
    if early:
        say(steps_of(p_steps, i_first + (total - 1) // (C * _SPAN) * _SPAN * H, b_t), b_t)
    if total >= C:
        tl.store(p_state + o_A, A, mask=in_A)
    p_tail = p_state + places[6]
    keep_tail(p_z, z_stride, i_head, start, end, position, p_tail, o_d, o_m, H, d, m, line_d, line_m, taps)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def _read(
    p_z: tl.tensor, p_tiles: tl.tensor, p_steps: tl.tensor, p_pool: tl.tensor, p_chunks: tl.tensor,
    p_norm: tl.tensor, p_out: tl.tensor, z_units: tl.tensor, out_stride: tl.tensor, row_size: tl.tensor,
    o_layer: tl.tensor, eps: tl.tensor,
    H: tl.constexpr, d: tl.constexpr, m: tl.constexpr, C: tl.constexpr, places: tl.constexpr, head_size: tl.constexpr,
    objective: tl.constexpr, b_d: tl.constexpr, b_m: tl.constexpr, b_t: tl.constexpr, tile_places: tl.constexpr,
    tile_size: tl.constexpr, precision: tl.constexpr, kind: tl.constexpr, unit: tl.constexpr, early: tl.constexpr,
) -> None:  # fmt: skip
    """Outputs of one chunk of one head; also e of the state, where the chunk is not finished."""
    i_tile, i_head = tl.program_id(0) // H, tl.program_id(0) % H
    row, position, start, end, first = chunk_of(p_chunks, i_tile)
    if row < 0:
        after_last(early)
        return
    o_d, o_m, o_t = tl.arange(0, b_d), tl.arange(0, b_m), tl.arange(0, b_t)
    in_d, in_m = o_d < d, o_m < m
    i_t = first + o_t.to(tl.int64)
    now = (o_t < C) & (i_t >= start) & (i_t < end)
    now_d = now[:, None] & in_d[None, :]
    p_tile = p_tiles + (i_tile * H + i_head).to(tl.int64) * tile_size
    o_tm = o_t[:, None] * b_m + o_m[None, :]
    if early:
        i_chunk = (first - start + position % C).to(tl.int32) // C
        wait_for(steps_of(p_steps, (i_tile - i_chunk % _SPAN) * H + i_head, b_t), b_t)
    q, c = tl.load(p_tile + tile_places[0] + o_tm), tl.load(p_tile + tile_places[2] + o_tm)
    h = tl.load(p_tile + tile_places[3] + o_t[:, None] * b_d + o_d[None, :])
    A = tl.load(p_tile + tile_places[4] + o_m[:, None] * b_d + o_d[None, :])
    if objective == DECODING:
        h = _dot(tl.load(p_tile + tile_places[1] + o_tm), A, precision, kind, h.to(tl.float32))

    # Where e is small beside what it is the difference of, bfloat16 alone would leave nothing of it. The diagonals of
    # sums over tokens before are left out of the products and added as they are.
    G = _fine(h, tl.trans(h), precision, kind)
    square = tl.sum(h * h, axis=1)[:, None]
    W = _fine(h, tl.trans(A), precision, kind)
    below = (o_t[:, None] > o_t[None, :]).to(tl.float32).to(c.dtype)
    cW = c * W
    b_below = _fine(below, cW, precision, kind)
    b = b_below + cW
    cross = _fine(below * G, c, precision, kind) - W * b_below
    u = c * (2 * cross + c * (square - W * W))
    e = tl.maximum(_fine(below, u, precision, kind) + u, 0.0)
    qn = q * tl.rsqrt(1 + e)
    weights = tl.where(o_t[:, None] >= o_t[None, :], _dot(qn, tl.trans(c), precision, kind), 0.0)
    y = _dot(weights, h, precision, kind, _dot(qn - qn * b, A, precision, kind))

    y *= tl.rsqrt(tl.sum(y * y, axis=1) / d + eps)[:, None] * load(p_norm + o_d, in_d)[None, :]
    p_gate = p_z + i_t[:, None] * (z_units * unit) + H * (2 * m + d)
    y *= silu(load(p_gate + i_head * d + o_d[None, :], now_d))
    tl.store(p_out + i_t[:, None] * out_stride + i_head * d + o_d[None, :], y, mask=now_d)
    if end - first < C:
        p_e = p_pool + row * row_size + o_layer + i_head * head_size + places[4]
        tl.store(p_e + o_m, tl.sum(tl.where((o_t == b_t - 1)[:, None], e, 0.0), axis=0), mask=in_m)
    if i_tile == 0:
        after_last(early)  # so that whoever waits for this launch has waited for `advance`


@cache
def advance_options(layout: StateLayout, precision: str, kind: tl.dtype) -> dict[str, Any]:
    """Constants that `_advance` is launched with."""
    s = layout.shape
    names = "H d m C taps line_d line_m places head_size objective b_d b_m"
    num_warps = 2 if s.d * s.m <= 32 * 32 else 4 if s.d * s.m <= 64 * 64 and precision == "bf16" else 8
    # An MI300 has 64 KB for tiles to come and a memory of 128 x 128.
    ahead = 1 if torch.version.hip and s.d * s.m > 64 * 64 else 3
    return tile_options(layout, names, precision=precision, kind=kind, ahead=ahead, num_warps=num_warps)


@cache
def read_options(layout: StateLayout, precision: str, kind: tl.dtype, unit: int) -> dict[str, Any]:
    """Constants that `_read` is launched with."""
    s = layout.shape
    names = "H d m C places head_size objective b_d b_m"
    num_warps = 1 if s.d * s.m <= 64 * 64 and precision == "bf16" else 4
    return tile_options(layout, names, precision=precision, kind=kind, unit=unit, num_warps=num_warps)


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

    H, in the layout, may be a share of the model's. `precision` is that of the products (C > 1): "bf16" rounds to 7
    bits, in the tiles already, and to 15 what norms come from, "tf32" to 10, "tf32x3" is close to float32 by three such
    products, "ieee" is float32, with tensor cores on AMD only. The default is bf16 for activations of bfloat16, else
    tf32x3, on AMD ieee.
    Returns `out` [T, out_width]. Raises ValueError, naming what does not fit; what `segments` hold is on the device and
    is not looked at.
    """
    if precision is None:
        precision = "bf16" if z.dtype == torch.bfloat16 else "ieee" if torch.version.hip else "tf32x3"
    rows, positions, starts = segments.rows, segments.positions, segments.starts
    firsts, chunks = segments.firsts, segments.chunks
    check_arguments(z, pool, layer, weights, layout, out, chunks=chunks)  # the others are as it is
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: give {', '.join(PRECISIONS)}")
    s, n, tiles = layout.shape, rows.shape[0], chunks.shape[0] // 5
    if not n:
        return out
    o_layer = layer * layout.layer_size
    # Triton by itself sees multiples of 16 alone, and a vector has 8 of bfloat16.
    unit = math.gcd(z.stride(0), 16)
    rounded = precision == "bf16" and s.C > 1
    # Triton's interpreter takes the bits of a bfloat16 for an integer when it multiplies.
    kind = tl.float32 if z.device.type == "cpu" else tl.bfloat16
    scratch = torch.empty(
        tiles * s.H, tile_lines(layout)[1], dtype=torch.bfloat16 if rounded else torch.float32, device=z.device
    )
    steps = torch.empty(tiles * s.H, 2 * tile_rows(s.C) + 1, device=z.device)
    early = dependent(z.device)
    prepare[(tiles * s.H,)](
        z, pool, chunks, weights.conv, weights.gate_bias, scratch, steps,
        z.stride(0) // unit, layout.row_size, o_layer, s.mu_floor,
        **prepare_options(layout, unit), **early,
    )  # fmt: skip
    if s.C == 1:
        mix_tokens[(n, s.H)](
            z, scratch, pool, rows, positions, starts, firsts, weights.gate_bias, weights.norm, out,
            z.stride(0), out.stride(0), layout.row_size, o_layer, s.mu_floor, s.norm_eps,
            **token_options(layout), **early,
        )  # fmt: skip
        return out
    _advance[(n, s.H)](
        z, scratch, steps, pool, rows, positions, starts, firsts, z.stride(0), layout.row_size, o_layer,
        **advance_options(layout, precision, kind), early=early["early"],  # not dependent: one a multiprocessor
    )  # fmt: skip
    _read[(tiles * s.H,)](
        z, scratch, steps, pool, chunks, weights.norm, out,
        z.stride(0) // unit, out.stride(0), layout.row_size, o_layer, s.norm_eps,
        **read_options(layout, precision, kind, unit), **early,
    )  # fmt: skip
    return out
