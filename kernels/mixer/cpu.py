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

from lattice_serve.kernels.lattice.state import OBJECTIVES
from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.segments import Segments
from lattice_serve.kernels.mixer.shape import L2_EPS, MixerWeights
from lattice_serve.kernels.numba_math import REDUCE, sigmoid, silu

_DECODING, _ENCODING = OBJECTIVES.index("decoding"), OBJECTIVES.index("encoding")


@njit(fastmath=REDUCE, cache=True)
def _dot(x: Any, y: Any) -> Any:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


# Loops run over slices, not over an offset and an index: where Numba must allow for a negative index, LLVM does not
# vectorise.


@njit(fastmath=REDUCE, cache=True)
def _recur(
    S: Any,
    o: Any,
    slot: int,
    C: int,
    m: int,
    objective: int,
    gamma: float,
    mu: float,
    q: Any,
    k: Any,
    v: Any,
    x: Any,
    y: Any,
) -> None:
    """One token of one head: q, k [m], v [d] -> y [d]. S: the head's block of the state row, o: `StateLayout.offsets`.

    x is scratch: h [d] | c [m] | w [m] | sums [m] | qn [m].
    """
    d = len(v)
    A, h_rows, c_rows, b, e = S[: d * m], S[o[1] : o[2]], S[o[2] : o[3]], S[o[3] : o[4]], S[o[4] : o[5]]
    h, c, w = x[:d], x[d : d + m], x[d + m : d + 2 * m]
    sums, qn = x[d + 2 * m : d + 3 * m], x[d + 3 * m : d + 4 * m]
    for j in range(m):
        w[j] = 0
        sums[j] = 0
    for i in range(d):
        A_i = A[i * m : (i + 1) * m]
        h_i = v[i]
        if objective == _DECODING:
            h_i -= _dot(A_i, k)
        h[i] = h_i
        for j in range(m):
            w[j] += h_i * A_i[j]
    if objective == _ENCODING:
        for j in range(m):
            c[j] = gamma * (k[j] - w[j])
    else:
        for j in range(m):
            c[j] = gamma * k[j]
    for s in range(slot):
        g = _dot(h_rows[s * d : (s + 1) * d], h)
        c_s = c_rows[s * m : (s + 1) * m]
        for j in range(m):
            c_s[j] *= mu
            sums[j] += g * c_s[j]
    a = mu
    if slot > 0:
        a = mu * S[o[5]]
    else:
        for j in range(m):
            b[j] = 0
            e[j] = 0
    S[o[5]] = a
    g = _dot(h, h)
    for j in range(m):
        b_j = mu * b[j]
        e_j = mu * mu * e[j] + 2 * c[j] * (sums[j] - w[j] * b_j) + c[j] * c[j] * (g - w[j] * w[j])
        e_j = max(e_j, np.float32(0))
        b_j += c[j] * w[j]
        b[j] = b_j
        e[j] = e_j
        qn[j] = q[j] / np.sqrt(a * a + e_j)
        sums[j] = qn[j] * (a - b_j)
    for i in range(d):
        y[i] = _dot(A[i * m : (i + 1) * m], sums)
    for s in range(slot):
        g = _dot(c_rows[s * m : (s + 1) * m], qn)
        h_s = h_rows[s * d : (s + 1) * d]
        for i in range(d):
            y[i] += g * h_s[i]
    g = _dot(c, qn)
    for i in range(d):
        y[i] += g * h[i]
    if slot < C - 1:
        h_rows[slot * d : (slot + 1) * d] = h
        c_rows[slot * m : (slot + 1) * m] = c
    else:
        _close(A, h_rows, c_rows, slot, a, b, h, c, w, sums)


