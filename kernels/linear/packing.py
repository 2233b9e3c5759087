"""Weights packed for products on the CPU: into strips of 16 outputs, k by k, that are read from start to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lattice_serve.kernels.linear.int8 import LARGEST_K
from lattice_serve.kernels.linear.quantize import quantize
from lattice_serve.kernels.numba.amx import BYTE_TILE_K
from lattice_serve.kernels.numba.lanes import LANES, aligned, padded
from lattice_serve.kernels.numba.types import Floats, Record, Strips

PLACE = np.dtype([(name, np.int64) for name in ("strips", "scales", "N", "K")])
"""Where a matrix lies among others in arrays of strips and scales, and its shape; a record in compiled code."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] in strips [K, 16], N filled up with zeros."""

    N: int
    K: int
    strips: Strips
    """float32 [padded(N) K], or uint32 [padded(N) (K + 1) // 2] with the bits of two bfloat16, or int8, fours of k of
    16 outputs in turn, with zeros to the end of the last tile."""
    scales: Floats
    """float32 [padded(N)], one an output, where the strips are int8; else [0]."""

    @classmethod
    def of(cls, weight: Tensor, quantization: Literal["int8"] | None = None) -> PackedWeight:
        """Packs weight [N, K], float32 or bfloat16; as int8 with a scale for each output if so asked (`quantize`).

        Raises ValueError where K is so large that sums of whole numbers might not fit.
        """
        N, K = weight.shape
        if quantization is None:
            return cls(N, K, _pack(weight), np.zeros(0, dtype=np.float32))
        if K > LARGEST_K:
            raise ValueError(f"a matrix of {K} inputs is too wide for int8: leave quantization out")
        whole, scales = quantize(weight)
        filled = torch.zeros(padded(N))
        filled[:N] = scales
        return cls(N, K, _pack(whole), filled.numpy())

    @property
    def nbytes(self) -> int:
        return int(self.strips.nbytes + self.scales.nbytes)


def _pack(weight: Tensor) -> Strips:
    N, K = weight.shape
    # k that lie side by side for each output, and what K is filled up to.
    together, whole = {torch.bfloat16: (2, 2), torch.int8: (4, BYTE_TILE_K)}.get(weight.dtype, (1, 1))
    filled = weight.detach().new_zeros(padded(N), -(-K // whole) * whole)
    filled[:N, :K] = weight.detach()
    view = filled.view(-1, LANES, filled.shape[1] // together, together).movedim(1, 2)
    strips = torch.from_numpy(aligned(filled.numel() * filled.itemsize, np.uint8)).view(filled.dtype)
    strips.view(view.shape).copy_(view)
    return strips.view(torch.uint32).numpy() if weight.dtype == torch.bfloat16 else strips.numpy()


class Packer:
    """Lays matrices and vectors one after another into flat arrays."""

    def __init__(self, quantization: Literal["int8"] | None) -> None:
        self._quantization = quantization
        self._strips: list[Strips] = []
        self._scales: list[Floats] = []
        self._vectors: list[Floats] = []
        self._ends = {"strips": 0, "scales": 0, "vectors": 0}

    def matrix(self, weight: Tensor, place: Record) -> None:
        """Packs weight [N, K], and writes into `place`, a record of `PLACE`, where it will lie."""
        packed = PackedWeight.of(weight, self._quantization)
        place["N"], place["K"] = packed.N, packed.K
        place["strips"], place["scales"] = self._ends["strips"], self._ends["scales"]
        self._strips.append(packed.strips)
        self._scales.append(packed.scales)
        self._ends["strips"] += len(packed.strips)
        self._ends["scales"] += len(packed.scales)

    def vector(self, values: Tensor | Floats) -> int:
        """Returns the offset of values [n] of any float dtype, which are filled up with zeros to whole vectors."""
        at = self._ends["vectors"]
        filled = np.zeros(padded(len(values)), dtype=np.float32)
        filled[: len(values)] = values.float().numpy() if isinstance(values, Tensor) else values
        self._vectors.append(filled)
        self._ends["vectors"] += len(filled)
        return at

    def arrays(self) -> tuple[Strips, Floats, Floats]:
        """Returns strips, scales and vectors; the packer is empty after it."""
        strips = aligned(self._ends["strips"], self._strips[0].dtype)
        at = 0
        while self._strips:  # one by one, so that memory is not doubled
            part = self._strips.pop(0)
            strips[at : at + len(part)] = part
            at += len(part)
        return strips, np.concatenate(self._scales), np.concatenate(self._vectors)
