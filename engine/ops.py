"""What runs the operations of a serving pass: chosen once, by the device.

Batches are ragged: activations are [N, width] float32, N the tokens of all segments, and the memory of each segment's
sequence is a row of the state pool, updated in place.
"""

from __future__ import annotations

from typing import Protocol

import numba
import torch
from torch import Tensor

from lattice_serve import kernels
from lattice_serve.engine.models.lattice import LatticeForCausalLM, Ops
from lattice_serve.kernels.linear import RowInvariantLinear
from lattice_serve.kernels.linear.cpu import PackedWeight
from lattice_serve.kernels.mixer import Segments, StateLayout, mix
from lattice_serve.kernels.mixer.cpu import CpuMixer
from lattice_serve.kernels.norm import cpu as norm_cpu
from lattice_serve.kernels.swiglu import cpu as swiglu_cpu

REGIONS_PER_LAYER = 8
"""Kernels a layer that share their work out over threads."""
PARALLEL_PRODUCTS = 1_000_000
"""Multiply-adds of a kernel, about 40 microseconds, from which on threads are worth it."""


class ServingOps(Ops, Protocol):
    """The operations of one serving pass after another."""

    name: str

    def begin(self, pool: Tensor, segments: Segments) -> None:
        """Say which tokens and state rows the coming pass is about. pool: [rows, row_size] float32."""
        ...


class CpuOps:
    """Numba kernels: every token's bits depend on its own sequence alone."""

    name = "numba"

    def __init__(self, model: LatticeForCausalLM, layout: StateLayout) -> None:
        weights = {parameter for parameter in model.parameters() if parameter.ndim == 2}
        self._packed: dict[Tensor, PackedWeight] = {weight: PackedWeight(weight) for weight in weights}
        self._out_width = model.shape.out_width
        self._threads = numba.get_num_threads()
        products = sum(weight.numel() for weight in weights)
        self._parallel_from = REGIONS_PER_LAYER * len(model.layers) * PARALLEL_PRODUCTS / products
        self._mixers = [CpuMixer(layout, i, layer.mixer.weights()) for i, layer in enumerate(model.layers)]

    def begin(self, pool: Tensor, segments: Segments) -> None:
        self._pool, self._segments = pool, segments
        # Threads that meet after a few microseconds of work cost more than they bring, and on a busy machine far more.
        numba.set_num_threads(self._threads if segments.starts[-1] >= self._parallel_from else 1)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._packed[weight](x)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm_cpu.rms_norm(x, weight, eps, torch.empty_like(x))

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return swiglu_cpu.swiglu(gate_up, gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))

    def mix(self, layer: int, z: Tensor) -> Tensor:
        return self._mixers[layer](z, self._pool, self._segments, z.new_empty(len(z), self._out_width))


class TorchOps:
    """The torch reference on any device, one segment after another."""

    def __init__(self, model: LatticeForCausalLM, layout: StateLayout, max_tokens: int) -> None:
        weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        self.linear = RowInvariantLinear(weights, max_tokens)
        self.name = "torch reference"
        self._model, self._layout = model, layout

    def begin(self, pool: Tensor, segments: Segments) -> None:
        self._pool, self._segments = pool, segments

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return kernels.rms_norm(x, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return kernels.swiglu(gate_up)

    def mix(self, layer: int, z: Tensor) -> Tensor:
        weights = self._model.layers[layer].mixer.weights()
        out = z.new_empty(len(z), self._layout.shape.out_width)
        for row, position, start, end in self._segments:
            state = self._layout.load(self._pool[row], layer, position)
            y, state = mix(z[None, start:end], weights, self._layout.shape, state)
            out[start:end] = y[0]
            self._layout.store(self._pool[row], layer, state)
        return out


def serving_ops(model: LatticeForCausalLM, layout: StateLayout, max_tokens: int, device: str) -> ServingOps:
    """The fastest operations there are for `device`; passes of up to `max_tokens` tokens."""
    if torch.device(device).type == "cpu":
        return CpuOps(model, layout)
    return TorchOps(model, layout, max_tokens)
