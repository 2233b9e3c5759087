"""A step of the whole network on the CPU: one compiled function, shared by a team of threads.

    x = embedding[ids];  for each layer:  x += out_proj(mix(in_proj(norm(x))));  x += down(swiglu(gate_up(norm(x))))
    logits = head(norm(x)) of the rows that are wanted

Each line of work is a phase of the team; its items are rows, panels of a weight, or heads. Which thread does an item,
how many rows there are and how a sequence was cut into steps make no difference to any bit of the result. The mixer is
the family's: `mixers.base.mix_head` is compiled for the type of the network's `mixer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from numba import njit
from torch import Tensor

from lattice_serve.kernels.decoder.cpu_network import Network, matrix, new_batch, new_buffers, pack_weights, sizes_of
from lattice_serve.kernels.decoder.cpu_phases import (
    ITEM_ROWS,
    block_rows,
    embed,
    head_phase,
    item_count,
    linear_phase,
    norm_and_shared,
    output_and_mlp,
    quantize_phase,
    swiglu_phase,
)
from lattice_serve.kernels.decoder.weights import DecoderWeights
from lattice_serve.kernels.linear.operands import Output
from lattice_serve.kernels.mixers.base import HeadInputs, StateLayout, mix_head
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.numba.features import Products, Stored, available_products, vectors
from lattice_serve.kernels.numba.lanes import padded, spread
from lattice_serve.kernels.numba.thread_team import ThreadTeam, enter, finish, leave, take, wait_for
from lattice_serve.kernels.numba.types import Floats, Ints, UBytes
from lattice_serve.kernels.numba.vector import pointer
from lattice_serve.kernels.pointwise.cpu import rms_norm

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
        weights (`decoder.cpu_phases`): fewer rows would wait for the weights.
        """
        stored: Stored = quantization or ("float32" if weights.head.dtype == torch.float32 else "bfloat16")
        available = available_products(stored)
        products = products or available[0]
        if products not in available:
            raise ValueError(f"products: {stored} is multiplied here by {', '.join(available)}, not {products}")
        self._parallel_from, self._wide_from = parallel_from, wide_from
        picked = ", ".join(filter(None, (vectors(), _NAMES[products])))
        self.arithmetic = f"{get_host_cpu_name()}, {picked}"
        """What bits depend on, beside weights and tokens: each maker of processors estimates reciprocals its way."""
        self.name = f"{picked}, {threads} {'thread' if threads == 1 else 'threads'}"
        """What it runs on."""
        mixer = layout.on_cpu()
        self._batch, self._sizes = new_batch(max_tokens), sizes_of(weights, mixer)
        self._pool, self._row_size = pool, layout.row_size
        packed = pack_weights(weights, mixer, quantization)
        buffers = new_buffers(self._sizes, mixer, products, max_tokens, threads)
        self._logits, self._final = (flat.reshape(max_tokens, -1) for flat in (buffers.logits, buffers.final))
        self.nbytes = sum(array.nbytes for array in (packed.strips, packed.scales, packed.vectors))
        self._products = sum(matrix.numel() for layer in weights.layers for matrix in (
            layer.in_proj, layer.out_proj, layer.gate_up_proj, layer.down_proj))  # fmt: skip
        network = Network(self._batch, self._sizes, mixer.compiled, pool.numpy().reshape(-1), packed, buffers)
        self.team = ThreadTeam(threads, _serve, (network,))

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Runs the tokens `ids` of all segments, whose state rows are updated.

        wanted, hidden: indices of tokens. Returns logits [len(wanted), V] of the first and final hidden states
        [len(hidden), hidden_size] of the second, both float32 and good until the next call. Raises ValueError for what
        does not fit; nothing has happened then.
        """
        batch, V = self._batch, self._sizes.vocab
        M, n, R, E = len(ids), len(segments.rows), len(wanted), len(hidden)
        if not 0 < M == segments.starts[-1] <= len(batch.ids) or max(ids) >= V or min(ids) < 0:
            raise ValueError(f"ids: give 1 to {len(batch.ids)} ids below {V}, as many as segments have")
        for name, indices in (("wanted", wanted), ("hidden", hidden)):
            if indices and not (min(indices) >= 0 and max(indices) < M >= len(indices)):
                raise ValueError(f"{name}: give at most {M} places, all below {M}")
        segments.check(self._pool, self._row_size)
        batch.ids[:M] = ids
        batch.rows[:n], batch.positions[:n], batch.starts[: n + 1] = segments.rows, segments.positions, segments.starts
        batch.wanted[:R], batch.wanted[R : R + E] = wanted, hidden
        threads = self.team.size if M * self._products >= self._parallel_from else 1
        batch.step[0] = M, n, R, E, threads, n < M >= self._wide_from * threads
        self.team.run(threads)
        logits, final = self._logits[:R, :V], self._final[:E, : self._sizes.hidden]
        return torch.from_numpy(logits), torch.from_numpy(final)


@njit(inline="always")
def _mix(network: Network, layer: int, first: int, last: int, scratch: Floats) -> None:
    """Runs units `first` to `last` of a layer's mixer, a sequence and a head each, on z of all heads."""
    batch, mixer, weights = network.batch, network.mixer, network.weights
    heads, stride = mixer.heads, spread(network.sizes.in_width)
    for unit in range(first, last):
        i, head = unit // heads, unit % heads
        o = batch.rows[i] * mixer.row_size + layer * mixer.layer_size + head * mixer.head_size
        z = network.buffers.z
        inputs = HeadInputs(
            pointer(z, head * mixer.head_width), stride, pointer(z, heads * mixer.head_width), stride
        )  # fmt: skip
        mix_head(
            mixer, pointer(network.pool, o), batch.positions[i], batch.starts[i], batch.starts[i + 1], inputs, head,
            pointer(weights.vectors, weights.layers[layer].mixer), network.buffers.mixed, pointer(scratch, 0),
        )  # fmt: skip


