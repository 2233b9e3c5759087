"""The phases of a step on the CPU: each shares out items to the threads that come for them.

A step has two schedules of the same operations, of which `decoder.cpu` takes one:

- Weights shared out: an operation is a phase, an item some panels of its weight, or rows, or heads. All threads read
  each weight once, between them: for few rows, which wait for weights.
- Rows shared out: a layer is two phases. An item of the first is a head: its part of the input projection for a few
  rows, then the mixer for them, and so on to the last row. An item of the second is a block of rows, from the output
  projection to the norm of the next layer. Every thread reads all weights, and activations stay in its own
  second-level cache: for many rows.

One order of the operations for both would need a wait for all threads after each of them, which is what the second
schedule is there to save. The bits are the same.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lattice_serve.kernels.decoder.cpu_network import (
    BLOCK_ROWS,
    HEAD_ROWS,
    PANEL_ROWS,
    Batch,
    Buffers,
    Network,
    Weights,
    matrix,
)
from lattice_serve.kernels.linear.activations import is_quantized, quantize_row, rows_from
from lattice_serve.kernels.linear.cpu import PANEL, linear, linear_overlapped, panel_count, strip_size
from lattice_serve.kernels.linear.operands import Matrix, Output
from lattice_serve.kernels.linear.overlap import SwigluRows, no_work, take_turns
from lattice_serve.kernels.mixers.base import HeadInputs, mix_head
from lattice_serve.kernels.numba.amx import TILE
from lattice_serve.kernels.numba.inner import njit_inner
from lattice_serve.kernels.numba.lanes import LANES, padded, spread
from lattice_serve.kernels.numba.thread_team import finish, wait_for
from lattice_serve.kernels.numba.types import Floats, Ints, Rows
from lattice_serve.kernels.numba.vector import pointer, store, widened
from lattice_serve.kernels.pointwise.cpu import rms_norm, swiglu

ITEM_ROWS = 8
"""Rows of an item that works row by row."""

# Every phase takes the thread's next ticket and the number of items before it, and returns those after it.


@njit_inner()
def item_count(units: int, share: int) -> int:
    """Returns the items of `share` units each."""
    return -(-units // share) if units else 0


@njit_inner()
def _parts(units: int, threads: int) -> int:
    """Returns how many items share out so many units: as equal as can be, a few a thread, or one for a thread alone."""
    if threads == 1:
        return min(units, 1)
    for count in range(4 * threads, threads, -threads):
        if units % count == 0:
            return min(units, count)
    return min(units, 4 * threads)


@njit_inner()
def embed(weights: Weights, batch: Batch, x: Floats, hidden: int, first: int, last: int) -> None:
    """Writes the embeddings of tokens `first` to `last` to their rows of x."""
    for t in range(first, last):
        for i in range(0, hidden, LANES):
            store(x, t * spread(hidden) + i, widened(weights.embedding, batch.ids[t] * padded(hidden) + i))


# Weights shared out.


@njit_inner()
def linear_phase(
    sync: Ints, ticket: int, base: int, threads: int, w: Matrix, x: Rows, M: int, out: Output, scratch: Floats
) -> tuple[int, int]:
    """Writes x [M, K] weight^T to `out`."""
    panels = panel_count(w.N)
    count = _parts(panels, threads) if M else 0
    while ticket < base + count:
        wait_for(sync, base)
        first, last = (ticket - base) * panels // count, (ticket - base + 1) * panels // count
        linear(w, x, M, Output(pointer(out.begin, first * PANEL), out.stride, out.add), first, last, scratch)
        ticket = finish(sync)
    return ticket, base + count


@njit_inner()
def swiglu_phase(
    sync: Ints, ticket: int, base: int, threads: int, w: Matrix, x: Rows, M: int, active: Rows, inner: int,
    gates_ups: Floats, scratch: Floats,
) -> tuple[int, int]:  # fmt: skip
    """Writes SwiGLU of x [M, K] weight^T, of `inner` columns, to `active`; gates_ups: room for this thread's panels."""
    together, panels = max(1, PANEL_ROWS // M), panel_count(w.N)
    count = _parts(panels, threads)
    while ticket < base + count:
        wait_for(sync, base)
        first, last = (ticket - base) * panels // count, (ticket - base + 1) * panels // count
        while first < last:
            end = min(first + together, last)
            linear(w, x, M, Output(pointer(gates_ups, 0), together * PANEL, False), first, end, scratch)
            for panel in range(first, end):
                k = panel * PANEL // 2
                for t in range(M):
                    at = (t * together + panel - first) * PANEL
                    swiglu(gates_ups, at, min(PANEL // 2, inner - k), active, t, inner, k)
            first = end
        ticket = finish(sync)
    return ticket, base + count


@njit_inner()
def quantize_phase(sync: Ints, ticket: int, base: int, x: Rows, M: int, K: int) -> tuple[int, int]:
    """Rounds rows of x, if whole numbers are multiplied: a row is good when all its heads, or panels, are there."""
    count = item_count(M, ITEM_ROWS) if is_quantized(x) else 0
    while ticket < base + count:
        wait_for(sync, base)
        first = (ticket - base) * ITEM_ROWS
        for t in range(first, min(first + ITEM_ROWS, M)):
            quantize_row(x, t, K)
        ticket = finish(sync)
    return ticket, base + count


# Rows shared out.


@njit_inner()
def block_rows(M: int, threads: int) -> int:
    """Returns the rows of a block: equally many for each thread, two tiles at a time."""
    blocks = -(-M // (BLOCK_ROWS * threads)) * threads
    return -(-M // (blocks * 2 * TILE)) * 2 * TILE


@njit(inline="always")
def head_phase(
    sync: Ints, ticket: int, base: int, network: Network, layer: int, z: Floats, scratch: Floats
) -> tuple[int, int]:
    """Projects and mixes, head by head; z: room for this thread's rows of one head."""
    batch, mixer, place = network.batch, network.mixer, network.weights.layers[layer]
    heads, M, width = mixer.heads, batch.step[0].tokens, network.sizes.hidden
    w, weights = matrix(network.weights, place.in_proj), pointer(network.weights.vectors, place.mixer)
    head_strips = mixer.head_width // LANES * strip_size(width, w.strips)
    shared, z_stride = network.sizes.in_width - heads * mixer.head_width, spread(mixer.head_width)
    while ticket < base + heads:
        wait_for(sync, base)
        head = ticket - base
        of_head = Matrix(
            pointer(w.strips, head * head_strips), pointer(w.scales, head * mixer.head_width), mixer.head_width, width
        )  # fmt: skip
        i = 0
        for first in range(0, M, HEAD_ROWS):
            last = min(first + HEAD_ROWS, M)
            project_head(of_head, network.buffers.normed, first, last, z, z_stride, scratch)
            begin = first
            while begin < last:
                end = min(batch.starts[i + 1], last)
                o = batch.rows[i] * mixer.row_size + layer * mixer.layer_size + head * mixer.head_size
                inputs = HeadInputs(
                    pointer(z, -first * z_stride), z_stride, pointer(network.buffers.z, 0), padded(shared)
                )  # fmt: skip
                mix_head(
                    mixer, pointer(network.pool, o), batch.positions[i] + begin - batch.starts[i], begin, end, inputs,
                    head, weights, network.buffers.mixed, pointer(scratch, 0),
                )  # fmt: skip
                if end == batch.starts[i + 1]:
                    i += 1
                begin = end
        ticket = finish(sync)
    return ticket, base + heads


@njit_inner()
def project_head(
    w: Matrix, normed: Rows, first: int, last: int, z: Floats, stride: int, scratch: Floats
) -> None:  # fmt: skip
    """Writes a head's columns of z of rows `first` to `last`, from the beginning of z on."""
    x = rows_from(normed, first, w.K)
    linear(w, x, last - first, Output(pointer(z, 0), stride, False), 0, panel_count(w.N), scratch)


@njit(inline="always")
def norm_and_shared(network: Network, layer: int, first: int, last: int, scratch: Floats) -> None:
    """Writes what a layer's heads need of some rows: the norm of x, and the columns of z that all heads share."""
    place, buffers = network.weights.layers[layer], network.buffers
    width, before = network.sizes.hidden, network.mixer.heads * network.mixer.head_width
    for t in range(first, last):
        rms_norm(
            buffers.x, t * spread(width), width, network.weights.vectors, place.mixer_norm, network.weights.eps,
            buffers.normed, t,
        )  # fmt: skip
    w = matrix(network.weights, place.in_proj)
    shared, stride = network.sizes.in_width - before, padded(network.sizes.in_width - before)
    of_all = Matrix(
        pointer(w.strips, before // LANES * strip_size(width, w.strips)), pointer(w.scales, before), shared, width
    )  # fmt: skip
    x = rows_from(buffers.normed, first, width)
    out = Output(pointer(buffers.z, first * stride), stride, False)
    linear(of_all, x, last - first, out, 0, panel_count(shared), scratch)


@njit(inline="always")
def output_and_mlp(
    network: Network, layer: int, first: int, last: int, gates_ups: Floats, scratch: Floats
) -> None:  # fmt: skip
    """Adds to x, of some rows, the output projection and the MLP of a layer."""
    sizes, place = network.sizes, network.weights.layers[layer]
    _add_product(
        matrix(network.weights, place.out_proj), network.buffers.mixed, first, last, network.buffers.x, scratch
    )  # fmt: skip
    row = spread(sizes.hidden)
    for t in range(first, last):
        rms_norm(
            network.buffers.x, t * row, sizes.hidden, network.weights.vectors, place.mlp_norm, network.weights.eps,
            network.buffers.normed, t,
        )  # fmt: skip
    gate_up = matrix(network.weights, place.gate_up_proj)
    _swiglu_rows(gate_up, network.buffers, first, last, sizes.intermediate, gates_ups, scratch)
    down = matrix(network.weights, place.down_proj)
    _add_product(down, network.buffers.active, first, last, network.buffers.x, scratch)


@njit_inner()
def _add_product(w: Matrix, activations: Rows, first: int, last: int, x: Floats, scratch: Floats) -> None:
    """Adds a product to rows `first` to `last` of x."""
    for t in range(first, last):
        quantize_row(activations, t, w.K)
    row, rows = spread(w.N), rows_from(activations, first, w.K)
    linear(w, rows, last - first, Output(pointer(x, first * row), row, True), 0, panel_count(w.N), scratch)


@njit_inner()
def _swiglu_rows(
    w: Matrix, buffers: Buffers, first: int, last: int, inner: int, gates_ups: Floats, scratch: Floats
) -> None:
    """Writes SwiGLU of some normed rows; two panels by turns: one is multiplied while SwiGLU takes the other."""
    M, row = last - first, spread(PANEL)
    rows, work = rows_from(buffers.normed, first, w.K), no_work(pointer(gates_ups, 0), buffers.active)
    for panel in range(panel_count(w.N)):
        place, k = pointer(gates_ups, panel % 2 * M * row), panel * PANEL // 2
        linear_overlapped(w, rows, M, Output(place, row, False), panel, panel + 1, scratch, work)
        work = SwigluRows(place, row, min(PANEL // 2, inner - k), buffers.active, first, M, inner, k)
    take_turns(work, np.int64(0), M)
