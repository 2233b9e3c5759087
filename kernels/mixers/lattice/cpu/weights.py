"""How a mixer's projections and small weights lie for the CPU kernel: head by head, in whole vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.shape import MixerWeights
from lattice_serve.kernels.mixers.lattice.state import OBJECTIVES
from lattice_serve.kernels.numba.lanes import LANES


@dataclass(frozen=True, slots=True)
class MixerBlock:
    """How `mix_head` wants a mixer's projections and weights: head by head, lines filled up to whole vectors.

    A token's z is, for each head, q [m] | k [m] | v [d] | output gate [d], then gamma [H] | mu [H]; its output is y [d]
    for each head.
    """

    layout: StateLayout

    @property
    def in_width(self) -> int:
        layout = self.layout
        return layout.shape.H * (layout.channels + layout.d + 2)

    @property
    def out_width(self) -> int:
        return self.layout.shape.H * self.layout.d

    @property
    def dims(self) -> Any:
        s = self.layout.shape
        objective = OBJECTIVES.index(s.objective)
        numbers = (s.H, self.layout.d, self.layout.m, s.d, s.C, s.taps, objective, s.use_forget_gate)
        return np.array(numbers, dtype=np.int64)

    @property
    def places(self) -> Any:
        return np.array(self.layout.offsets, dtype=np.int64)

    @property
    def scratch_size(self) -> int:
        layout = self.layout
        d, m = layout.d, layout.m
        return LANES * (3 * m + d + max(d, m)) + 4 * layout.shape.C + 5 * LANES

    def inputs(self, weight: Tensor) -> Tensor:
        """Rows [in_width of the shape, ...] of an input projection, or columns of z, in the order of the block."""
        s, fill = self.layout.shape, self._fill
        q, k, v, gate, gates = weight.split((s.H * s.m, s.H * s.m, s.H * s.d, s.H * s.d, 2 * s.H))
        heads = [fill(part.unflatten(0, (s.H, -1))) for part in (q, k, v, gate)]
        return torch.cat((torch.cat(heads, dim=1).flatten(0, 1), gates))

    def outputs(self, weight: Tensor) -> Tensor:
        """Rows [out_width of the shape, ...], filled up."""
        return self._fill(weight.unflatten(0, (self.layout.shape.H, -1))).flatten(0, 1)

    def small(self, weights: MixerWeights) -> Any:
        """Convolution, gate biases, norm, floor of the forget gate and epsilon: float32 [..]."""
        s = self.layout.shape
        q, k, v = weights.conv.detach().float().split((s.H * s.m, s.H * s.m, s.H * s.d))
        conv = torch.cat([self._fill(part.unflatten(0, (s.H, -1))) for part in (q, k, v)], dim=1).mT
        norm = self._fill(weights.norm.detach().float()[None])[0]
        numbers = torch.tensor([s.mu_floor, s.norm_eps])
        return torch.cat((conv.flatten(), weights.gate_bias.detach().float(), norm, numbers)).numpy()

    def _fill(self, lines: Tensor) -> Tensor:
        """[H, n, ...] -> [H, padded n, ...], zeros behind."""
        missing = -lines.shape[1] % LANES
        return torch.cat((lines, lines.new_zeros(len(lines), missing, *lines.shape[2:])), dim=1) if missing else lines
