"""The Lattice recurrence on the CPU: tokens of one chunk at once.

It is the pending-factor form of `mixers.lattice.chunk`, row t of the chunk form, relative to a as `StateLayout` has it:
b, c and e stand for b / a, c / a and e / a^2.

    a <- mu a,  c = gamma k / a
    e <- e + 2 c (sum_s c_s (h_s . h) - w b) + c^2 (|h|^2 - w^2),  then b <- b + c w
    y = A (qn (1 - b)) + sum_s (c_s . qn) h_s,  qn = q / sqrt(1 + e)

The anchor is read for h = v - A k, w = A^T h and y, each for all tokens before the next, and written once a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from lattice_serve.kernels.mixers.lattice.cpu.weights import LatticeHeads
from lattice_serve.kernels.mixers.lattice.state import OBJECTIVES
from lattice_serve.kernels.numba.dots import combine, cross_dots, dots, fold
from lattice_serve.kernels.numba.features import vectors
from lattice_serve.kernels.numba.inner import njit_inner
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.types import Floats, Vector
from lattice_serve.kernels.numba.vector import fma, inverse_sqrt, load, maximum, pointer, splat, sqrt, store

_WIDE = vectors() == "AVX-512"
_ROWS, _DOT_ROWS = (3, 2) if _WIDE else (2, 1)
"""Rows that share what is loaded of the anchor. Makes no difference to any bit, nor does the next."""
_ONE_ROW, _SOME_ROWS, _FOUR_LINES = (4, 4, 4) if _WIDE else (2, 1, 1)
"""Vectors that are combined at once, by half of the registers, or three quarters."""

_DECODING, _ENCODING = OBJECTIVES.index("decoding"), OBJECTIVES.index("encoding")

_TINY = 1e-30
"""The square of a line that only fills up, and is zeros. Others have 1 or more."""


class TokenRows(NamedTuple):
    """Where a head's scratch has what up to 16 tokens are worked out in, in floats.

    A row a token: q [m] | -k, then c [m] | v, then h [d] | w [m] | y [max(d, m)]. A lane a token: scales, gamma, mu.
    """

    q: int
    k: int
    h: int
    w: int
    y: int
    stride: int
    """From row to row."""
    scales: int
    gamma: int
    mu: int
    lanes: int
    """A vector for sums of all tokens."""
    factors: int
    """4 C + 16 floats for one token's dot products with the pending factors."""


@register_jitable
def token_rows(s: LatticeHeads) -> TokenRows:
    d, m = s.d, s.m
    q, stride = 4 * LANES, 3 * m + d + max(d, m)
    return TokenRows(
        q, q + m, q + 2 * m, q + 2 * m + d, q + 3 * m + d, stride, 0, LANES, 2 * LANES, 3 * LANES, q + LANES * stride
    )


@njit_inner(error_model="numpy")
def row_dots(x: Floats, o_x: int, o_y: int, row: int, rows: int, n: int) -> Vector:
    """Returns sum_i x[o_x + r row + i] x[o_y + r row + i], i < n, in lane r < rows <= 16; there is room for 16 rows."""
    if rows == 1:
        return dots(1, pointer(x, o_x), row, pointer(x, o_y), row, n)
    return dots(16, pointer(x, o_x), row, pointer(x, o_y), row, n)


@njit_inner(error_model="numpy")
def _combine(x: Floats, x_step: int, w: Floats, w_step: int, K: int, out: Floats, n: int) -> None:
    """out [n] += sum_k x[k x_step] w[k w_step + j], n a multiple of 16."""
    j = 0
    while j + _ONE_ROW * LANES <= n:
        combine(1, _ONE_ROW, 2, x, 0, x_step, pointer(w, j), w_step, K, pointer(out, j), 0)
        j += _ONE_ROW * LANES
    while j < n:
        combine(1, 1, 2, x, 0, x_step, pointer(w, j), w_step, K, pointer(out, j), 0)
        j += LANES


@njit_inner(error_model="numpy")
def _combine_rows(x: Floats, row: int, rows: int, w: Floats, n: int, K: int, out: Floats) -> None:
    """out[r row + j] += sum_k x[r row + k] w[k n + j], r < rows, j < n, a multiple of 16."""
    r, o = 0, 0
    while r + _ROWS <= rows:
        j = 0
        while j + _SOME_ROWS * LANES <= n:
            combine(_ROWS, _SOME_ROWS, 2, pointer(x, o), row, 1, pointer(w, j), n, K, pointer(out, o + j), row)
            j += _SOME_ROWS * LANES
        while j < n:
            combine(_ROWS, 1, 2, pointer(x, o), row, 1, pointer(w, j), n, K, pointer(out, o + j), row)
            j += LANES
        r, o = r + _ROWS, o + _ROWS * row
    while r < rows:
        _combine(pointer(x, o), np.int64(1), w, n, K, pointer(out, o), n)
        r, o = r + 1, o + row


@njit_inner(error_model="numpy")
def _dot_rows(x: Floats, row: int, rows: int, w: Floats, n: int, K: int, out: Floats) -> None:
    """out[r row + j] = sum_k x[r row + k] w[j K + k], r < rows, j < n, a multiple of 16."""
    r, o = 0, 0
    while r + _DOT_ROWS <= rows:
        for j in range(0, n, LANES):
            cross_dots(_DOT_ROWS, pointer(x, o), row, pointer(w, j * K), K, K, pointer(out, o + j))
        r, o = r + _DOT_ROWS, o + _DOT_ROWS * row
    if r < rows:
        for j in range(0, n, LANES):
            cross_dots(1, pointer(x, o), row, pointer(w, j * K), K, K, pointer(out, o + j))


