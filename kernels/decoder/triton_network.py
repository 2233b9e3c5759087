"""The whole network by Triton's kernels; the equations are those of `decoder.cpu`.

Decode and prefill each take a path of their own, of kernels whose results for a token do not depend on its neighbours:
products in the tiles of the phase, one program a row for norms, one a head for the mixer. Activations have the weights'
dtype (bfloat16 where those are int8), the residual stream and all sums are float32. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lattice_serve.kernels.decoder.weights import DecoderWeights
from lattice_serve.kernels.linear.quantize import quantize
from lattice_serve.kernels.linear.tiles import Phase
from lattice_serve.kernels.linear.triton import gated_linear, linear, parts
from lattice_serve.kernels.mixers.base import StateLayout
from lattice_serve.kernels.mixers.chunks import DeviceSegments
from lattice_serve.kernels.pointwise.triton import add_rms_norm


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [N, K] and, where it is int8, its scales [N]."""

    weight: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, quantization: Literal["int8"] | None) -> Matrix:
        return cls(*quantize(weight)) if quantization else cls(weight.contiguous(), None)


@dataclass(frozen=True, slots=True)
class _Layer:
    mixer_norm: Tensor
    mixer: Any
    """The family's, as its kernels read them."""
    mlp_norm: Tensor
    in_proj: Matrix
    out_proj: Matrix
    gate_up_proj: Matrix
    down_proj: Matrix


class TritonNetwork:
    """Tokens to logits, where everything is on the device already: a CUDA graph may hold `decode`."""

    def __init__(
        self,
        weights: DecoderWeights,
        layout: StateLayout,
        pool: Tensor,
        *,
        quantization: Literal["int8"] | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """pool: [rows, row_size], the state rows, which are read and written in place.

        gather: for weights that are one share of a model's heads and MLP columns: [1, M, hidden] of this share ->
        [shares, M, hidden], always in one order.
        """
        self._mixer, self._out_width = layout.on_gpu(), layout.out_width
        self._pool, self._gather, self._eps = pool, gather, weights.norm_eps
        self._dtype = torch.bfloat16 if quantization else weights.head.dtype
        self._embedding, self._norm_weight = weights.embedding, weights.norm
        self._head = Matrix.of(weights.head, quantization)
        self._layers = [
            _Layer(
                layer.mixer_norm,
                self._mixer.pack_weights(layer.mixer),
                layer.mlp_norm,
                Matrix.of(layer.in_proj, quantization),
                Matrix.of(layer.out_proj, quantization),
                Matrix.of(layer.gate_up_proj, quantization),
                Matrix.of(layer.down_proj, quantization),
            )
            for layer in weights.layers
        ]

    @property
    def vocab_size(self) -> int:
        return len(self._embedding)

    @property
    def hidden_size(self) -> int:
        return self._embedding.shape[1]

    def decode(self, ids: Tensor, rows: Tensor, positions: Tensor, out: Tensor) -> Tensor:
        """One token of each of N sequences: ids, rows, positions [N] int64 -> logits into `out` [N, V] float32.

        A row of -1 is none: what comes out there means nothing.
        """

        def mix(layer: int, z: Tensor) -> Tensor:
            y = z.new_empty(len(z), self._out_width)
            return self._mixer.decode(z, self._pool, layer, rows, positions, self._layers[layer].mixer, y)

        linear(self._hidden(ids, mix, "decode"), self._head.weight, self._head.scales, "decode", out[None])
        return out

    def prefill(self, ids: Tensor, segments: DeviceSegments) -> Tensor:
        """Tokens `ids` [T] of all segments -> their final hidden states [T, hidden_size], for `logits`.

        A CUDA graph may hold this, too. What comes out for tokens of no segment means nothing.
        """

        def mix(layer: int, z: Tensor) -> Tensor:
            y = z.new_empty(len(z), self._out_width)
            return self._mixer.prefill(z, self._pool, layer, segments, self._layers[layer].mixer, y)

        return self._hidden(ids, mix, "prefill")

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 of hidden states [N, hidden_size] that `prefill` returned."""
        out = torch.empty(1, len(hidden), self.vocab_size, dtype=torch.float32, device=hidden.device)
        return linear(hidden, self._head.weight, self._head.scales, "prefill", out)[0]

    def _hidden(self, ids: Tensor, mix: Callable[[int, Tensor], Tensor], phase: Phase) -> Tensor:
        x = F.embedding(ids, self._embedding).float()
        added = None
        for i, layer in enumerate(self._layers):
            z = self._product(self._norm(x, added, layer.mixer_norm), layer.in_proj, phase)
            added = self._parts(mix(i, z), layer.out_proj, phase)
            gate_up, normed = layer.gate_up_proj, self._norm(x, added, layer.mlp_norm)
            active = normed.new_empty(len(x), len(gate_up.weight) // 2)
            gated_linear(normed, gate_up.weight, gate_up.scales, phase, active)
            added = self._parts(active, layer.down_proj, phase)
        return self._norm(x, added, self._norm_weight)

    def _norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        return add_rms_norm(x, added, weight, self._eps, torch.empty_like(x, dtype=self._dtype))

    def _product(self, x: Tensor, matrix: Matrix, phase: Phase) -> Tensor:
        out = x.new_empty(1, len(x), len(matrix.weight))
        return linear(x, matrix.weight, matrix.scales, phase, out)[0]

    def _parts(self, x: Tensor, matrix: Matrix, phase: Phase) -> Tensor:
        """A product for the residual stream, in parts that are yet to be added up."""
        P = 1 if self._gather else parts(x.device, phase, matrix.weight, x.element_size())
        out = torch.empty(P, len(x), len(matrix.weight), dtype=torch.float32, device=x.device)
        linear(x, matrix.weight, matrix.scales, phase, out)
        return self._gather(out) if self._gather else out
