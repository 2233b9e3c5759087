"""The mixer on the CPU: one token of one head through convolution, gates, recurrence, read-out, output norm and gate.

Prefill calls it token after token with the head's state in the first-level cache, decode calls it once. So an output
has the same bits however a sequence was cut into steps and whatever else is in the batch.

The recurrence is the pending-factor form of `kernels.lattice` (source there), row t of the chunk form, relative to a as
`StateLayout` has it: b, c and e stand for b / a, c / a and e / a^2.

    a <- mu a,  c = gamma k / a
    e <- e + 2 c (sum_s c_s (h_s . h) - w b) + c^2 (|h|^2 - w^2),  then b <- b + c w
    y = A (qn (1 - b)) + sum_s (c_s . qn) h_s,  qn = q / sqrt(1 + e)

The anchor is read for h = v - A k, w = A^T h and y, and written once a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lattice_serve.kernels.cpu.math import sigmoid, silu
from lattice_serve.kernels.cpu.products import combine, eight_dots
from lattice_serve.kernels.cpu.vector import first, fma, inverse_sqrt, load, maximum, splat, store, total
from lattice_serve.kernels.cpu_features import vectors
from lattice_serve.kernels.lanes import LANES
from lattice_serve.kernels.lattice.state import OBJECTIVES
from lattice_serve.kernels.linear.activations import put
from lattice_serve.kernels.mixer.block import MixerBlock
from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.segments import Segments
from lattice_serve.kernels.mixer.shape import L2_EPS, MixerShape, MixerWeights

_WIDE = 4 if vectors() == "AVX-512" else 2
"""Vectors that are combined at once, two sums each: half of the registers. Makes no difference to any bit."""

_DECODING, _ENCODING = OBJECTIVES.index("decoding"), OBJECTIVES.index("encoding")


@njit(cache=True)
def _dot(x: Any, o_x: int, y: Any, o_y: int, n: int) -> float:
    """As `eight_dots` adds up."""
    sums = splat(np.float32(0))
    for i in range(0, n, LANES):
        sums = fma(load(x, o_x + i), load(y, o_y + i), sums)
    return total(sums)


@njit(cache=True)
def _dots(x: Any, o_x: int, w: Any, o_w: int, n: int, rows: int, out: Any, o_out: int) -> None:
    """out[r] = sum_i x[i] w[r n + i] of n elements."""
    whole = rows // 8 * 8
    for r in range(0, whole, 8):
        eight_dots(x, o_x, w, o_w + r * n, n, n, out, o_out + r)
    for r in range(whole, rows):
        out[o_out + r] = _dot(x, o_x, w, o_w + r * n, n)


@njit(cache=True)
def _combine(x: Any, o_x: int, x_step: int, w: Any, o_w: int, w_row: int, K: int, out: Any, o_out: int, n: int) -> None:
    """out [n] += sum_k x[k x_step] w[k w_row + j], n a multiple of 16."""
    j = 0
    while j + _WIDE * LANES <= n:
        combine(_WIDE, x, o_x, x_step, w, o_w + j, w_row, K, out, o_out + j)
        j += _WIDE * LANES
    while j < n:
        combine(1, x, o_x, x_step, w, o_w + j, w_row, K, out, o_out + j)
        j += LANES


@njit(cache=True)
def _clear(x: Any, o_x: int, n: int) -> None:
    for i in range(0, n, LANES):
        store(x, o_x + i, splat(np.float32(0)))


@njit(cache=True)
def _recur(S: Any, o: int, places: Any, d: int, m: int, slot: int, C: int, objective: int, gamma: Any, mu: Any,
           x: Any, o_q: int, o_k: int, o_v: int, o_y: int, o_x: int) -> None:  # fmt: skip
    """One token of one head: q, k [m], v [d] -> y [d], all in x. S: state rows, the head's block at o.

    gamma and mu are in all lanes of vectors. o_x: scratch of d + 5 m + 2 C floats.
    """
    o_A, o_h, o_c, o_b, o_e, o_a = (
        o + places[0],
        o + places[1],
        o + places[2],
        o + places[3],
        o + places[4],
        o + places[5],
    )
    h, c, w, sums, qn = o_x, o_x + d, o_x + d + m, o_x + d + 2 * m, o_x + d + 3 * m
    negative, factors = o_x + d + 4 * m, o_x + d + 5 * m
    for i in range(0, d, LANES):
        store(x, h + i, load(x, o_v + i))
    if objective == _DECODING:
        for j in range(0, m, LANES):
            store(x, negative + j, -load(x, o_k + j))
        _combine(x, negative, 1, S, o_A, d, m, x, h, d)
    _dots(x, h, S, o_A, d, m, x, w)
    if slot == 0:
        a = first(mu)
        _clear(S, o_b, m)
        _clear(S, o_e, m)
    else:
        a = first(mu) * S[o_a]
    S[o_a] = a
    step = gamma / splat(a)
    for j in range(0, m, LANES):
        key = load(x, o_k + j)
        if objective == _ENCODING:
            key = key - load(x, w + j)
        store(x, c + j, step * key)
    _clear(x, sums, m)
    _dots(x, h, S, o_h, d, slot, x, factors)
    _combine(x, factors, 1, S, o_c, m, slot, x, sums, m)
    size, zero, one, two = splat(_dot(x, h, x, h, d)), splat(np.float32(0)), splat(np.float32(1)), splat(np.float32(2))
    for j in range(0, m, LANES):
        c_j, w_j = load(x, c + j), load(x, w + j)
        b_j = load(S, o_b + j)
        e_j = load(S, o_e + j)
        e_j = e_j + two * c_j * (load(x, sums + j) - w_j * b_j) + c_j * c_j * (size - w_j * w_j)
        e_j = maximum(zero, e_j)
        b_j = fma(c_j, w_j, b_j)
        store(S, o_b + j, b_j)
        store(S, o_e + j, e_j)
        qn_j = load(x, o_q + j) * inverse_sqrt(one + e_j)
        store(x, qn + j, qn_j)
        store(x, sums + j, qn_j * (one - b_j))
    _clear(x, o_y, d)
    _combine(x, sums, 1, S, o_A, d, m, x, o_y, d)
    _dots(x, qn, S, o_c, m, slot, x, factors)
    _combine(x, factors, 1, S, o_h, d, slot, x, o_y, d)
    last = splat(_dot(x, c, x, qn, m))
    for i in range(0, d, LANES):
        store(x, o_y + i, fma(last, load(x, h + i), load(x, o_y + i)))
    if slot < C - 1:
        for i in range(0, d, LANES):
            store(S, o_h + slot * d + i, load(x, h + i))
        for j in range(0, m, LANES):
            store(S, o_c + slot * m + j, load(x, c + j))
    else:
        for j in range(m):
            p, c_j = splat(np.float32(1) - S[o_b + j]), splat(x[c + j])
            o_j = o_A + j * d
            for i in range(0, d, LANES):
                store(S, o_j + i, fma(c_j, load(x, h + i), p * load(S, o_j + i)))
            _combine(S, o_c + j, m, S, o_h, d, slot, S, o_j, d)
            square = _dot(S, o_j, S, o_j, d)
            if square != 0:  # only lines that fill up have none
                scale = splat(np.float32(1) / np.sqrt(square))
                for i in range(0, d, LANES):
                    store(S, o_j + i, scale * load(S, o_j + i))


@njit(cache=True)
def _normalize(x: Any, o_x: int, n: int) -> None:
    scale = splat(np.float32(1) / np.sqrt(_dot(x, o_x, x, o_x, n) + np.float32(L2_EPS)))
    for i in range(0, n, LANES):
        store(x, o_x + i, scale * load(x, o_x + i))


@njit(cache=True)
def mix_head(
    S: Any, o: int, places: Any, dims: Any, position: int, first: int, last: int, z: Any, o_z: int, z_row: int,
    gates: Any, o_gates: int, gates_row: int, head: int, weights: Any, o_weights: int, out: Any, x: Any, o_x: int,
) -> None:  # fmt: skip
    """Tokens `first` to `last` of one sequence, from its `position` on, through one head.

    S: state rows, the head's block at o; z: the head's q, k, v and output gate of token 0 at o_z, of the next one z_row
    on; gates: gamma and mu of all heads in the same way; weights: what `MixerBlock` lays out, at o_weights; out:
    activations of all tokens; x: `scratch_size` floats at o_x. Arrays other than out are float32 [..].
    """
    H, d, m, n_d, C, taps, objective, gated = dims[0], dims[1], dims[2], dims[3], dims[4], dims[5], dims[6], dims[7]
    n = 2 * m + d
    o_conv = o_weights + head * taps * n
    o_bias = o_weights + H * taps * n
    o_norm = o_bias + 2 * H
    floor, eps = weights[o_norm + d], weights[o_norm + d + 1]
    tail = o + places[6]
    o_q, o_k, o_v, o_y = o_x, o_x + m, o_x + 2 * m, o_x + n
    slot = position % C
    for t in range(first, last):
        o_t, o_g = o_z + t * z_row, o_gates + t * gates_row + head
        ring = (position + t - first) % (taps - 1) if taps > 1 else 0
        for i in range(0, n, LANES):
            now = load(z, o_t + i)
            value = now * load(weights, o_conv + (taps - 1) * n + i)
            for tap in range(taps - 1):
                line = ring + tap if ring + tap < taps - 1 else ring + tap - (taps - 1)
                value = fma(load(S, tail + line * n + i), load(weights, o_conv + tap * n + i), value)
            if taps > 1:
                store(S, tail + ring * n + i, now)
            store(x, o_x + i, silu(value))
        _normalize(x, o_q, m)
        _normalize(x, o_k, m)
        gamma = sigmoid(splat(gates[o_g] + weights[o_bias + head]))
        mu = splat(np.float32(1))
        if gated:
            gate = splat(gates[o_g + H] + weights[o_bias + H + head])
            mu = splat(floor) + splat(np.float32(1) - floor) * sigmoid(gate)
        _recur(S, o, places, d, m, slot, C, objective, gamma, mu, x, o_q, o_k, o_v, o_y, o_y + d)
        slot = slot + 1 if slot + 1 < C else 0
        scale = splat(np.float32(1) / np.sqrt(_dot(x, o_y, x, o_y, d) / np.float32(n_d) + eps))
        for i in range(0, d, LANES):
            y = load(x, o_y + i) * scale * load(weights, o_norm + i)
            put(out, t, H * d, head * d + i, y * silu(load(z, o_t + n + i)))


class CpuMixer:
    """One layer's mixer by itself, on one thread; not differentiable, float32 throughout."""

    def __init__(self, layout: StateLayout, layer: int, weights: MixerWeights) -> None:
        self._layout, self._layer, self._block = layout, layer, MixerBlock(layout)
        self._weights = self._block.small(weights)
        self._shape: MixerShape = layout.shape

    def __call__(self, z: Tensor, pool: Tensor, segments: Segments, out: Tensor) -> Tensor:
        """z [N, in_width] -> out [N, out_width], both float32; state rows of `pool` [rows, row_size] updated in place.

        Raises ValueError when a shape does not fit.
        """
        s, layout, block = self._shape, self._layout, self._block
        N = int(segments.starts[-1])
        if z.shape != (N, s.in_width) or out.shape != (N, s.out_width):
            raise ValueError(f"z {tuple(z.shape)} and out {tuple(out.shape)}: {N} tokens of this layer were announced")
        segments.check(pool, layout.row_size)
        inputs = block.inputs(z.mT).mT.contiguous()
        outputs = np.empty((N, block.out_width), dtype=np.float32)
        _mix(
            pool.numpy().reshape(-1), layout.row_size, self._layer * layout.layer_size, layout.head_size,
            block.places, block.dims, segments.rows, segments.positions, segments.starts, inputs.numpy().reshape(-1),
            block.in_width, self._weights, outputs.reshape(-1), np.empty(block.scratch_size, dtype=np.float32),
        )  # fmt: skip
        out.copy_(torch.from_numpy(outputs).unflatten(1, (s.H, -1))[..., : s.d].flatten(1))
        return out


@njit(cache=True)
def _mix(
    S: Any, row_size: int, first: int, head_size: int, places: Any, dims: Any, rows: Any, positions: Any, starts: Any,
    z: Any, z_row: int, weights: Any, out: Any, x: Any,
) -> None:  # fmt: skip
    width = 2 * (dims[1] + dims[2])
    for head in range(dims[0]):
        for i in range(len(rows)):
            o = rows[i] * row_size + first + head * head_size
            mix_head(
                S, o, places, dims, positions[i], starts[i], starts[i + 1], z, head * width, z_row, z, dims[0] * width,
                z_row, head, weights, 0, out, x, 0,
            )  # fmt: skip
