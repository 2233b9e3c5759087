"""The recurrence on the CPU: tokens of one chunk at once.

It is the pending-factor form of `mixers.lattice.chunk`, row t of the chunk form, relative to a as
`StateLayout` has it: b, c and e stand for b / a, c / a and e / a^2.

    a <- mu a,  c = gamma k / a
    e <- e + 2 c (sum_s c_s (h_s . h) - w b) + c^2 (|h|^2 - w^2),  then b <- b + c w
    y = A (qn (1 - b)) + sum_s (c_s . qn) h_s,  qn = q / sqrt(1 + e)

The anchor is read for h = v - A k, w = A^T h and y, each for all tokens before the next, and written once a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from lattice_serve.kernels.mixers.lattice.state import OBJECTIVES
from lattice_serve.kernels.numba.dots import combine, cross_dots, dots, fold
from lattice_serve.kernels.numba.features import vectors
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.vector import fma, inverse_sqrt, load, maximum, splat, sqrt, store

_WIDE = vectors() == "AVX-512"
_ROWS, _DOT_ROWS = (3, 2) if _WIDE else (2, 1)
"""Rows that share what is loaded of the anchor. Makes no difference to any bit, nor does the next."""
_ONE_ROW, _SOME_ROWS, _FOUR_LINES = (4, 4, 4) if _WIDE else (2, 1, 1)
"""Vectors that are combined at once, by half of the registers, or three quarters."""

_DECODING, _ENCODING = OBJECTIVES.index("decoding"), OBJECTIVES.index("encoding")

_TINY = 1e-30
"""The square of a line that only fills up, and is zeros. Others have 1 or more."""


@njit(cache=True, error_model="numpy")
def row_dots(x: Any, o_x: int, o_y: int, row: int, rows: int, n: int) -> Any:
    """sum_i x[o_x + r row + i] x[o_y + r row + i], i < n, in lane r < rows <= 16; there is room for 16 rows."""
    if rows == 1:
        return dots(1, x, o_x, row, x, o_y, row, n)
    return dots(16, x, o_x, row, x, o_y, row, n)


@njit(cache=True, error_model="numpy")
def _combine(
    x: Any, o_x: int, x_step: int, w: Any, o_w: int, w_step: int, K: int, out: Any, o_out: int, n: int
) -> None:
    """out [n] += sum_k x[k x_step] w[k w_step + j], n a multiple of 16."""
    j = 0
    while j + _ONE_ROW * LANES <= n:
        combine(1, _ONE_ROW, 2, x, o_x, 0, x_step, w, o_w + j, w_step, K, out, o_out + j, 0)
        j += _ONE_ROW * LANES
    while j < n:
        combine(1, 1, 2, x, o_x, 0, x_step, w, o_w + j, w_step, K, out, o_out + j, 0)
        j += LANES


@njit(cache=True, error_model="numpy")
def _combine_rows(x: Any, o_x: int, row: int, rows: int, w: Any, o_w: int, n: int, K: int, o_out: int) -> None:
    """x[o_out + r row + j] += sum_k x[o_x + r row + k] w[k n + j], r < rows, j < n, a multiple of 16."""
    r = 0
    while r + _ROWS <= rows:
        j = 0
        while j + _SOME_ROWS * LANES <= n:
            combine(_ROWS, _SOME_ROWS, 2, x, o_x, row, 1, w, o_w + j, n, K, x, o_out + j, row)
            j += _SOME_ROWS * LANES
        while j < n:
            combine(_ROWS, 1, 2, x, o_x, row, 1, w, o_w + j, n, K, x, o_out + j, row)
            j += LANES
        r, o_x, o_out = r + _ROWS, o_x + _ROWS * row, o_out + _ROWS * row
    while r < rows:
        _combine(x, o_x, np.int64(1), w, o_w, n, K, x, o_out, n)
        r, o_x, o_out = r + 1, o_x + row, o_out + row


@njit(cache=True, error_model="numpy")
def _dot_rows(x: Any, o_x: int, row: int, rows: int, w: Any, o_w: int, n: int, K: int, o_out: int) -> None:
    """x[o_out + r row + j] = sum_k x[o_x + r row + k] w[j K + k], r < rows, j < n, a multiple of 16."""
    r = 0
    while r + _DOT_ROWS <= rows:
        for j in range(0, n, LANES):
            cross_dots(_DOT_ROWS, x, o_x, row, w, o_w + j * K, K, K, x, o_out + j)
        r, o_x, o_out = r + _DOT_ROWS, o_x + _DOT_ROWS * row, o_out + _DOT_ROWS * row
    if r < rows:
        for j in range(0, n, LANES):
            cross_dots(1, x, o_x, row, w, o_w + j * K, K, K, x, o_out + j)


@njit(cache=True, error_model="numpy")
def _add_pending(
    x: Any, o_x: int, n: int, S: Any, o_dots: int, o_lines: int, width: int, lines: int, o_out: int, factors: int
) -> None:  # fmt: skip
    """out [width] += sum_s (x . dots_s) lines_s, with x and dots_s [n]; s < lines, which are rows of S."""
    s = 0
    while lines >= 4 and s < lines:
        s = min(s, lines - 4)
        store(x, factors + 4 * s, dots(4, x, o_x, 0, S, o_dots + s * n, n, n))
        s += 4
    while s < lines:
        store(x, factors + 4 * s, dots(1, x, o_x, 0, S, o_dots + s * n, n, n))
        s += 1
    if lines:
        _combine(x, factors, np.int64(4), S, o_lines, width, lines, x, o_out, width)


@njit(cache=True, error_model="numpy")
def _fold(
    S: Any, o_A: int, o_h: int, o_c: int, o_b: int, d: int, m: int, C: int, x: Any, h: int, c: int, scales: int
) -> None:  # fmt: skip
    """The anchor of the next chunk; h [d] and c [m] of this one's last token are in x. scales: m floats of x."""
    for j in range(0, m, 4):
        i = 0
        while i < d:
            o_i, lines, last = o_A + j * d + i, o_h + i, h + i
            if i + _FOUR_LINES * LANES <= d:
                fold(_FOUR_LINES, S, o_b + j, x, c + j, x, last, S, o_c + j, m, S, lines, d, C - 1, S, o_i, d)
                i += _FOUR_LINES * LANES
            else:
                fold(1, S, o_b + j, x, c + j, x, last, S, o_c + j, m, S, lines, d, C - 1, S, o_i, d)
                i += LANES
    for j in range(0, m, LANES):
        o_j = o_A + j * d
        squares = maximum(splat(np.float32(_TINY)), dots(16, S, o_j, d, S, o_j, d, d))
        store(x, scales + j, splat(np.float32(1)) / sqrt(squares))
    for j in range(m):
        scale = splat(x[scales + j])
        for i in range(o_A + j * d, o_A + (j + 1) * d, LANES):
            store(S, i, scale * load(S, i))


