"""One layer's mixer on the CPU by itself, on one thread."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lattice_serve.kernels.mixers.base import HeadInputs, mix_head
from lattice_serve.kernels.mixers.lattice import MixerWeights, StateLayout
from lattice_serve.kernels.mixers.lattice.cpu.weights import LatticeHeads
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.numba.types import Floats, Ints
from lattice_serve.kernels.numba.vector import pointer


class CpuMixer:
    def __init__(self, layout: StateLayout, layer: int, weights: MixerWeights) -> None:
        self._layout, self._layer, self._mixer = layout, layer, layout.on_cpu()
        self._weights = self._mixer.pack_weights(weights)

    def __call__(self, z: Tensor, pool: Tensor, segments: Segments, out: Tensor) -> Tensor:
        """z [N, in_width] -> out [N, out_width], both float32; state rows of `pool` [rows, row_size] updated in place.

        Raises ValueError when the pool does not fit.
        """
        s, mixer = self._layout.shape, self._mixer
        segments.check(pool, self._layout.row_size)
        inputs = mixer.pack_inputs(z.mT).mT.contiguous()
        outputs = np.empty((len(z), mixer.out_width), dtype=np.float32)
        _mix(
            mixer.compiled, pool.numpy().reshape(-1), self._layer, segments.rows, segments.positions, segments.starts,
            inputs.numpy().reshape(-1), mixer.in_width, self._weights, outputs.reshape(-1),
            np.empty(mixer.scratch_size, dtype=np.float32),
        )  # fmt: skip
        out.copy_(torch.from_numpy(outputs).unflatten(1, (s.H, -1))[..., : s.d].flatten(1))
        return out


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _mix(
    mixer: LatticeHeads, pool: Floats, layer: int, rows: Ints, positions: Ints, starts: Ints, z: Floats, stride: int,
    weights: Floats, out: Floats, scratch: Floats,
) -> None:  # fmt: skip
    shared = mixer.heads * mixer.head_width
    for head in range(mixer.heads):
        inputs = HeadInputs(pointer(z, head * mixer.head_width), stride, pointer(z, shared), stride)
        for i in range(len(rows)):
            o = rows[i] * mixer.row_size + layer * mixer.layer_size + head * mixer.head_size
            mix_head(
                mixer, pointer(pool, o), positions[i], starts[i], starts[i + 1], inputs, head, pointer(weights, 0), out,
                pointer(scratch, 0),
            )  # fmt: skip
