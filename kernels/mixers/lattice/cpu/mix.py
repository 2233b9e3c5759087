"""The Lattice mixer on the CPU: tokens of one head through convolution, gates, recurrence, output norm and gate.

Prefill calls it with many tokens of a sequence, decode with one. Up to 16 are worked on at once, each in the same way
and each output added up in the same order as if it were alone. So an output has the same bits however a sequence was
cut into steps and whatever else is in the batch. A head's state stays in the first-level cache meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from lattice_serve.kernels.linear.activations import write
from lattice_serve.kernels.mixers.base import HeadInputs, mix_head
from lattice_serve.kernels.mixers.lattice.cpu.recurrence import TokenRows, recur, row_dots, token_rows
from lattice_serve.kernels.mixers.lattice.cpu.weights import LatticeHeads, LatticeOnCpu
from lattice_serve.kernels.mixers.lattice.shape import L2_EPS
from lattice_serve.kernels.numba.inner import njit_inner
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.math import sigmoid, silu
from lattice_serve.kernels.numba.types import Floats, Rows
from lattice_serve.kernels.numba.vector import fma, inverse_sqrt, load, pointer, prefetch, splat, store

__all__ = ["LatticeOnCpu"]  # who asks for it has `mix_head` of its type, too

_STREAM, _AHEAD = 512, 6 * LANES
"""Floats of the anchor that the processor itself goes on to fetch, and those of them that make it begin."""


@njit_inner(error_model="numpy")
def _convolve(
    s: LatticeHeads, S: Floats, ring: int, z: Floats, z_stride: int, tokens: int, weights: Floats, x: Floats, to: int,
    stride: int,
) -> None:  # fmt: skip
    """Writes SiLU of the convolution of a head's q, k and v of some tokens of z to rows of x, from `to` on.

    ring: the line of the tail that has the oldest input. The tail then has the last inputs.
    """
    lines, n = s.taps - 1, 2 * s.m + s.d
    tail = s.at.tail
    for i in range(0, n, LANES):
        if s.taps == 4:  # what most models have goes from row to row in registers
            one, two = (ring + 1) % 3, (ring + 2) % 3
            first, second = load(S, tail + ring * n + i), load(S, tail + one * n + i)
            third = load(S, tail + two * n + i)
            w_0, w_1 = load(weights, i), load(weights, n + i)
            w_2, w_3 = load(weights, 2 * n + i), load(weights, 3 * n + i)
            for r in range(tokens):
                now = load(z, r * z_stride + i)
                value = fma(third, w_2, fma(second, w_1, fma(first, w_0, now * w_3)))
                store(x, to + r * stride + i, silu(value))
                first, second, third = second, third, now
        else:
            for r in range(tokens):
                value = load(z, r * z_stride + i) * load(weights, lines * n + i)
                for tap in range(lines):
                    weight, source = load(weights, tap * n + i), r + tap - lines
                    if source < 0:
                        value = fma(load(S, tail + (ring + r + tap) % lines * n + i), weight, value)
                    else:
                        value = fma(load(z, source * z_stride + i), weight, value)
                store(x, to + r * stride + i, silu(value))
        for r in range(max(0, tokens - lines), tokens):
            store(S, tail + (ring + r) % lines * n + i, load(z, r * z_stride + i))


@njit_inner(error_model="numpy")
def _normalize(x: Floats, o_x: int, stride: int, tokens: int, n: int, sign: float, scales: int) -> None:
    """Scales rows of x to L2 norm 1, times sign; the scales go to x, 16 of them."""
    squares = row_dots(x, o_x, o_x, stride, tokens, n)
    store(x, scales, splat(np.float32(sign)) * inverse_sqrt(squares + splat(np.float32(L2_EPS))))
    for r in range(tokens):
        scale = splat(x[scales + r])
        for i in range(o_x + r * stride, o_x + r * stride + n, LANES):
            store(x, i, scale * load(x, i))


@njit_inner(error_model="numpy")
def _gates(
    s: LatticeHeads, gates: Floats, stride: int, tokens: int, head: int, weights: Floats, x: Floats, rows: TokenRows
) -> None:
    """Writes gamma and mu of some tokens to x; gates: gamma [H] | mu [H] of the first."""
    for r in range(tokens):
        x[rows.gamma + r] = gates[head + r * stride]
        x[rows.mu + r] = gates[head + r * stride + s.heads]
    store(x, rows.gamma, sigmoid(load(x, rows.gamma) + splat(weights[s.gate_bias + head])))
    if s.use_forget_gate:
        gate = sigmoid(load(x, rows.mu) + splat(weights[s.gate_bias + s.heads + head]))
        floor = weights[s.mu_floor]
        store(x, rows.mu, splat(floor) + splat(np.float32(1) - floor) * gate)
    else:
        store(x, rows.mu, splat(np.float32(1)))


@njit_inner(error_model="numpy")
def _emit(
    s: LatticeHeads, z: Floats, z_stride: int, token: int, tokens: int, head: int, weights: Floats, out: Rows,
    x: Floats, rows: TokenRows,
) -> None:  # fmt: skip
    """Writes the norm of each y, times SiLU of the output gate, to rows of `out` from `token` on."""
    n, d = 2 * s.m + s.d, s.d
    means = row_dots(x, rows.y, rows.y, rows.stride, tokens, d) * splat(np.float32(1) / np.float32(s.values))
    store(x, rows.scales, inverse_sqrt(means + splat(weights[s.norm_eps])))
    for r in range(tokens):
        scale = splat(x[rows.scales + r])
        for i in range(0, d, LANES):
            y = load(x, rows.y + r * rows.stride + i) * scale * load(weights, s.norm + i)
            write(out, token + r, s.heads * d, head * d + i, y * silu(load(z, r * z_stride + n + i)))


@njit_inner(error_model="numpy")
def _mix_head(
    s: LatticeHeads, S: Floats, position: int, first: int, last: int, inputs: HeadInputs, head: int, weights: Floats,
    out: Rows, x: Floats,
) -> None:  # fmt: skip
    """`mix_head` of a Lattice layer."""
    for begin in range(0, s.m * s.d, _STREAM):  # by now, for it may lie in memory: in decode it is read once
        for line in range(begin, begin + _AHEAD, LANES):
            prefetch(S, line)
    rows = token_rows(s)
    conv = pointer(weights, s.conv + head * s.taps * (2 * s.m + s.d))
    t = first
    while t < last:
        tokens = min(last - t, LANES - position % LANES)
        z, gates = pointer(inputs.z, t * inputs.z_stride), pointer(inputs.shared, t * inputs.shared_stride)
        ring = position % (s.taps - 1) if s.taps > 1 else 0
        _convolve(s, S, ring, z, inputs.z_stride, tokens, conv, x, rows.q, rows.stride)
        _normalize(x, rows.q, rows.stride, tokens, s.m, 1.0, rows.scales)
        _normalize(x, rows.k, rows.stride, tokens, s.m, -1.0, rows.scales)
        _gates(s, gates, inputs.shared_stride, tokens, head, weights, x, rows)
        r = np.int64(0)  # of a literal 0, Numba would compile `recur` once more
        while r < tokens:
            slot = (position + r) % s.C
            of_chunk = min(tokens - r, s.C - slot)
            recur(s, S, slot, of_chunk, x, rows, r)
            r += of_chunk
        _emit(s, z, inputs.z_stride, t, tokens, head, weights, out, x, rows)
        t += tokens
        position += tokens


@overload(mix_head, strict=False)
def _mix_head_of(
    mixer: Any, state: Any, position: Any, first: Any, last: Any, inputs: Any, head: Any, weights: Any, out: Any,
    scratch: Any,
) -> Any:  # fmt: skip
    if not (isinstance(mixer, types.BaseTuple) and getattr(mixer, "instance_class", None) is LatticeHeads):
        return None

    def mix(
        mixer: Any, state: Any, position: Any, first: Any, last: Any, inputs: Any, head: Any, weights: Any, out: Any,
        scratch: Any,
    ) -> None:  # fmt: skip
        _mix_head(mixer, state, position, first, last, inputs, head, weights, out, scratch)

    return mix
