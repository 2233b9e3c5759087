"""The tensors of the network, and how they are laid one after another for the compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lattice_serve.kernels.linear.cpu import PackedWeight
from lattice_serve.kernels.mixers.lattice.shape import MixerWeights
from lattice_serve.kernels.numba.lanes import aligned, padded


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer, matrices [out, in] float32 or bfloat16, the rest float32."""

    mixer_norm: Tensor
    in_proj: Tensor
    mixer: MixerWeights
    out_proj: Tensor
    mlp_norm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """The network. Head and embedding [V, hidden] may be one tensor."""

    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: Tensor
    norm_eps: float


class Packer:
    """Lays tensors one after another into flat arrays."""

    def __init__(self, quantization: Literal["int8"] | None) -> None:
        self._quantization = quantization
        self._strips: list[Any] = []
        self._scales: list[Any] = []
        self._small: list[Any] = []
        self._ends = [0, 0, 0]

    def matrix(self, weight: Tensor) -> tuple[int, int]:
        """Offsets of its strips and its scales."""
        packed = PackedWeight.quantized(weight) if self._quantization else PackedWeight.of(weight)
        at = self._ends[0], self._ends[1]
        self._strips.append(packed.strips)
        self._scales.append(packed.scales)
        self._ends[0] += len(packed.strips)
        self._ends[1] += len(packed.scales)
        return at

    def vector(self, values: Any) -> int:
        """Offset of float32 values, filled up with zeros to whole vectors."""
        at = self._ends[2]
        filled = np.zeros(padded(len(values)), dtype=np.float32)
        filled[: len(values)] = values
        self._small.append(filled)
        self._ends[2] += len(filled)
        return at

    def arrays(self) -> tuple[Any, Any, Any]:
        """Strips, scales and small values; the packer is empty after it."""
        strips = aligned(self._ends[0], self._strips[0].dtype)
        at = 0
        while self._strips:  # one by one, so that memory is not doubled
            part = self._strips.pop(0)
            strips[at : at + len(part)] = part
            at += len(part)
        return strips, np.concatenate(self._scales), np.concatenate(self._small)
