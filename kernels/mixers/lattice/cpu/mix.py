"""The mixer on the CPU: tokens of one head through convolution, gates, recurrence, read-out, output norm and gate.

Prefill calls it with many tokens of a sequence, decode with one. Up to 16 are worked on at once, each in the same way
and each output added up in the same order as if it were alone. So an output has the same bits however a sequence was
cut into steps and whatever else is in the batch. A head's state stays in the first-level cache meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lattice_serve.kernels.linear.activations import put
from lattice_serve.kernels.mixers.lattice.cpu.recurrence import recur, row_dots
from lattice_serve.kernels.mixers.lattice.cpu.weights import MixerBlock
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.shape import L2_EPS, MixerShape, MixerWeights
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.math import sigmoid, silu
from lattice_serve.kernels.numba.vector import fma, inverse_sqrt, load, pointer, prefetch, splat, store

_STREAM, _AHEAD = 512, 6 * LANES
"""Floats of the anchor that the processor itself goes on to fetch, and those of them that make it begin."""


@njit(cache=True, error_model="numpy")
def _convolve(
    z: Any, o_z: int, z_row: int, rows: int, S: Any, tail: int, ring: int, taps: int, weights: Any, o_w: int, n: int,
    x: Any, o_x: int, row: int,
) -> None:  # fmt: skip
    """SiLU of the convolution of n channels of some rows of z -> rows of x. `ring`: the oldest input's line of tail."""
    lines = taps - 1
    for i in range(0, n, LANES):
        if taps == 4:  # what most models have goes from row to row in registers
            one, two = (ring + 1) % 3, (ring + 2) % 3
            first, second = load(S, tail + ring * n + i), load(S, tail + one * n + i)
            third = load(S, tail + two * n + i)
            w_0, w_1 = load(weights, o_w + i), load(weights, o_w + n + i)
            w_2, w_3 = load(weights, o_w + 2 * n + i), load(weights, o_w + 3 * n + i)
            for r in range(rows):
                now = load(z, o_z + r * z_row + i)
                value = fma(third, w_2, fma(second, w_1, fma(first, w_0, now * w_3)))
                store(x, o_x + r * row + i, silu(value))
                first, second, third = second, third, now
        else:
            for r in range(rows):
                value = load(z, o_z + r * z_row + i) * load(weights, o_w + lines * n + i)
                for tap in range(lines):
                    weight, source = load(weights, o_w + tap * n + i), r + tap - lines
                    if source < 0:
                        value = fma(load(S, tail + (ring + r + tap) % lines * n + i), weight, value)
                    else:
                        value = fma(load(z, o_z + source * z_row + i), weight, value)
                store(x, o_x + r * row + i, silu(value))
        for r in range(max(0, rows - lines), rows):
            store(S, tail + (ring + r) % lines * n + i, load(z, o_z + r * z_row + i))


@njit(cache=True, error_model="numpy")
def _normalize(x: Any, o_x: int, row: int, rows: int, n: int, sign: float, scales: int) -> None:
    """Rows of x to L2 norm 1, times sign; their scales to x, 16 of them."""
    squares = row_dots(x, o_x, o_x, row, rows, n)
    store(x, scales, splat(np.float32(sign)) * inverse_sqrt(squares + splat(np.float32(L2_EPS))))
    for r in range(rows):
        scale = splat(x[scales + r])
        for i in range(o_x + r * row, o_x + r * row + n, LANES):
            store(x, i, scale * load(x, i))


@njit(inline="always")
def mix_head(
    S: Any, o: int, places: Any, dims: Any, position: int, first: int, last: int, z: Any, o_z: int, z_row: int,
    gates: Any, o_gates: int, gates_row: int, head: int, weights: Any, o_weights: int, out: Any, x: Any, o_x: int,
) -> None:  # fmt: skip
    """Tokens `first` to `last` of one sequence, from its `position` on, through one head.

    S: state rows, the head's block at o; z: the head's q, k, v and output gate of token 0 at o_z, of the next one z_row
    on; gates: gamma and mu of all heads in the same way; weights: what `MixerBlock` lays out, at o_weights; out:
    activations of all tokens; x: `scratch_size` floats at o_x. Arrays other than out are float32 [..].
    """
    _mix_head(
        pointer(S, o), pointer(places, 0), pointer(dims, 0), position, first, last, pointer(z, o_z), z_row,
        pointer(gates, o_gates), gates_row, head, pointer(weights, o_weights), out, pointer(x, o_x),
    )  # fmt: skip


@njit(cache=True, error_model="numpy")
def _mix_head(
    S: Any, places: Any, dims: Any, position: int, first: int, last: int, z: Any, z_row: int, gates: Any,
    gates_row: int, head: int, weights: Any, out: Any, x: Any,
) -> None:  # fmt: skip
    """`mix_head` with pointers to where each begins."""
    H, d, m, n_d, C, taps, gated = dims[0], dims[1], dims[2], dims[3], dims[4], dims[5], dims[7]
    n = 2 * m + d
    o_conv, o_bias = head * taps * n, H * taps * n
    o_norm = o_bias + 2 * H
    floor, eps = weights[o_norm + d], weights[o_norm + d + 1]
    scales, gamma, mu, lanes = 0 * LANES, 1 * LANES, 2 * LANES, 3 * LANES
    o_q, row = 4 * LANES, n + m + max(d, m)
    o_k, o_y, factors = o_q + m, o_q + n + m, o_q + LANES * row
    for begin in range(0, m * d, _STREAM):  # by now, for it may lie in memory: in decode it is read once
        for line in range(begin, begin + _AHEAD, LANES):
            prefetch(S, line)
    t = first
    while t < last:
        rows = min(last - t, LANES - position % LANES)
        o_t, o_g = t * z_row, t * gates_row + head
        ring = position % (taps - 1) if taps > 1 else 0
        _convolve(z, o_t, z_row, rows, S, places[6], ring, taps, weights, o_conv, n, x, o_q, row)
        _normalize(x, o_q, row, rows, m, 1.0, scales)
        _normalize(x, o_k, row, rows, m, -1.0, scales)
        for r in range(rows):
            x[gamma + r] = gates[o_g + r * gates_row]
            x[mu + r] = gates[o_g + r * gates_row + H]
        store(x, gamma, sigmoid(load(x, gamma) + splat(weights[o_bias + head])))
        if gated:
            gate = sigmoid(load(x, mu) + splat(weights[o_bias + H + head]))
            store(x, mu, splat(floor) + splat(np.float32(1) - floor) * gate)
        else:
            store(x, mu, splat(np.float32(1)))
        r = 0
        while r < rows:
            slot = (position + r) % C
            tokens = min(rows - r, C - slot)
            recur(S, places, dims, slot, tokens, x, o_q + r * row, gamma + r, mu + r, lanes, factors)
            r += tokens
        means = row_dots(x, o_y, o_y, row, rows, d) * splat(np.float32(1) / np.float32(n_d))
        store(x, scales, inverse_sqrt(means + splat(eps)))
        for r in range(rows):
            scale = splat(x[scales + r])
            for i in range(0, d, LANES):
                y = load(x, o_y + r * row + i) * scale * load(weights, o_norm + i)
                put(out, t + r, H * d, head * d + i, y * silu(load(z, o_t + r * z_row + n + i)))
        t += rows
        position += rows


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


@njit(cache=True, error_model="numpy")
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
