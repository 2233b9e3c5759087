"""The mixer in torch: any device, differentiable, all sequences of a batch equally long.

Projection -> short convolution -> SiLU -> q, k to unit length -> Lattice recurrence -> per-head RMSNorm * SiLU(gate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from lattice_serve.kernels.mixers.lattice.chunk import lattice_chunk
from lattice_serve.kernels.mixers.lattice.shape import L2_EPS, MixerShape, MixerWeights
from lattice_serve.kernels.mixers.lattice.state import LatticeState
from lattice_serve.kernels.pointwise import l2_normalize, rms_norm, short_conv


@dataclass(slots=True, kw_only=True)
class MixerState:
    """State of B sequences in one layer."""

    lattice: LatticeState
    tail: Tensor
    """[B, taps - 1, conv_width], the last inputs of the short convolution."""

    @classmethod
    def initial(cls, shape: MixerShape, weights: MixerWeights, batch: int) -> MixerState:
        """Before the first token; differentiable in the learned initial memory."""
        anchor = weights.anchor
        anchor = anchor.float() if anchor.element_size() < 4 else anchor
        lattice = LatticeState.initial(anchor.expand(batch, -1, -1, -1), shape.C)
        return cls(lattice=lattice, tail=anchor.new_zeros(batch, shape.taps - 1, shape.conv_width))

    def to(self, device: str) -> MixerState:
        """The same values in float32 on another device, cut from the autograd graph."""
        lattice = self.lattice.map(lambda t: t.detach().to(device, torch.float32))
        return MixerState(lattice=lattice, tail=self.tail.detach().to(device, torch.float32))

    def detach(self) -> MixerState:
        return MixerState(lattice=self.lattice.detach(), tail=self.tail.detach())

    def where(self, rows: Tensor, other: MixerState) -> MixerState:
        """Rows of `other` where `rows` [B] bool is true, of this state elsewhere."""
        tail = torch.where(rows[:, None, None], other.tail, self.tail)
        return MixerState(lattice=self.lattice.where(rows, other.lattice), tail=tail)

    def split(self, parts: int) -> list[MixerState]:
        """This batch as `parts` batches of equal size, sharing its storage."""
        pieces = zip(self.lattice.split(parts), self.tail.tensor_split(parts), strict=True)
        return [MixerState(lattice=lattice, tail=tail) for lattice, tail in pieces]

    @classmethod
    def join(cls, states: Sequence[MixerState]) -> MixerState:
        """One batch of all `states`, which are at one position; a copy."""
        return cls(lattice=LatticeState.join([s.lattice for s in states]), tail=torch.cat([s.tail for s in states]))


def mix(z: Tensor, weights: MixerWeights, shape: MixerShape, state: MixerState) -> tuple[Tensor, MixerState]:
    """z [B, T, in_width], the input projection's output -> [B, T, out_width] in z's dtype and the state after it.

    `state` is left as it was. Computed in the state's dtype.
    """
    H, d, m = shape.H, shape.d, shape.m
    dtype = state.lattice.anchor.dtype
    conv_in, gate, gates = z.to(dtype).split((shape.conv_width, H * d, 2 * H), dim=-1)
    u, tail = short_conv(conv_in, weights.conv.to(dtype), state.tail)
    q, k, v = silu(u).split((H * m, H * m, H * d), dim=-1)
    q, k = (l2_normalize(x.unflatten(-1, (H, m)), L2_EPS) for x in (q, k))
    gamma, mu = (gates + weights.gate_bias.to(dtype)).sigmoid().chunk(2, dim=-1)
    f = shape.mu_floor
    mu = f + (1 - f) * mu if shape.use_forget_gate else torch.ones_like(mu)
    y, lattice = lattice_chunk(
        q, k, v.unflatten(-1, (H, d)), gamma, mu, state.lattice, chunk_size=shape.C, objective=shape.objective
    )
    y = rms_norm(y, weights.norm.to(dtype), shape.norm_eps) * silu(gate.unflatten(-1, (H, d)))
    return y.flatten(-2).to(z.dtype), MixerState(lattice=lattice, tail=tail)