@njit_inner(error_model="numpy")
def _add_pending(
    x: Floats, n: int, keys: Floats, values: Floats, width: int, count: int, out: Floats, factors: Floats
) -> None:
    """out [width] += sum_s (x . keys_s) values_s, of x [n], keys [count, n], values [count, width].

    factors: 4 count + 16 floats to be used.
    """
    s = 0
    while count >= 4 and s < count:
        s = min(s, count - 4)
        store(factors, 4 * s, dots(4, x, 0, pointer(keys, s * n), n, n))
        s += 4
    while s < count:
        store(factors, 4 * s, dots(1, x, 0, pointer(keys, s * n), n, n))
        s += 1
    if count:
        _combine(factors, np.int64(4), values, width, count, out, width)


@njit_inner(error_model="numpy")
def _fold(s: LatticeHeads, S: Floats, h: Floats, c: Floats, scales: Floats) -> None:
    """Writes the anchor of the next chunk; h [d], c [m]: of this one's last token; scales: m floats to be used."""
    d, m, K = s.d, s.m, s.C - 1
    for j in range(0, m, 4):
        b, factors, lines = pointer(S, s.at.b + j), pointer(c, j), pointer(S, s.at.c + j)
        i = 0
        while i < d:
            A, values = pointer(S, s.at.A + j * d + i), pointer(S, s.at.h + i)
            if i + _FOUR_LINES * LANES <= d:
                fold(_FOUR_LINES, b, factors, pointer(h, i), lines, m, values, d, K, A, d)
                i += _FOUR_LINES * LANES
            else:
                fold(1, b, factors, pointer(h, i), lines, m, values, d, K, A, d)
                i += LANES
    for j in range(0, m, LANES):
        A = pointer(S, s.at.A + j * d)
        squares = maximum(splat(np.float32(_TINY)), dots(16, A, d, A, d, d))
        store(scales, j, splat(np.float32(1)) / sqrt(squares))
    for j in range(m):
        scale = splat(scales[j])
        for i in range(s.at.A + j * d, s.at.A + (j + 1) * d, LANES):
            store(S, i, scale * load(S, i))


@njit_inner(error_model="numpy")
def recur(s: LatticeHeads, S: Floats, slot: int, tokens: int, x: Floats, rows: TokenRows, first: int) -> None:
    """Runs so many tokens of one chunk, from its place `slot` on, whose rows of x begin with row `first`.

    S: the head's block of the state. Reads q, -k, v, gamma and mu; leaves y.
    """
    d, m, C, row = s.d, s.m, s.C, rows.stride
    at, begin = s.at, first * row
    q, c, h, w, y = rows.q + begin, rows.k + begin, rows.h + begin, rows.w + begin, rows.y + begin
    gamma, mu, lanes, factors = rows.gamma + first, rows.mu + first, rows.lanes, pointer(x, rows.factors)
    anchor = pointer(S, at.A)
    if s.objective == _DECODING:
        _combine_rows(pointer(x, c), row, tokens, anchor, d, m, pointer(x, h))
    _dot_rows(pointer(x, h), row, tokens, anchor, m, d, pointer(x, w))
    store(x, lanes, row_dots(x, h, h, row, tokens, d))
    zero, one, half = splat(np.float32(0)), splat(np.float32(1)), splat(np.float32(0.5))
    a = S[at.a]
    if slot == 0:
        a = np.float32(1)
        for j in range(0, m, LANES):
            store(S, at.b + j, zero)
            store(S, at.e + j, zero)
    for r in range(tokens):
        line, o, size = slot + r, r * row, splat(x[lanes + r])
        a = x[mu + r] * a
        step = splat(-x[gamma + r] / a)
        for j in range(0, m, LANES):
            c_j, w_j = load(x, c + o + j), load(x, w + o + j)
            if s.objective == _ENCODING:
                c_j = c_j + w_j
            c_j = step * c_j
            store(x, c + o + j, c_j)
            store(x, y + o + j, half * c_j * fma(-w_j, w_j, size))
            if line < C - 1:
                store(S, at.c + line * m + j, c_j)
        if line < C - 1:
            for i in range(0, d, LANES):
                store(S, at.h + line * d + i, load(x, h + o + i))
    S[at.a] = a
    for r in range(tokens):
        o = r * row
        _add_pending(pointer(x, h + o), d, pointer(S, at.h), pointer(S, at.c), m, slot + r, pointer(x, y + o), factors)
    for j in range(0, m, LANES):
        b_j, e_j = load(S, at.b + j), load(S, at.e + j)
        for o in range(j, j + tokens * row, row):
            c_j, w_j = load(x, c + o), load(x, w + o)
            term = fma(-w_j, b_j, load(x, y + o))
            e_j = maximum(zero, fma(c_j, term + term, e_j))
            b_j = fma(c_j, w_j, b_j)
            qn_j = load(x, q + o) * inverse_sqrt(one + e_j)
            store(x, q + o, qn_j)
            store(x, w + o, fma(-qn_j, b_j, qn_j))
        store(S, at.b + j, b_j)
        store(S, at.e + j, e_j)
    store(x, lanes, row_dots(x, c, q, row, tokens, m))
    for r in range(tokens):
        own = splat(x[lanes + r])
        for i in range(r * row, r * row + d, LANES):
            store(x, y + i, own * load(x, h + i))
    _combine_rows(pointer(x, w), row, tokens, anchor, d, m, pointer(x, y))
    for r in range(tokens):
        o = r * row
        _add_pending(pointer(x, q + o), m, pointer(S, at.c), pointer(S, at.h), d, slot + r, pointer(x, y + o), factors)
    if slot + tokens == C:
        o = (tokens - 1) * row
        _fold(s, S, pointer(x, h + o), pointer(x, c + o), pointer(x, w + o))