@njit(cache=True, error_model="numpy")
def recur(
    S: Any, places: Any, dims: Any, slot: int, tokens: int, x: Any, o_x: int, gamma: int, mu: int, lanes: int,
    scratch: int,
) -> None:  # fmt: skip
    """So many tokens of one chunk, from its place `slot` on; S: the head's block.

    In x, a token's row at o_x, and those of the others behind it: q, -k [m], v [d] -> y [d] after m more; gamma, mu: a
    float a token; lanes: a vector, scratch: 4 C + 16 floats.
    """
    d, m, C, objective = dims[1], dims[2], dims[4], dims[6]
    o_A, o_h, o_c, o_b, o_e, o_a = places[0], places[1], places[2], places[3], places[4], places[5]
    q, c, h, w, y, row = o_x, o_x + m, o_x + 2 * m, o_x + 2 * m + d, o_x + 3 * m + d, 3 * m + d + max(d, m)
    if objective == _DECODING:
        _combine_rows(x, c, row, tokens, S, o_A, d, m, h)
    _dot_rows(x, h, row, tokens, S, o_A, m, d, w)
    store(x, lanes, row_dots(x, h, h, row, tokens, d))
    zero, one, half = splat(np.float32(0)), splat(np.float32(1)), splat(np.float32(0.5))
    a = S[o_a]
    if slot == 0:
        a = np.float32(1)
        for j in range(0, 2 * m, LANES):
            store(S, o_b + j, zero)
    for r in range(tokens):
        s, at, size = slot + r, r * row, splat(x[lanes + r])
        a = x[mu + r] * a
        step = splat(-x[gamma + r] / a)
        for j in range(0, m, LANES):
            c_j, w_j = load(x, c + at + j), load(x, w + at + j)
            if objective == _ENCODING:
                c_j = c_j + w_j
            c_j = step * c_j
            store(x, c + at + j, c_j)
            store(x, y + at + j, half * c_j * fma(-w_j, w_j, size))
            if s < C - 1:
                store(S, o_c + s * m + j, c_j)
        if s < C - 1:
            for i in range(0, d, LANES):
                store(S, o_h + s * d + i, load(x, h + at + i))
    S[o_a] = a
    for r in range(tokens):
        _add_pending(x, h + r * row, d, S, o_h, o_c, m, slot + r, y + r * row, scratch)
    for j in range(0, m, LANES):
        b_j, e_j = load(S, o_b + j), load(S, o_e + j)
        for at in range(j, j + tokens * row, row):
            c_j, w_j = load(x, c + at), load(x, w + at)
            term = fma(-w_j, b_j, load(x, y + at))
            e_j = maximum(zero, fma(c_j, term + term, e_j))
            b_j = fma(c_j, w_j, b_j)
            qn_j = load(x, q + at) * inverse_sqrt(one + e_j)
            store(x, q + at, qn_j)
            store(x, w + at, fma(-qn_j, b_j, qn_j))
        store(S, o_b + j, b_j)
        store(S, o_e + j, e_j)
    store(x, lanes, row_dots(x, c, q, row, tokens, m))
    for r in range(tokens):
        own = splat(x[lanes + r])
        for i in range(r * row, r * row + d, LANES):
            store(x, y + i, own * load(x, h + i))
    _combine_rows(x, w, row, tokens, S, o_A, d, m, y)
    for r in range(tokens):
        _add_pending(x, q + r * row, m, S, o_c, o_h, d, slot + r, y + r * row, scratch)
    if slot + tokens == C:
        at = (tokens - 1) * row
        _fold(S, o_A, o_h, o_c, o_b, d, m, C, x, h + at, c + at, w + at)
