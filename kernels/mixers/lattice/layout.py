"""Where everything a sequence remembers lies in its state row: one flat float32 vector for all layers.

A row is what the state pool hands out, parks, copies and scrubs: saving a conversation is one copy of it. Every head's
state is contiguous, so that a kernel works on a head with one pointer:

    A^T [m, d] | h [C - 1, d] | c / a [C - 1, m] | b / a [m] | e / a^2 [m] | a [1] | tail [taps - 1, 2 m + d]

with the names of `LatticeState`. Only directions of the memory R matter, so it is kept relative to a, the product of
the chunk's forget gates: R_t / a_t = R_{t-1} / a_{t-1} + Delta_t / a_t, and a gate is nothing but a step gamma / a that
grows. So a line, once written, stays as it is to the end of the chunk. a is at least 1e-12 (`MixerShape.mu_floor`), and
float32 has room for its inverse and the square of that.

`tail` is a ring: the inputs q, k, v of the head's own channels at token p lie in its line p % (taps - 1). d, m and 1
are filled up with zeros to whole vectors of `LANES` floats, so each line starts at a multiple of 64 bytes. C - 1 rows
are enough: a chunk's last token turns them into a new anchor. How many are in use follows from the sequence's position,
which is not in the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lattice_serve.kernels.mixers.lattice.reference import MixerState
from lattice_serve.kernels.mixers.lattice.shape import MixerShape, MixerWeights
from lattice_serve.kernels.mixers.lattice.state import LatticeState
from lattice_serve.kernels.numba.lanes import LANES, padded

if TYPE_CHECKING:
    from lattice_serve.kernels.mixers.lattice.cpu.weights import LatticeOnCpu
    from lattice_serve.kernels.mixers.lattice.triton.mixer import LatticeOnGpu


class HeadOffsets(NamedTuple):
    """Where a head's block has its parts, in floats."""

    A: int
    h: int
    c: int
    b: int
    e: int
    a: int
    tail: int


