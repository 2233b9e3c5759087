"""What the compiled step of the CPU goes by: a batch, the packed weights, and room for activations, all by name.

Records and NamedTuples pass through Numba with their fields' names. What changes from step to step is written into the
arrays of `Batch`; all else stays the same for the life of a decoder.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from lattice_serve.kernels.decoder.weights import DecoderWeights
from lattice_serve.kernels.linear.activations import activations
from lattice_serve.kernels.linear.cpu import PANEL, scratch_size
from lattice_serve.kernels.linear.operands import Matrix
from lattice_serve.kernels.linear.packing import PLACE, Packer
from lattice_serve.kernels.mixers.base import CpuMixer
from lattice_serve.kernels.numba.features import Products
from lattice_serve.kernels.numba.lanes import LANES, aligned, padded, spread
from lattice_serve.kernels.numba.types import Floats, Ints, Record, Records, Rows, Strips
from lattice_serve.kernels.numba.vector import pointer

HEAD_ROWS = 512
"""Rows of a head that are projected and then mixed, where rows are shared out."""
BLOCK_ROWS = 256
"""Rows of a block, at the most, where rows are shared out."""
PANEL_ROWS = 8
"""Panels of gates and ups that are worked out before SwiGLU takes them, times rows, where these are few."""

_COUNTS = ("tokens", "segments", "wanted", "hidden", "threads", "rows_shared")
STEP = np.dtype([(name, np.int64) for name in _COUNTS], align=True)
"""Of a step: its tokens, segments, rows of logits and hidden states, threads, and whether they share out rows (1)."""
LAYER = np.dtype(
    [(name, PLACE) for name in ("in_proj", "out_proj", "gate_up_proj", "down_proj")]
    + [(name, np.int64) for name in ("mixer_norm", "mixer", "mlp_norm")],
    align=True,
)
"""Where a layer's matrices lie, and its vectors among those of all layers."""


class Batch(NamedTuple):
    step: Records
    """[1] of `STEP`."""
    ids: Ints
    """[max_tokens]"""
    rows: Ints
    """[max_tokens] state row of each segment."""
    positions: Ints
    """[max_tokens] tokens that each segment's sequence has seen."""
    starts: Ints
    """[max_tokens + 1] where each segment begins among the tokens."""
    wanted: Ints
    """[2 max_tokens] tokens whose logits are wanted, then those whose hidden states are."""


class Sizes(NamedTuple):
    """Columns of activations."""

    hidden: int
    in_width: int
    out_width: int
    intermediate: int
    vocab: int


class Weights(NamedTuple):
    embedding: Any
    """float32, or uint16 with the bits of bfloat16: [V padded(hidden)]."""
    layers: Records
    """[layers] of `LAYER`."""
    head: Records
    """[1] of `PLACE`."""
    norm: int
    """Where the last norm's weight lies among the vectors."""
    eps: Any
    """float32, of the norms."""
    strips: Strips
    scales: Floats
    vectors: Floats


class Buffers(NamedTuple):
    """Activations of a step."""

    x: Floats
    """The residual stream, [tokens, spread(hidden)]."""
    z: Floats
    """[tokens, spread(in_width)]; where rows are shared out, what heads share of it: [tokens, padded(shared)]."""
    normed: Rows
    mixed: Rows
    active: Rows
    chosen: Rows
    """Normed rows whose logits are wanted."""
    final: Floats
    """[hidden states wanted, padded(hidden)]"""
    logits: Floats
    """[wanted, padded(vocab)]"""
    panels: Floats
    """[threads, n]: panels of gates and ups, or rows of a head's z."""
    scratch: Floats
    """[threads, n]"""


class Network(NamedTuple):
    batch: Batch
    sizes: Sizes
    mixer: Any
    """`mixers.base.CpuMixer.compiled`: its type chooses the mixer that is compiled."""
    pool: Floats
    """State rows, [rows row_size]."""
    weights: Weights
    buffers: Buffers


