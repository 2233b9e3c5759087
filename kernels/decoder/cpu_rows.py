"""Layers of a step of many rows on the CPU: each thread keeps what it works on in its own second-level cache.

A layer is two phases. An item of the first is a head: its part of the input projection for a few rows, then the mixer
for them, and so on to the last row. An item of the second is a block of rows, from the output projection to the norm
of the next layer. So every thread reads all weights, and activations stay with their thread. Bits are those of a step
that shares out weights, not rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from lattice_serve.kernels.linear.activations import rows_from, settle
from lattice_serve.kernels.linear.cpu import PANEL, linear, linear_beside, panel_count, strip_size
from lattice_serve.kernels.linear.overlap import SwigluRows, nothing, take_turns
from lattice_serve.kernels.mixers.lattice.cpu.mix import mix_head
from lattice_serve.kernels.numba.amx import TILE
from lattice_serve.kernels.numba.lanes import LANES, padded, spread
from lattice_serve.kernels.numba.thread_team import finish, wait_for
from lattice_serve.kernels.numba.vector import store, widened
from lattice_serve.kernels.pointwise.cpu import rms_norm

HEAD_ROWS = 512
"""Rows of a head that are projected and then mixed."""
BLOCK_ROWS = 256
"""Rows of a block, at the most."""


@njit(cache=True)
def block_rows(M: int, threads: int) -> int:
    """Rows of a block: equally many for each thread, two tiles at a time."""
    blocks = -(-M // (BLOCK_ROWS * threads)) * threads
    return -(-M // (blocks * 2 * TILE)) * 2 * TILE


@njit(cache=True)
def embed(x: Any, row: int, width: int, embedding: Any, ids: Any, first: int, last: int) -> None:
    """The embeddings of some ids to the same rows of x."""
    for t in range(first, last):
        for i in range(0, width, LANES):
            store(x, t * row + i, widened(embedding, ids[t] * padded(width) + i))


@njit(cache=True)
def head_phase(
    sync: Any, ticket: int, base: int, M: int, segments: Any, S: Any, o_layer: int, row_size: int, head_size: int,
    places: Any, dims: Any, w: Any, o_w: int, scales: Any, o_s: int, width: int, normed: Any, gates: Any, small: Any,
    o_small: int, mixed: Any, z: Any, scratch: Any,
) -> tuple[int, int]:  # fmt: skip
    """The first phase; z: this thread's rows of one head."""
    H = dims[0]
    head_width = 2 * (dims[1] + dims[2])
    strips, z_row = head_width // LANES, spread(head_width)
    while ticket < base + H:
        wait_for(sync, base)
        head = ticket - base
        i = 0
        for first in range(0, M, HEAD_ROWS):
            last = min(first + HEAD_ROWS, M)
            linear(
                w, o_w + head * strips * strip_size(width, w), scales, o_s + head * head_width, head_width, width,
                rows_from(normed, first, width), last - first, z, 0, z_row, False, 0, panel_count(head_width),
                scratch,
            )  # fmt: skip
            begin = first
            while begin < last:
                end = min(segments[2, i + 1], last)
                o = segments[0, i] * row_size + o_layer + head * head_size
                mix_head(
                    S, o, places, dims, segments[1, i] + begin - segments[2, i], begin, end, z, -first * z_row,
                    z_row, gates, 0, padded(2 * H), head, small, o_small, mixed, scratch, 0,
                )  # fmt: skip
                if end == segments[2, i + 1]:
                    i += 1
                begin = end
        ticket = finish(sync)
    return ticket, base + H


@njit(cache=True)
def norm_and_gates(
    x: Any, first: int, last: int, width: int, small: Any, o_norm: int, eps: float, normed: Any, H: int, z_width: int,
    w: Any, o_w: int, scales: Any, o_s: int, gates: Any, scratch: Any,
) -> None:  # fmt: skip
    """What the heads want of some rows of x: the norm, and gamma and mu of them all."""
    for t in range(first, last):
        rms_norm(x, t * spread(width), width, small, o_norm, eps, normed, t)
    row, before = padded(2 * H), z_width - 2 * H
    linear(
        w, o_w + before // LANES * strip_size(width, w), scales, o_s + before, 2 * H, width,
        rows_from(normed, first, width), last - first, gates, first * row, row, False, 0, panel_count(2 * H), scratch,
    )  # fmt: skip


@njit(cache=True)
def output_and_mlp(
    x: Any, first: int, last: int, width: int, y_width: int, inner: int, mixed: Any, small: Any, o_norm: int,
    eps: float, normed: Any, w: Any, scales: Any, at: Any, act: Any, gate_up: Any, scratch: Any,
) -> None:  # fmt: skip
    """Output projection, norm and SwiGLU of some rows, added to x; at: where weights and scales of the three are."""
    row, N, M, panels = spread(width), 2 * padded(inner), last - first, panel_count(2 * padded(inner))
    for t in range(first, last):
        settle(mixed, t, y_width)
    linear(
        w, at[0], scales, at[1], width, y_width, rows_from(mixed, first, y_width), M, x, first * row, row, True, 0,
        panel_count(width), scratch,
    )  # fmt: skip
    for t in range(first, last):
        rms_norm(x, t * row, width, small, o_norm, eps, normed, t)
    rows, gate_up_row = rows_from(normed, first, width), spread(PANEL)
    # Two panels by turns: one is multiplied while SwiGLU takes the other.
    done = nothing(gate_up, act)
    for panel in range(panels):
        o, k = panel % 2 * M * gate_up_row, panel * PANEL // 2
        linear_beside(
            w, at[2], scales, at[3], N, width, rows, M, gate_up, o, gate_up_row, False, panel, panel + 1, scratch,
            done,
        )  # fmt: skip
        done = SwigluRows(gate_up, o, gate_up_row, min(PANEL // 2, inner - k), act, first, M, inner, k)
    take_turns(done, np.int64(0), M)
    for t in range(first, last):
        settle(act, t, inner)
    linear(
        w, at[4], scales, at[5], width, inner, rows_from(act, first, inner), M, x, first * row, row, True, 0,
        panel_count(width), scratch,
    )  # fmt: skip
