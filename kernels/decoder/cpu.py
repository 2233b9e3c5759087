"""A step of the whole network on the CPU: one compiled function, shared by a team of threads.

    x = embedding[ids];  for each layer:  x += out_proj(mix(in_proj(norm(x))));  x += down(swiglu(gate_up(norm(x))))
    logits = head(norm(x)) of the rows that are wanted

Each line of work is a phase of the team; its items are rows, panels of a weight, or heads. Which thread does an item,
how many rows there are and how a sequence was cut into steps make no difference to any bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from lattice_serve.kernels.decoder.cpu_rows import (
    BLOCK_ROWS,
    HEAD_ROWS,
    block_rows,
    embed,
    head_phase,
    norm_and_gates,
    output_and_mlp,
)
from lattice_serve.kernels.decoder.weights import DecoderWeights, Packer
from lattice_serve.kernels.linear.activations import activations, has_to_settle, settle
from lattice_serve.kernels.linear.cpu import PANEL, linear, panel_count, scratch_size
from lattice_serve.kernels.mixers.lattice.cpu.mix import mix_head
from lattice_serve.kernels.mixers.lattice.cpu.weights import MixerBlock
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.numba.features import Products, Stored, available_products, vectors
from lattice_serve.kernels.numba.lanes import LANES, aligned, padded, spread
from lattice_serve.kernels.numba.thread_team import Team, enter, finish, leave, take, wait_for
from lattice_serve.kernels.pointwise.cpu import rms_norm, swiglu

_ROWS = 8
"""Rows of an item that works row by row."""
_GATES_UPS = 8
"""Panels of gates and ups that are worked out before SwiGLU takes them, times rows, where these are few."""
_NAMES: dict[Products, str] = {
    "amx_int8": "int8 by AMX",
    "avx512_vnni": "int8 by VPDPBUSD",
    "amx": "bfloat16 by AMX",
    "avx512_bf16": "bfloat16 by VDPBF16PS",
    "float32": "",
}


class CpuDecoder:
    """The network of `weights`, packed; not differentiable, activations and sums are float32."""

    multiple = 1
    """A prompt may be cut anywhere."""

    def __init__(
        self, weights: DecoderWeights, layout: StateLayout, pool: Tensor, *, max_tokens: int, threads: int,
        parallel_from: int = 4_000_000, wide_from: int = 128, quantization: Literal["int8"] | None = None,
        products: Products | None = None,
    ) -> None:  # fmt: skip
        """pool: [rows, row_size] float32, the state rows; they are read and written in place, always.

        products: what multiplies with matrices as they are stored, the fastest there is unless given. Raises ValueError
        for what this processor does not have.
        Steps of fewer multiply-adds than `parallel_from` (a fifth of a millisecond) are one thread's: they are not
        worth the meeting of several. Steps with a prompt and `wide_from` rows for each thread share out rows, not
        weights (`decoder.prompt`): fewer rows would wait for the weights.
        """
        block = MixerBlock(layout)
        V, hidden = weights.head.shape
        intermediate = weights.layers[0].down_proj.shape[1]
        stored: Stored = quantization or ("float32" if weights.head.dtype == torch.float32 else "bfloat16")
        available = available_products(stored)
        products = products or available[0]
        if products not in available:
            raise ValueError(f"products: {stored} is multiplied here by {', '.join(available)}, not {products}")
        pack = Packer(quantization)
        table = []
        for layer in weights.layers:
            gate, up = layer.gate_up_proj.chunk(2)
            missing = padded(intermediate) - intermediate
            # Vectors of outputs in turn, so that a panel has what belongs together.
            gate_up = torch.stack([F.pad(part, (0, 0, 0, missing)).view(-1, LANES, hidden) for part in (gate, up)], 1)
            matrices = (
                block.inputs(layer.in_proj),
                block.outputs(layer.out_proj.mT).mT,
                gate_up.flatten(0, 2),
                layer.down_proj,
            )
            vectors_ = (layer.mixer_norm.float().numpy(), block.small(layer.mixer), layer.mlp_norm.float().numpy())
            places = [place for matrix in matrices for place in pack.matrix(matrix)]
            table.append(places + [pack.vector(each) for each in vectors_])
        ends = (*pack.matrix(weights.head), pack.vector(weights.norm.float().numpy()))
        strips, scales, small = pack.arrays()
        lines = weights.embedding.detach().contiguous()
        if hidden % LANES:
            lines = F.pad(lines, (0, padded(hidden) - hidden))
        self._embedding = lines  # keeps alive what the array below shows
        embedding = (lines.view(torch.uint16) if lines.dtype == torch.bfloat16 else lines).numpy().reshape(-1)
        widths = (hidden, block.in_width, block.out_width, intermediate, V)
        self._parallel_from, self._wide_from = parallel_from, wide_from
        picked = ", ".join(filter(None, (vectors(), _NAMES[products])))
        self.arithmetic = f"{get_host_cpu_name()}, {picked}"
        """What bits depend on, beside weights and tokens: each maker of processors estimates reciprocals its way."""
        self.name = f"{picked}, {threads} {'thread' if threads == 1 else 'threads'}"
        """What it runs on."""
        self._step = np.zeros(6, dtype=np.int64)
        self._ids = np.zeros(max_tokens, dtype=np.int64)
        self._segments = np.zeros((3, max_tokens + 1), dtype=np.int64)
        self._wanted = np.zeros(2 * max_tokens, dtype=np.int64)
        self._pool, self._row_size = pool, layout.row_size
        self._vocab_size = V
        # Pages that are never written cost nothing, so the buffers may have room for the largest step.
        x, z = (aligned(max_tokens * spread(width), np.float32) for width in (hidden, block.in_width))
        final, logits = (aligned(max_tokens * padded(width), np.float32) for width in (hidden, V))
        normed, mixed, act, wanted = (activations(products, max_tokens, width) for width in (
            hidden, block.out_width, intermediate, hidden))  # fmt: skip
        self._logits, self._final = logits.reshape(max_tokens, -1), final.reshape(max_tokens, -1)
        self._hidden_size = hidden
        head_rows = spread(2 * (layout.d + layout.m)) * min(HEAD_ROWS, max_tokens)
        panels = 2 * spread(PANEL) * BLOCK_ROWS
        gate_up_size = max(max(max_tokens, _GATES_UPS) * PANEL, head_rows, panels)
        gate_up = aligned(threads * gate_up_size, np.float32).reshape(threads, -1)
        need = padded(max(block.scratch_size, *map(scratch_size, (hidden, block.out_width, intermediate))))
        self.nbytes = sum(array.nbytes for array in (strips, scales, small))
        self._products = sum(matrix.numel() for layer in weights.layers for matrix in (
            layer.in_proj, layer.out_proj, layer.gate_up_proj, layer.down_proj))  # fmt: skip
        self.team = Team(threads, _serve, (
            self._step, self._ids, self._segments, self._wanted, pool.numpy().reshape(-1),
            np.array((layout.row_size, layout.layer_size, layout.head_size), dtype=np.int64), block.places, block.dims,
            np.array(widths, dtype=np.int64), np.float32(weights.norm_eps), np.array(table, dtype=np.int64),
            np.array(ends, dtype=np.int64), embedding, strips, scales, small, x, normed, z, mixed, act, wanted, final,
            logits, gate_up, aligned(threads * need, np.float32).reshape(threads, need),
        ))  # fmt: skip

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """ids: the tokens of all segments; wanted, hidden: places among them -> logits [len(wanted), V] of the first,
        final hidden states [len(hidden), hidden_size] of the second, both float32.

        They are good until the next call. State rows move on by their segments. Raises ValueError for what does not
        fit; nothing has happened then.
        """
        M, n, R, E = len(ids), len(segments.rows), len(wanted), len(hidden)
        if not 0 < M == segments.starts[-1] <= len(self._ids) or max(ids) >= self._vocab_size or min(ids) < 0:
            raise ValueError(f"ids: give 1 to {len(self._ids)} ids below {self._vocab_size}, as many as segments have")
        for name, places in (("wanted", wanted), ("hidden", hidden)):
            if places and not (min(places) >= 0 and max(places) < M >= len(places)):
                raise ValueError(f"{name}: give at most {M} places, all below {M}")
        segments.check(self._pool, self._row_size)
        self._ids[:M] = ids
        self._segments[0, :n], self._segments[1, :n] = segments.rows, segments.positions
        self._segments[2, : n + 1] = segments.starts
        self._wanted[:R], self._wanted[R : R + E] = wanted, hidden
        threads = self.team.size if M * self._products >= self._parallel_from else 1
        self._step[:] = M, n, R, threads, E, n < M >= self._wide_from * threads
        self.team.run(threads)
        logits, final = self._logits[:R, : self._vocab_size], self._final[:E, : self._hidden_size]
        return torch.from_numpy(logits), torch.from_numpy(final)


@njit(cache=True)
def _parts(units: int, threads: int) -> int:
    """Items of equally many units where it can be, else nearly so: a few a thread, or one for a thread alone."""
    if threads == 1:
        return min(units, 1)
    for count in range(4 * threads, threads, -threads):
        if units % count == 0:
            return min(units, count)
    return min(units, 4 * threads)


@njit(cache=True)
def _items(units: int, share: int) -> int:
    return -(-units // share) if units else 0


@njit(cache=True)
def _linear_phase(
    sync: Any, ticket: int, base: int, threads: int, w: Any, o_w: int, scales: Any, o_s: int, N: int, K: int, x: Any,
    M: int, out: Any, out_row: int, add: bool, scratch: Any,
) -> tuple[int, int]:  # fmt: skip
    panels = panel_count(N)
    count = _parts(panels, threads) if M else 0
    while ticket < base + count:
        wait_for(sync, base)
        first, last = (ticket - base) * panels // count, (ticket - base + 1) * panels // count
        linear(w, o_w, scales, o_s, N, K, x, M, out, first * PANEL, out_row, add, first, last, scratch)
        ticket = finish(sync)
    return ticket, base + count


@njit(cache=True)
def _swiglu_phase(
    sync: Any, ticket: int, base: int, threads: int, w: Any, o_w: int, scales: Any, o_s: int, K: int, inner: int,
    x: Any, M: int, act: Any, gate_up: Any, scratch: Any,
) -> tuple[int, int]:  # fmt: skip
    """Gates and ups, and SwiGLU of them; gate_up: room for some panels of this thread's."""
    N, together = 2 * padded(inner), max(1, _GATES_UPS // M)
    panels = panel_count(N)
    count = _parts(panels, threads)
    while ticket < base + count:
        wait_for(sync, base)
        first, last = (ticket - base) * panels // count, (ticket - base + 1) * panels // count
        while first < last:
            end = min(first + together, last)
            linear(
                w, o_w, scales, o_s, N, K, x, M, gate_up, 0, together * PANEL, False, first, end, scratch
            )  # fmt: skip
            for panel in range(first, end):
                k = panel * PANEL // 2
                for t in range(M):
                    place = (t * together + panel - first) * PANEL
                    swiglu(gate_up, place, min(PANEL // 2, inner - k), act, t, inner, k)
            first = end
        ticket = finish(sync)
    return ticket, base + count


@njit(cache=True)
def _settle_phase(sync: Any, ticket: int, base: int, x: Any, M: int, K: int) -> tuple[int, int]:
    count = _items(M, _ROWS) if has_to_settle(x) else 0
    while ticket < base + count:
        wait_for(sync, base)
        first = (ticket - base) * _ROWS
        for t in range(first, min(first + _ROWS, M)):
            settle(x, t, K)
        ticket = finish(sync)
    return ticket, base + count


@njit(inline="always")
def _work(
    thread: int, sync: Any, step: Any, ids: Any, segments: Any, wanted: Any, S: Any, sizes: Any, places: Any, dims: Any,
    widths: Any, eps: float, table: Any, ends: Any, embedding: Any, w: Any, scales: Any, small: Any, x: Any,
    normed: Any, z: Any, mixed: Any, act: Any, chosen: Any, final: Any, logits: Any, gates_ups: Any, scratches: Any,
) -> None:  # fmt: skip
    M, n, R, threads, E, wide = step[0], step[1], step[2], step[3], step[4], step[5] > 0
    width, z_width, y_width, inner, V = widths[0], widths[1], widths[2], widths[3], widths[4]
    row, z_row = spread(width), spread(z_width)
    row_size, layer_size, head_size = sizes[0], sizes[1], sizes[2]
    H, head_width = dims[0], 2 * (dims[1] + dims[2])
    scratch, gate_up = scratches[thread], gates_ups[thread]
    by_rows = _items(M, _ROWS)
    base = np.int64(0)  # Numba would compile each phase for a literal 0, too
    ticket = take(sync)
    if wide:
        block = block_rows(M, threads)
        count = _items(M, block)
        # Item after item of rows: to the first layer's heads, then from each layer's heads to those of the next one.
        for layer in range(-1, len(table)):
            at = table[max(layer, 0)]
            if layer >= 0:
                ticket, base = head_phase(
                    sync, ticket, base, M, segments, S, layer * layer_size, row_size, head_size, places, dims, w,
                    at[0], scales, at[1], width, normed, z, small, at[9], mixed, gate_up, scratch,
                )  # fmt: skip
            while ticket < base + count:
                wait_for(sync, base)
                first = (ticket - base) * block
                last = min(first + block, M)
                if layer < 0:
                    embed(x, row, width, embedding, ids, first, last)
                else:
                    output_and_mlp(
                        x, first, last, width, y_width, inner, mixed, small, at[10], eps, normed, w, scales, at[2:8],
                        act, gate_up, scratch,
                    )  # fmt: skip
                if layer + 1 < len(table):
                    after = table[layer + 1]
                    norm_and_gates(
                        x, first, last, width, small, after[8], eps, normed, H, z_width, w, after[0], scales, after[1],
                        z, scratch,
                    )  # fmt: skip
                ticket = finish(sync)
            base += count
    for layer in range(len(table) if wide else 0, len(table)):
        at = table[layer]
        while ticket < base + by_rows:
            wait_for(sync, base)
            first = (ticket - base) * _ROWS
            for t in range(first, min(first + _ROWS, M)):
                if layer == 0:
                    embed(x, row, width, embedding, ids, t, t + 1)
                rms_norm(x, t * row, width, small, at[8], eps, normed, t)
            ticket = finish(sync)
        base += by_rows
        ticket, base = _linear_phase(
            sync, ticket, base, threads, w, at[0], scales, at[1], z_width, width, normed, M, z, z_row, False, scratch
        )
        units = H * n
        # A head's tokens of a prompt are work for one thread; those of one token each go by the sequence, as they lie.
        share = 1 if n < M else -(-H // 2)
        count = _items(units, share)
        while ticket < base + count:
            wait_for(sync, base)
            first = (ticket - base) * share
            for unit in range(first, min(first + share, units)):
                i, head = unit // H, unit % H
                o = segments[0, i] * row_size + layer * layer_size + head * head_size
                mix_head(
                    S, o, places, dims, segments[1, i], segments[2, i], segments[2, i + 1], z, head * head_width, z_row,
                    z, H * head_width, z_row, head, small, at[9], mixed, scratch, 0,
                )  # fmt: skip
            ticket = finish(sync)
        base += count
        ticket, base = _settle_phase(sync, ticket, base, mixed, M, y_width)
        ticket, base = _linear_phase(
            sync, ticket, base, threads, w, at[2], scales, at[3], width, y_width, mixed, M, x, row, True, scratch
        )
        while ticket < base + by_rows:
            wait_for(sync, base)
            first = (ticket - base) * _ROWS
            for t in range(first, min(first + _ROWS, M)):
                rms_norm(x, t * row, width, small, at[10], eps, normed, t)
            ticket = finish(sync)
        base += by_rows
        ticket, base = _swiglu_phase(
            sync, ticket, base, threads, w, at[4], scales, at[5], width, inner, normed, M, act, gate_up, scratch
        )
        ticket, base = _settle_phase(sync, ticket, base, act, M, inner)
        ticket, base = _linear_phase(
            sync, ticket, base, threads, w, at[6], scales, at[7], width, inner, act, M, x, row, True, scratch
        )
    count = _items(R + E, _ROWS)
    while ticket < base + count:
        wait_for(sync, base)
        first = (ticket - base) * _ROWS
        for i in range(first, min(first + _ROWS, R + E)):
            if i < R:
                rms_norm(x, wanted[i] * row, width, small, ends[2], eps, chosen, i)
            else:
                rms_norm(x, wanted[i] * row, width, small, ends[2], eps, final, i - R)
        ticket = finish(sync)
    base += count
    ticket, base = _linear_phase(
        sync, ticket, base, threads, w, ends[0], scales, ends[1], V, width, chosen, R, logits,
        padded(V), False, scratch,
    )  # fmt: skip
    wait_for(sync, base)


@njit(nogil=True, cache=True)
def _serve(
    sync: Any, member: int, pipe: int, byte: Any, plan: Any, ids: Any, segments: Any, wanted: Any, S: Any, sizes: Any,
    places: Any, dims: Any, widths: Any, eps: float, table: Any, ends: Any, embedding: Any, w: Any, scales: Any,
    small: Any, x: Any, normed: Any, z: Any, mixed: Any, act: Any, chosen: Any, final: Any, logits: Any,
    gates_ups: Any, scratches: Any,
) -> None:  # fmt: skip
    step = np.int64(0)
    while step >= 0:
        # The caller's thread does but the step that it has opened.
        step = enter(sync, step, member, pipe, byte) if member > 0 else np.int64(-1)
        if member == 0 or step >= 0:
            _work(
                member, sync, plan, ids, segments, wanted, S, sizes, places, dims, widths, eps, table, ends, embedding,
                w, scales, small, x, normed, z, mixed, act, chosen, final, logits, gates_ups, scratches,
            )  # fmt: skip
        if step >= 0:
            leave(sync)