@njit(inline="always")
def matrix(weights: Weights, place: Record) -> Matrix:
    strips, scales = pointer(weights.strips, place.strips), pointer(weights.scales, place.scales)
    return Matrix(strips, scales, place.N, place.K)


def new_batch(max_tokens: int) -> Batch:
    ids, rows, positions = (np.zeros(max_tokens, dtype=np.int64) for _ in range(3))
    starts, wanted = np.zeros(max_tokens + 1, dtype=np.int64), np.zeros(2 * max_tokens, dtype=np.int64)
    return Batch(np.zeros(1, dtype=STEP), ids, rows, positions, starts, wanted)


def sizes_of(weights: DecoderWeights, mixer: CpuMixer) -> Sizes:
    (V, hidden), inner = weights.head.shape, weights.layers[0].down_proj.shape[1]
    return Sizes(hidden, mixer.in_width, mixer.out_width, inner, V)


def pack_weights(weights: DecoderWeights, mixer: CpuMixer, quantization: Literal["int8"] | None) -> Weights:
    """Returns the weights as the step reads them; all but the embedding is a copy."""
    (_, hidden), inner = weights.head.shape, weights.layers[0].down_proj.shape[1]
    pack = Packer(quantization)
    layers, head = np.zeros(len(weights.layers), dtype=LAYER), np.zeros(1, dtype=PLACE)
    for layer, place in zip(weights.layers, layers, strict=True):
        gate, up = layer.gate_up_proj.chunk(2)
        missing = padded(inner) - inner
        # Vectors of outputs in turn, so that a panel has what belongs together.
        gate_up = torch.stack([F.pad(part, (0, 0, 0, missing)).view(-1, LANES, hidden) for part in (gate, up)], 1)
        pack.matrix(mixer.pack_inputs(layer.in_proj), place["in_proj"])
        pack.matrix(mixer.pack_outputs(layer.out_proj.mT).mT, place["out_proj"])
        pack.matrix(gate_up.flatten(0, 2), place["gate_up_proj"])
        pack.matrix(layer.down_proj, place["down_proj"])
        place["mixer_norm"] = pack.vector(layer.mixer_norm)
        place["mixer"] = pack.vector(mixer.pack_weights(layer.mixer))
        place["mlp_norm"] = pack.vector(layer.mlp_norm)
    pack.matrix(weights.head, head[0])
    norm = pack.vector(weights.norm)
    lines = weights.embedding.detach().contiguous()
    if hidden % LANES:
        lines = F.pad(lines, (0, padded(hidden) - hidden))
    return Weights(_array(lines), layers, head, norm, np.float32(weights.norm_eps), *pack.arrays())


def _array(lines: Tensor) -> Any:
    """A view, which keeps the tensor's memory."""
    return (lines.view(torch.uint16) if lines.dtype == torch.bfloat16 else lines).numpy().reshape(-1)


def new_buffers(sizes: Sizes, mixer: CpuMixer, products: Products, max_tokens: int, threads: int) -> Buffers:
    """Returns room for the largest step. Pages that are never written cost nothing."""
    x, z = (aligned(max_tokens * spread(width), np.float32) for width in (sizes.hidden, sizes.in_width))
    final, logits = (aligned(max_tokens * padded(width), np.float32) for width in (sizes.hidden, sizes.vocab))
    widths = (sizes.hidden, sizes.out_width, sizes.intermediate, sizes.hidden)
    normed, mixed, active, chosen = (activations(products, max_tokens, width) for width in widths)
    head_rows = spread(mixer.compiled.head_width) * min(HEAD_ROWS, max_tokens)
    panels = max(max(max_tokens, PANEL_ROWS) * PANEL, head_rows, 2 * spread(PANEL) * BLOCK_ROWS)
    scratch = padded(max(mixer.scratch_size, *map(scratch_size, widths)))
    of_threads = [aligned(threads * size, np.float32).reshape(threads, -1) for size in (panels, scratch)]
    return Buffers(x, z, normed, mixed, active, chosen, final, logits, *of_threads)
