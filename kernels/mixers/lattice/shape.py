"""The dimensions and small weights of a mixer: what its every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

L2_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerShape:
    """Dimensions of one layer; the letters are the paper's."""

    H: int
    d: int
    m: int
    C: int
    taps: int
    """Width of the short convolution."""
    objective: str
    use_forget_gate: bool
    norm_eps: float

    @property
    def conv_width(self) -> int:
        """Channels of the short convolution: q, k (H m each), then v (H d)."""
        return self.H * (2 * self.m + self.d)

    @property
    def in_width(self) -> int:
        """Columns of the input projection: q, k, v, output gate (H d), gamma (H), mu (H)."""
        return self.conv_width + self.H * (self.d + 2)

    @property
    def out_width(self) -> int:
        return self.H * self.d

    @property
    def mu_floor(self) -> float:
        """f of the forget gate: keeps the product over a chunk above 1e-12, so float32 never underflows."""
        return float(10 ** (-12 / self.C))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerWeights:
    """Float tensors; the same for every token."""

    conv: Tensor
    """[conv_width, taps]"""
    gate_bias: Tensor
    """[2 H]: of gamma, then of mu."""
    norm: Tensor
    """[d]"""
    anchor: Tensor
    """[H, d, m], the learned initial memory; its columns are normalised when used."""

    def by_taps(self) -> MixerWeights:
        """The same with the channels of a tap next to each other in memory, as threads of a GPU read them."""
        return replace(self, conv=self.conv.mT.contiguous().mT)
