"""The tensors of a network of layers: norm, input projection, mixer, output projection; norm, SwiGLU, projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer, matrices [out, in] float32 or bfloat16, the rest float32."""

    mixer_norm: Tensor
    in_proj: Tensor
    mixer: Any
    """The family's own small weights of a mixer."""
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