@njit(inline="always")
def _layers_by_weights(sync: Ints, ticket: int, network: Network, panels: Floats, scratch: Floats) -> tuple[int, int]:
    """All layers, weights shared out."""
    batch, sizes, mixer, _, weights, buffers = network
    x, normed, mixed, active, vectors, eps = (
        buffers.x, buffers.normed, buffers.mixed, buffers.active, weights.vectors, weights.eps,
    )  # fmt: skip
    step, width, row, z_row = batch.step[0], sizes.hidden, spread(sizes.hidden), spread(sizes.in_width)
    M, n, threads = step.tokens, step.segments, step.threads
    by_rows = item_count(M, ITEM_ROWS)
    base = np.int64(0)  # Numba would compile each phase for a literal 0, too
    for layer in range(len(weights.layers)):
        place = weights.layers[layer]
        while ticket < base + by_rows:
            wait_for(sync, base)
            first = (ticket - base) * ITEM_ROWS
            for t in range(first, min(first + ITEM_ROWS, M)):
                if layer == 0:
                    embed(weights, batch, x, width, t, t + 1)
                rms_norm(x, t * row, width, vectors, place.mixer_norm, eps, normed, t)
            ticket = finish(sync)
        base += by_rows
        w, out = matrix(weights, place.in_proj), Output(pointer(buffers.z, 0), z_row, False)
        ticket, base = linear_phase(sync, ticket, base, threads, w, normed, M, out, scratch)
        # A head's tokens of a prompt are work for one thread; those of one token each go by the sequence, as they lie.
        units, share = mixer.heads * n, 1 if n < M else -(-mixer.heads // 2)
        count = item_count(units, share)
        while ticket < base + count:
            wait_for(sync, base)
            first = (ticket - base) * share
            _mix(network, layer, first, min(first + share, units), scratch)
            ticket = finish(sync)
        base += count
        ticket, base = quantize_phase(sync, ticket, base, mixed, M, sizes.out_width)
        w, out = matrix(weights, place.out_proj), Output(pointer(x, 0), row, True)
        ticket, base = linear_phase(sync, ticket, base, threads, w, mixed, M, out, scratch)
        while ticket < base + by_rows:
            wait_for(sync, base)
            first = (ticket - base) * ITEM_ROWS
            for t in range(first, min(first + ITEM_ROWS, M)):
                rms_norm(x, t * row, width, vectors, place.mlp_norm, eps, normed, t)
            ticket = finish(sync)
        base += by_rows
        w, inner = matrix(weights, place.gate_up_proj), sizes.intermediate
        ticket, base = swiglu_phase(sync, ticket, base, threads, w, normed, M, active, inner, panels, scratch)
        ticket, base = quantize_phase(sync, ticket, base, active, M, inner)
        w = matrix(weights, place.down_proj)
        ticket, base = linear_phase(sync, ticket, base, threads, w, active, M, out, scratch)
    return ticket, base


@njit(inline="always")
def _layers_by_rows(sync: Ints, ticket: int, network: Network, panels: Floats, scratch: Floats) -> tuple[int, int]:
    """All layers, rows shared out: to the first layer's heads, then from each layer's heads to the next layer's."""
    step, layers = network.batch.step[0], len(network.weights.layers)
    M = step.tokens
    block = block_rows(M, step.threads)
    count = item_count(M, block)
    base = np.int64(0)
    for layer in range(-1, layers):
        if layer >= 0:
            ticket, base = head_phase(sync, ticket, base, network, layer, panels, scratch)
        while ticket < base + count:
            wait_for(sync, base)
            first = (ticket - base) * block
            last = min(first + block, M)
            if layer < 0:
                embed(network.weights, network.batch, network.buffers.x, network.sizes.hidden, first, last)
            else:
                output_and_mlp(network, layer, first, last, panels, scratch)
            if layer + 1 < layers:
                norm_and_shared(network, layer + 1, first, last, scratch)
            ticket = finish(sync)
        base += count
    return ticket, base


@njit(inline="always")
def _work(thread: int, sync: Ints, network: Network) -> None:
    """One thread's share of a step."""
    batch, sizes, _, _, weights, buffers = network
    step, panels, scratch = batch.step[0], buffers.panels[thread], buffers.scratch[thread]
    ticket = take(sync)
    if step.rows_shared > 0:
        ticket, base = _layers_by_rows(sync, ticket, network, panels, scratch)
    else:
        ticket, base = _layers_by_weights(sync, ticket, network, panels, scratch)
    R, E, width, row = step.wanted, step.hidden, sizes.hidden, spread(sizes.hidden)
    count = item_count(R + E, ITEM_ROWS)
    while ticket < base + count:
        wait_for(sync, base)
        first = (ticket - base) * ITEM_ROWS
        for i in range(first, min(first + ITEM_ROWS, R + E)):
            o = batch.wanted[i] * row
            if i < R:
                rms_norm(buffers.x, o, width, weights.vectors, weights.norm, weights.eps, buffers.chosen, i)
            else:
                rms_norm(buffers.x, o, width, weights.vectors, weights.norm, weights.eps, buffers.final, i - R)
        ticket = finish(sync)
    base += count
    w, out = matrix(weights, weights.head[0]), Output(pointer(buffers.logits, 0), padded(sizes.vocab), False)
    ticket, base = linear_phase(sync, ticket, base, step.threads, w, buffers.chosen, R, out, scratch)
    wait_for(sync, base)


@njit(nogil=True, cache=True)
def _serve(sync: Ints, member: int, pipe: int, byte: UBytes, network: Network) -> None:
    """What each thread of the team runs: `ThreadTeam` says when."""
    step = np.int64(0)
    while step >= 0:
        # The caller's thread does but the step that it has opened.
        step = enter(sync, step, member, pipe, byte) if member > 0 else np.int64(-1)
        if member == 0 or step >= 0:
            _work(member, sync, network)
        if step >= 0:
            leave(sync)
