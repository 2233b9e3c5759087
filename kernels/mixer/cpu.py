"""The mixer over a ragged batch on the CPU, state rows read and written in place.

One routine takes one token of one head through convolution, gates, recurrence, read-out, output norm and gate; prefill
calls it token after token with the head's state in the first-level cache, decode calls it once. So an output has the
same bits however a sequence was cut into steps and whatever else is in the batch.

The recurrence is the pending-factor form of `kernels.lattice` (source there), row t of the chunk form:

    b <- mu b,  c_s <- mu c_s,  a <- mu a
    e <- mu^2 e + 2 c (sum_s c_s (h_s . h) - w b) + c^2 (|h|^2 - w^2),  then b <- b + c w
    y = A (qn (a - b)) + sum_s (c_s . qn) h_s,  qn = q / sqrt(a^2 + e)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from torch import Tensor

from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.segments import Segments
from lattice_serve.kernels.mixer.shape import L2_EPS, MixerWeights
from lattice_serve.kernels.numba_math import REDUCE, sigmoid, silu

_OBJECTIVES = {"decoding": 0, "similarity": 1, "encoding": 2}
_DECODING, _ENCODING = 0, 2


@njit(fastmath=REDUCE, cache=True)
def _dot(x: Any, o_x: int, y: Any, o_y: int, n: int) -> Any:
    total = np.float32(0)
    for i in range(n):
        total += x[o_x + i] * y[o_y + i]
    return total


@njit(fastmath=REDUCE, cache=True)
def _recur(S: Any, o: Any, slot: int, C: int, d: int, m: int, objective: int, gamma: float, mu: float, x: Any) -> None:
    """One token of one head. S: the head's block of the state row, o: `StateLayout.offsets`.

    x: q [m] | k [m] | v [d] | h [d] | c [m] | w [m] | sums [m] | qn [m] | y [d]; the first three are given, y is made.
    """
    o_h, o_c, o_b, o_e, o_a = o[1], o[2], o[3], o[4], o[5]
    q, k, v, h = 0, m, 2 * m, 2 * m + d
    c = h + d
    w, sums, qn, y = c + m, c + 2 * m, c + 3 * m, c + 4 * m
    for j in range(m):
        x[w + j] = 0
        x[sums + j] = 0
    for i in range(d):
        h_i = x[v + i]
        if objective == _DECODING:
            h_i -= _dot(S, i * m, x, k, m)
        x[h + i] = h_i
        for j in range(m):
            x[w + j] += h_i * S[i * m + j]
    for j in range(m):
        x[c + j] = gamma * (x[k + j] - x[w + j]) if objective == _ENCODING else gamma * x[k + j]
    for s in range(slot):
        g = _dot(S, o_h + s * d, x, h, d)
        c_s = o_c + s * m
        for j in range(m):
            S[c_s + j] *= mu
            x[sums + j] += g * S[c_s + j]
    g = _dot(x, h, x, h, d)
    a = mu * S[o_a] if slot > 0 else mu
    S[o_a] = a
    for j in range(m):
        b_j = mu * S[o_b + j] if slot > 0 else np.float32(0)
        e_j = mu * mu * S[o_e + j] if slot > 0 else np.float32(0)
        c_j, w_j = x[c + j], x[w + j]
        e_j += 2 * c_j * (x[sums + j] - w_j * b_j) + c_j * c_j * (g - w_j * w_j)
        e_j = max(e_j, np.float32(0))
        b_j += c_j * w_j
        S[o_b + j] = b_j
        S[o_e + j] = e_j
        x[qn + j] = x[q + j] / np.sqrt(a * a + e_j)
        x[sums + j] = x[qn + j] * (a - b_j)
    for i in range(d):
        x[y + i] = _dot(S, i * m, x, sums, m)
    for s in range(slot):
        g = _dot(S, o_c + s * m, x, qn, m)
        for i in range(d):
            x[y + i] += g * S[o_h + s * d + i]
    g = _dot(x, c, x, qn, m)
    for i in range(d):
        x[y + i] += g * x[h + i]
    if slot < C - 1:
        for i in range(d):
            S[o_h + slot * d + i] = x[h + i]
        for j in range(m):
            S[o_c + slot * m + j] = x[c + j]
        return
    for j in range(m):
        x[sums + j] = a - S[o_b + j]
        x[w + j] = 0
    for i in range(d):
        for j in range(m):
            S[i * m + j] = S[i * m + j] * x[sums + j] + x[h + i] * x[c + j]
        for s in range(slot):
            g = S[o_h + s * d + i]
            for j in range(m):
                S[i * m + j] += g * S[o_c + s * m + j]
        for j in range(m):
            x[w + j] += S[i * m + j] * S[i * m + j]
    for j in range(m):
        x[w + j] = 1 / np.sqrt(x[w + j])
    for i in range(d):
        for j in range(m):
            S[i * m + j] *= x[w + j]


@njit(fastmath=REDUCE, cache=True)
def _convolve(
    S: Any, o_tail: int, taps: int, n: int, weight: Any, z: Any, o_z: int, to: int, width: int, x: Any
) -> None:
    """Channels `to` to `to + width` of a head's n: x = silu(conv(z)), and z moves into the tail."""
    last = (taps - 1) * n + to
    for i in range(width):
        total = weight[last + i] * z[o_z + i]
        for j in range(taps - 1):
            total += weight[j * n + to + i] * S[o_tail + j * n + to + i]
        x[to + i] = silu(total)
    for j in range(taps - 2):
        at = o_tail + j * n + to
        for i in range(width):
            S[at + i] = S[at + n + i]
    for i in range(width):
        S[o_tail + last - n + i] = z[o_z + i] if taps > 1 else S[o_tail + last - n + i]


