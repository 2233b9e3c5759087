"""How the CPU kernel takes a Lattice mixer's projections and small weights: head by head, in whole vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lattice_serve.kernels.mixers.lattice.layout import HeadOffsets, StateLayout
from lattice_serve.kernels.mixers.lattice.shape import MixerWeights
from lattice_serve.kernels.mixers.lattice.state import OBJECTIVES
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.types import Floats


class LatticeHeads(NamedTuple):
    """The dimensions that the compiled mixer goes by; letters as in `MixerShape`, sizes in floats.

    The first five are what `mixers.base.CpuMixer` asks of every family.
    """

    heads: int
    head_width: int
    """Columns of z of a head: q [m] | k [m] | v [d] | output gate [d]."""
    head_size: int
    layer_size: int
    row_size: int
    d: int
    """Filled up to whole vectors, as is m."""
    m: int
    values: int
    """d of the model, which the output norm divides by."""
    C: int
    taps: int
    objective: int
    """An index into `OBJECTIVES`."""
    use_forget_gate: bool
    at: HeadOffsets
    """Where a head's block of a state row has its parts."""

    conv: int
    """Where a head's convolution begins in the small weights, for head 0: [taps, 2 m + d] for each head."""
    gate_bias: int
    norm: int
    mu_floor: int
    norm_eps: int


@dataclass(frozen=True, slots=True)
class LatticeOnCpu:
    """What the CPU's decoder asks of the family: `mixers.base.CpuMixer`.

    A token's z is, for each head, q [m] | k [m] | v [d] | output gate [d], then gamma [H] | mu [H]; its output is y [d]
    for each head. d and m are filled up to whole vectors.
    """

    layout: StateLayout

    @property
    def in_width(self) -> int:
        return self.compiled.heads * (self.compiled.head_width + 2)

    @property
    def out_width(self) -> int:
        return self.compiled.heads * self.layout.d

    @property
    def compiled(self) -> LatticeHeads:
        layout, s = self.layout, self.layout.shape
        gate_bias = s.H * s.taps * layout.channels
        norm = gate_bias + 2 * s.H
        return LatticeHeads(
            heads=s.H,
            head_width=layout.channels + layout.d,
            head_size=layout.head_size,
            layer_size=layout.layer_size,
            row_size=layout.row_size,
            d=layout.d,
            m=layout.m,
            values=s.d,
            C=s.C,
            taps=s.taps,
            objective=OBJECTIVES.index(s.objective),
            use_forget_gate=s.use_forget_gate,
            at=layout.offsets,
            conv=0,
            gate_bias=gate_bias,
            norm=norm,
            mu_floor=norm + layout.d,
            norm_eps=norm + layout.d + 1,
        )

    @property
    def scratch_size(self) -> int:
        """Floats that `mix_head` needs of its thread."""
        d, m = self.layout.d, self.layout.m
        return LANES * (3 * m + d + max(d, m)) + 4 * self.layout.shape.C + 5 * LANES

    def pack_inputs(self, weight: Tensor) -> Tensor:
        """Returns rows [in_width of the shape, ...] of an input projection, or columns of z, in the order of z here."""
        s, fill = self.layout.shape, self._fill
        q, k, v, gate, gates = weight.split((s.H * s.m, s.H * s.m, s.H * s.d, s.H * s.d, 2 * s.H))
        heads = [fill(part.unflatten(0, (s.H, -1))) for part in (q, k, v, gate)]
        return torch.cat((torch.cat(heads, dim=1).flatten(0, 1), gates))

    def pack_outputs(self, weight: Tensor) -> Tensor:
        """Returns rows [out_width of the shape, ...], each head's filled up to whole vectors."""
        return self._fill(weight.unflatten(0, (self.layout.shape.H, -1))).flatten(0, 1)

    def pack_weights(self, weights: MixerWeights) -> Floats:
        """Returns a layer's small weights, float32 [n]: convolution, gate biases, norm, floor of mu, epsilon."""
        s = self.layout.shape
        q, k, v = weights.conv.detach().float().split((s.H * s.m, s.H * s.m, s.H * s.d))
        conv = torch.cat([self._fill(part.unflatten(0, (s.H, -1))) for part in (q, k, v)], dim=1).mT
        norm = self._fill(weights.norm.detach().float()[None])[0]
        numbers = torch.tensor([s.mu_floor, s.norm_eps])
        packed: Floats = torch.cat((conv.flatten(), weights.gate_bias.detach().float(), norm, numbers)).numpy()
        return packed

    def _fill(self, lines: Tensor) -> Tensor:
        """[H, n, ...] -> [H, padded n, ...], zeros behind."""
        missing = -lines.shape[1] % LANES
        return torch.cat((lines, lines.new_zeros(len(lines), missing, *lines.shape[2:])), dim=1) if missing else lines
