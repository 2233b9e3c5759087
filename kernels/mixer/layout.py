"""Where everything a sequence remembers lies in its state row: one flat float32 vector for all layers.

A row is what the state pool hands out, parks, copies and scrubs: saving a conversation is one copy of it. Every head's
state is contiguous, so that a kernel works on a head with one pointer, and starts at a multiple of 64 bytes:

    A [d, m] | h [C - 1, d] | c [C - 1, m] | b [m] | e [m] | a [1] | tail [taps - 1, 2 m + d]

with the names of `LatticeState`; `tail` holds the head's own channels q, k, v. C - 1 rows are enough: a chunk's last
token turns them into a new anchor. How many are in use follows from the sequence's position, which is not in the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lattice_serve.kernels.lattice import LatticeState
from lattice_serve.kernels.mixer.reference import MixerState
from lattice_serve.kernels.mixer.shape import MixerShape

ALIGNMENT = 16
"""Floats in 64 bytes."""


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Offsets, in floats, into a state row of `layers` layers of one shape."""

    shape: MixerShape
    layers: int

    @property
    def channels(self) -> int:
        """Convolution channels of one head."""
        return 2 * self.shape.m + self.shape.d

    @property
    def offsets(self) -> tuple[int, int, int, int, int, int, int]:
        """Of A, h, c, b, e, a and tail in a head's block."""
        d, m, C = self.shape.d, self.shape.m, self.shape.C
        h = d * m
        c = h + (C - 1) * d
        b = c + (C - 1) * m
        return 0, h, c, b, b + m, b + 2 * m, b + 2 * m + 1

    @property
    def head_size(self) -> int:
        size = self.offsets[-1] + (self.shape.taps - 1) * self.channels
        return -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def layer_size(self) -> int:
        return self.shape.H * self.head_size

    @property
    def row_size(self) -> int:
        """Floats a sequence."""
        return self.layers * self.layer_size

    @property
    def row_bytes(self) -> int:
        return 4 * self.row_size

    def blocks(self, row: Tensor, layer: int) -> Tensor:
        """View [H, head_size] of one layer of a row [row_size]."""
        return row[layer * self.layer_size : (layer + 1) * self.layer_size].view(self.shape.H, self.head_size)

    def load(self, row: Tensor, layer: int, position: int) -> MixerState:
        """The state of one layer, B = 1, as tensors of their own."""
        s = self.shape
        H, d, m, C = s.H, s.d, s.m, s.C
        sizes = (d * m, (C - 1) * d, (C - 1) * m, m, m, 1, (s.taps - 1) * self.channels)
        block = self.blocks(row, layer)
        A, h, c, b, e, a, tail = block[:, : sum(sizes)].clone().split(sizes, dim=1)
        lattice = LatticeState.at_chunk_start(A.reshape(1, H, d, m), C, position=position)
        used = lattice.pending
        if used:  # what a finished chunk left in the row means nothing
            lattice.h[:, :, :used] = h.reshape(1, H, C - 1, d)[:, :, :used]
            lattice.c[:, :, :used] = c.reshape(1, H, C - 1, m)[:, :, :used]
            lattice.a, lattice.b, lattice.e = a.reshape(1, H), b.reshape(1, H, m), e.reshape(1, H, m)
        # [H, taps - 1, q|k|v of the head] -> [1, taps - 1, q of all heads | k | v]
        parts = tail.reshape(H, s.taps - 1, self.channels).split((m, m, d), dim=2)
        tail = torch.cat([part.movedim(0, 1).flatten(1) for part in parts], dim=1)
        return MixerState(lattice=lattice, tail=tail[None])

    def store(self, row: Tensor, layer: int, state: MixerState) -> None:
        """Write the state of one layer, B = 1, into a row."""
        s, lattice = self.shape, state.lattice
        rows = slice(0, s.C - 1)
        parts = state.tail[0].split((s.H * s.m, s.H * s.m, s.H * s.d), dim=1)
        tail = torch.cat([part.unflatten(1, (s.H, -1)).movedim(1, 0) for part in parts], dim=2)
        pieces = (
            lattice.anchor,
            lattice.h[:, :, rows],
            lattice.c[:, :, rows],
            lattice.b,
            lattice.e,
            lattice.a,
            tail[None],
        )
        flat = torch.cat([piece.reshape(s.H, -1) for piece in pieces], dim=1)
        block = self.blocks(row, layer)
        block.zero_()
        block[:, : flat.shape[1]] = flat