@njit(fastmath=REDUCE, cache=True)
def _normalize(x: Any, o_x: int, n: int) -> None:
    scale = 1 / np.sqrt(_dot(x, o_x, x, o_x, n) + np.float32(L2_EPS))
    for i in range(n):
        x[o_x + i] *= scale


@njit(fastmath=REDUCE, cache=True)
def _head(
    head: int, H: int, d: int, m: int, C: int, taps: int, objective: int, floor: float, eps: float, o: Any, S: Any,
    position: int, start: int, end: int, z: Any, conv: Any, gate_bias: Any, norm: Any, out: Any,
) -> None:  # fmt: skip
    """Tokens `start` to `end` of z through one head. floor < 0: no forget gate."""
    n = 2 * m + d
    x = np.empty(n + 2 * d + 4 * m, dtype=np.float32)
    y = n + d + 4 * m
    weight = conv[head]
    gates = H * (n + d)
    for t in range(start, end):
        z_t = z[t]
        if taps > 1:
            _convolve(S, o[6], taps, n, weight, z_t, head * m, 0, m, x)
            _convolve(S, o[6], taps, n, weight, z_t, H * m + head * m, m, m, x)
            _convolve(S, o[6], taps, n, weight, z_t, 2 * H * m + head * d, 2 * m, d, x)
        else:
            for i in range(m):
                x[i] = silu(weight[i] * z_t[head * m + i])
                x[m + i] = silu(weight[m + i] * z_t[H * m + head * m + i])
            for i in range(d):
                x[2 * m + i] = silu(weight[2 * m + i] * z_t[2 * H * m + head * d + i])
        _normalize(x, 0, m)
        _normalize(x, m, m)
        gamma = sigmoid(z_t[gates + head] + gate_bias[head])
        mu = np.float32(1)
        if floor >= 0:
            mu = floor + (1 - floor) * sigmoid(z_t[gates + H + head] + gate_bias[H + head])
        _recur(S, o, (position + t - start) % C, C, d, m, objective, gamma, mu, x)
        scale = 1 / np.sqrt(_dot(x, y, x, y, d) / np.float32(d) + eps)
        gate = H * n + head * d
        for i in range(d):
            out[t, head * d + i] = x[y + i] * scale * norm[i] * silu(z_t[gate + i])


@njit(parallel=True, fastmath=REDUCE, cache=True)
def _mix(
    pool: Any, first: int, head_size: int, o: Any, rows: Any, positions: Any, starts: Any, dims: Any, floor: float,
    eps: float, z: Any, conv: Any, gate_bias: Any, norm: Any, out: Any,
) -> None:  # fmt: skip
    H, d, m, C, taps, objective = dims
    segments = len(rows)
    # Heads vary slowest: every thread gets its share of a long prefill piece and of the decode rows.
    for item in prange(H * segments):
        head, i = item // segments, item % segments
        begin = first + head * head_size
        S = pool[rows[i], begin : begin + head_size]
        _head(
            head, H, d, m, C, taps, objective, floor, eps, o, S, positions[i], starts[i], starts[i + 1], z, conv,
            gate_bias, norm, out,
        )  # fmt: skip


class CpuMixer:
    """One layer's mixer, weights laid out for the kernel. Not differentiable; float32 throughout."""

    def __init__(self, layout: StateLayout, layer: int, weights: MixerWeights) -> None:
        s = layout.shape
        self._first, self._head_size = layer * layout.layer_size, layout.head_size
        self._offsets = layout.offsets
        self._dims = (s.H, s.d, s.m, s.C, s.taps, _OBJECTIVES[s.objective])
        self._floor = np.float32(s.mu_floor if s.use_forget_gate else -1)
        self._eps = np.float32(s.norm_eps)
        q, k, v = weights.conv.detach().float().split((s.H * s.m, s.H * s.m, s.H * s.d))
        heads = [part.unflatten(0, (s.H, -1)) for part in (q, k, v)]
        self._conv = np.concatenate([part.mT.numpy() for part in heads], axis=2).reshape(s.H, -1)
        self._gate_bias = weights.gate_bias.detach().float().contiguous().numpy()
        self._norm = weights.norm.detach().float().contiguous().numpy()
        self._in_width, self._out_width = s.in_width, s.out_width

    def __call__(self, z: Tensor, pool: Tensor, segments: Segments, out: Tensor) -> Tensor:
        """z [N, in_width] -> out [N, out_width], both float32; state rows of `pool` [rows, row_size] updated in place.

        Raises ValueError when a shape does not fit.
        """
        N = int(segments.starts[-1])
        if z.shape != (N, self._in_width) or out.shape != (N, self._out_width):
            raise ValueError(f"z {tuple(z.shape)} and out {tuple(out.shape)}: {N} tokens of this layer were announced")
        _mix(
            pool.numpy(), self._first, self._head_size, self._offsets,
            segments.rows, segments.positions, segments.starts, self._dims, self._floor, self._eps,
            z.numpy(), self._conv, self._gate_bias, self._norm, out.numpy(),
        )  # fmt: skip
        return out
