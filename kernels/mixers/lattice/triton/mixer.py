"""The Lattice mixer in Triton as decoders take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lattice_serve.kernels.mixers.chunks import DeviceSegments
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.shape import MixerWeights
from lattice_serve.kernels.mixers.lattice.triton.decode import mix_decode
from lattice_serve.kernels.mixers.lattice.triton.prefill import mix_prefill


@dataclass(frozen=True, slots=True)
class LatticeOnGpu:
    """`mixers.base.GpuMixer` of the family."""

    layout: StateLayout

    def pack_weights(self, weights: MixerWeights) -> MixerWeights:
        return weights.by_taps()

    def decode(
        self, z: Tensor, pool: Tensor, layer: int, rows: Tensor, positions: Tensor, weights: MixerWeights, out: Tensor
    ) -> Tensor:
        return mix_decode(z, pool, layer, rows, positions, weights, self.layout, out, ahead=True)

    def prefill(
        self, z: Tensor, pool: Tensor, layer: int, segments: DeviceSegments, weights: MixerWeights, out: Tensor
    ) -> Tensor:
        return mix_prefill(z, pool, layer, segments, weights, self.layout, out)