@njit(fastmath=REDUCE, cache=True)
def _close(A: Any, h_rows: Any, c_rows: Any, slot: int, a: float, b: Any, h: Any, c: Any, w: Any, p: Any) -> None:
    """End of a chunk: A <- R = A (a - b) + sum_s h_s c_s + h c with columns normalised. w and p are scratch [m]."""
    d, m = len(h), len(c)
    for j in range(m):
        p[j] = a - b[j]
        w[j] = 0
    for i in range(d):
        A_i = A[i * m : (i + 1) * m]
        for j in range(m):
            A_i[j] = A_i[j] * p[j] + h[i] * c[j]
        for s in range(slot):
            g = h_rows[s * d + i]
            c_s = c_rows[s * m : (s + 1) * m]
            for j in range(m):
                A_i[j] += g * c_s[j]
        for j in range(m):
            w[j] += A_i[j] * A_i[j]
    for j in range(m):
        w[j] = 1 / np.sqrt(w[j])
    for i in range(d):
        A_i = A[i * m : (i + 1) * m]
        for j in range(m):
            A_i[j] *= w[j]


@njit(fastmath=REDUCE, cache=True)
def _convolve(tail: Any, n: int, weight: Any, z: Any, to: int, x: Any) -> None:
    """Channels `to` to `to + len(z)` of a head's n: x = silu(conv(z)), and z moves into the tail [taps - 1, n]."""
    width = len(z)
    before = len(tail) // n
    last = weight[before * n + to : before * n + to + width]
    for i in range(width):
        x[i] = last[i] * z[i]
    for j in range(before):
        weight_j = weight[j * n + to : j * n + to + width]
        tail_j = tail[j * n + to : j * n + to + width]
        for i in range(width):
            x[i] += weight_j[i] * tail_j[i]
        if j + 1 < before:
            tail_j[:] = tail[(j + 1) * n + to : (j + 1) * n + to + width]
        else:
            tail_j[:] = z
    for i in range(width):
        x[i] = silu(x[i])


@njit(fastmath=REDUCE, cache=True)
def _normalize(x: Any) -> None:
    scale = 1 / np.sqrt(_dot(x, x) + np.float32(L2_EPS))
    for i in range(len(x)):
        x[i] *= scale


@njit(fastmath=REDUCE, cache=True)
def _head(
    head: int, H: int, d: int, m: int, C: int, taps: int, objective: int, floor: float, eps: float, o: Any, S: Any,
    position: int, start: int, end: int, z: Any, conv: Any, gate_bias: Any, norm: Any, out: Any,
) -> None:  # fmt: skip
    """Tokens `start` to `end` of z through one head. floor < 0: no forget gate."""
    n = 2 * m + d
    scratch = np.empty(n + 2 * d + 4 * m, dtype=np.float32)
    q, k, v, y, x = scratch[:m], scratch[m : 2 * m], scratch[2 * m : n], scratch[n : n + d], scratch[n + d :]
    tail = S[o[6] : o[6] + (taps - 1) * n]
    weight = conv[head]
    gates = H * (n + d)
    for t in range(start, end):
        z_t, out_t = z[t], out[t, head * d : (head + 1) * d]
        _convolve(tail, n, weight, z_t[head * m : (head + 1) * m], 0, q)
        _convolve(tail, n, weight, z_t[(H + head) * m : (H + head + 1) * m], m, k)
        _convolve(tail, n, weight, z_t[2 * H * m + head * d : 2 * H * m + (head + 1) * d], 2 * m, v)
        _normalize(q)
        _normalize(k)
        gamma = sigmoid(z_t[gates + head] + gate_bias[head])
        mu = np.float32(1)
        if floor >= 0:
            mu = floor + (1 - floor) * sigmoid(z_t[gates + H + head] + gate_bias[H + head])
        _recur(S, o, (position + t - start) % C, C, m, objective, gamma, mu, q, k, v, x, y)
        scale = 1 / np.sqrt(_dot(y, y) / np.float32(d) + eps)
        gate = z_t[H * n + head * d : H * n + (head + 1) * d]
        for i in range(d):
            out_t[i] = y[i] * scale * norm[i] * silu(gate[i])


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
        self._dims = (s.H, s.d, s.m, s.C, s.taps, OBJECTIVES.index(s.objective))
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