@dataclass(frozen=True)
class StateLayout:
    """Offsets, in floats, into a state row of `layers` layers of one shape: `mixers.base.StateLayout`.

    They are worked out once, for every launch asks.
    """

    shape: MixerShape
    layers: int

    @property
    def d(self) -> int:
        """Floats of a line of values."""
        return padded(self.shape.d)

    @property
    def m(self) -> int:
        """Floats of a line of slots."""
        return padded(self.shape.m)

    @property
    def channels(self) -> int:
        """Floats of a line of the convolution's tail."""
        return 2 * self.m + self.d

    @cached_property
    def offsets(self) -> HeadOffsets:
        d, m, C = self.d, self.m, self.shape.C
        h = m * d
        c = h + (C - 1) * d
        b = c + (C - 1) * m
        return HeadOffsets(A=0, h=h, c=c, b=b, e=b + m, a=b + 2 * m, tail=b + 2 * m + LANES)

    @cached_property
    def head_size(self) -> int:
        return self.offsets.tail + (self.shape.taps - 1) * self.channels

    @cached_property
    def layer_size(self) -> int:
        return self.shape.H * self.head_size

    @cached_property
    def row_size(self) -> int:
        """Floats a sequence."""
        return self.layers * self.layer_size

    @property
    def row_bytes(self) -> int:
        return 4 * self.row_size

    @property
    def chunk_size(self) -> int:
        return self.shape.C

    @property
    def out_width(self) -> int:
        return self.shape.out_width

    def initial(self, row: Tensor, layer: int, weights: MixerWeights) -> None:
        """Writes the state of a layer before the first token into row [row_size]: its learned memory."""
        self.store(row, layer, MixerState.initial(self.shape, weights, 1))

    def on_cpu(self) -> LatticeOnCpu:
        """Returns the mixer in Numba."""
        from lattice_serve.kernels.mixers.lattice.cpu.mix import LatticeOnCpu

        return LatticeOnCpu(self)

    def on_gpu(self) -> LatticeOnGpu:
        """Returns the mixer in Triton, which not every machine has."""
        from lattice_serve.kernels.mixers.lattice.triton.mixer import LatticeOnGpu

        return LatticeOnGpu(self)

    def blocks(self, row: Tensor, layer: int) -> Tensor:
        """View [H, head_size] of one layer of a row [row_size]."""
        return row[layer * self.layer_size : (layer + 1) * self.layer_size].view(self.shape.H, self.head_size)

    def load(self, row: Tensor, layer: int, position: int) -> MixerState:
        """The state of one layer, B = 1, as tensors of their own."""
        s = self.shape
        d, m, C = s.d, s.m, s.C
        A, h, c, b, e, a, tail = (part.clone() for part in self._parts(self.blocks(row, layer)))
        lattice = LatticeState.at_chunk_start(A[:, :m, :d].mT[None].contiguous(), C, position=position)
        used = lattice.pending
        if used:  # what a finished chunk left in the row means nothing
            decay = a[None, :, 0, :1]
            lattice.h[:, :, :used] = h[None, :, :used, :d]
            lattice.c[:, :, :used] = decay[..., None] * c[None, :, :used, :m]
            lattice.a, lattice.b = decay[..., 0], decay * b[None, :, 0, :m]
            lattice.e = decay.square() * e[None, :, 0, :m]
        # [H, taps - 1, q|k|v of the head] -> [1, taps - 1, q of all heads | k | v]
        parts = tail.roll(-self._ring(position), dims=1).split((self.m, self.m, self.d), dim=2)
        sizes = (m, m, d)
        joined = [part[..., :size].movedim(0, 1).flatten(1) for part, size in zip(parts, sizes, strict=True)]
        return MixerState(lattice=lattice, tail=torch.cat(joined, dim=1)[None])

    def store(self, row: Tensor, layer: int, state: MixerState) -> None:
        """Write the state of one layer, B = 1, into a row."""
        s, lattice = self.shape, state.lattice
        used = slice(0, s.C - 1)
        decay = lattice.a[0, :, None]
        parts = state.tail[0].split((s.H * s.m, s.H * s.m, s.H * s.d), dim=1)
        tail = [self.fill(part.unflatten(1, (s.H, -1)).movedim(1, 0)) for part in parts]
        lines = (
            lattice.anchor[0].mT,
            lattice.h[0, :, used],
            lattice.c[0, :, used] / decay[..., None],
            (lattice.b[0] / decay)[:, None],
            (lattice.e[0] / decay.square())[:, None],
            decay[..., None],
            torch.cat(tail, dim=2).roll(self._ring(lattice.position), dims=1),
        )
        block = self.blocks(row, layer)
        block.zero_()
        for place, line in zip(self._parts(block), lines, strict=True):
            place[:, : line.shape[1], : line.shape[2]] = line

    def fill(self, lines: Tensor) -> Tensor:
        """[..., n] -> [..., padded(n)], zeros behind."""
        return F.pad(lines, (0, -lines.shape[-1] % LANES))

    def _ring(self, position: int) -> int:
        """The tail's line of a sequence's next input, which is that of the oldest one."""
        return position % (self.shape.taps - 1) if self.shape.taps > 1 else 0

    def _parts(self, blocks: Tensor) -> list[Tensor]:
        """Views [H, lines, width] of blocks [H, head_size]."""
        C, taps = self.shape.C, self.shape.taps
        widths = (self.d, self.d, self.m, self.m, self.m, LANES, self.channels)
        counts = (self.m, C - 1, C - 1, 1, 1, 1, taps - 1)
        sizes = [count * width for count, width in zip(counts, widths, strict=True)]
        parts = blocks.split(sizes, dim=1)
        return [p.view(len(p), count, width) for p, count, width in zip(parts, counts, widths, strict=True)]
