"""What runs the network for the engine: chosen once, by the device.

Batches are ragged: the tokens of several sequences, one segment after another, and the memory of each segment's
sequence is a row of the state pool, updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from lattice_serve import kernels
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.models.lattice import LatticeForCausalLM
from lattice_serve.kernels.decoder.cpu import CpuDecoder
from lattice_serve.kernels.decoder.weights import DecoderWeights, LayerWeights
from lattice_serve.kernels.linear import RowInvariantLinear
from lattice_serve.kernels.mixer import Segments, StateLayout, mix

_PARALLEL_ALONE, _PARALLEL_BESIDE = 4_000_000, 60_000_000
"""Multiply-adds of a step from which on it is shared out over threads: a fifth of a millisecond, where nothing else
wants the processors; some milliseconds where threads would mostly take them from those who send the answers."""


class Backend(Protocol):
    name: str
    arithmetic: str
    """What the bits of a state depend on, beside weights and tokens."""
    multiple: int
    """A prompt is cut into segments at multiples of so many tokens."""

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """ids: the tokens of all segments; wanted, hidden: places among them -> logits [len(wanted), V] of the first,
        final hidden states [len(hidden), hidden_size] of the second, both float32.

        A token's bits depend on its own sequence alone, and on which of its tokens are its prompt's. Wanted places of
        decode come before those of prompts. The tensors are good until the next call.
        """
        ...


def check_fit(backend: Backend, config: EngineConfig, rows: int) -> None:
    """Raises `ConfigError` where a prompt could not move on beside all the other rows, or for drafts where only one
    token at a time is decoded."""
    if config.speculative_tokens and backend.multiple > 1:
        raise ConfigError("speculative_tokens are for the CPU: leave them out", param="speculative_tokens")
    need = rows - 1 + backend.multiple
    if config.max_step_tokens < need:
        raise ConfigError(
            f"max_step_tokens is {config.max_step_tokens}: give {need} or more, for {rows} rows and "
            f"chunks of {backend.multiple} tokens, or lower max_rows",
            param="max_step_tokens",
        )


class TorchBackend:
    """The torch reference on any device, one segment after another."""

    name = arithmetic = "torch reference"

    def __init__(
        self,
        model: LatticeForCausalLM,
        layout: StateLayout,
        pool: Tensor,
        max_tokens: int,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """gather: as `make_backend`."""
        weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        self.linear = RowInvariantLinear(weights, max_tokens)
        self._model, self._layout, self._pool, self._gather = model, layout, pool, gather
        self.multiple = layout.shape.C

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        self._segments = segments
        final = self._model.hidden(torch.tensor(ids, device=self._pool.device), self)
        return self.linear(final[list(wanted)], self._model.head_weight), final[list(hidden)].float()

    # What `LatticeForCausalLM.hidden` asks for.

    def add(self, x: Tensor, product: Tensor) -> Tensor:
        for part in [product] if self._gather is None else self._gather(product[None]):
            x = x + part
        return x

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return kernels.rms_norm(x, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return kernels.swiglu(gate_up)

    def mix(self, layer: int, z: Tensor) -> Tensor:
        weights = self._model.layers[layer].mixer.weights()
        out = z.new_empty(len(z), self._layout.shape.out_width)
        for row, position, start, end in self._segments:
            state = self._layout.load(self._pool[row], layer, position)
            # A chunk at a time: how torch rounds an element depends on how near the end of its tensor it lies.
            first = min(end, start + self.multiple - position % self.multiple)
            for begin, stop in pairwise((start, *range(first, end, self.multiple), end)):
                y, state = mix(z[None, begin:stop], weights, self._layout.shape, state)
                out[begin:stop] = y[0]
            self._layout.store(self._pool[row], layer, state)
        return out


def make_backend(
    model: LatticeForCausalLM,
    layout: StateLayout,
    pool: Tensor,
    *,
    max_tokens: int,
    threads: int,
    beside: bool,
    quantization: Literal["int8"] | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Backend:
    """The fastest there is for the device of `pool` [rows, row_size], for steps of up to `max_tokens` tokens.

    beside: whether other work wants the processors too. gather: for a model that is one share of several: a tensor
    [1, ...] of this share -> [shares, ...], always in one order. The matrices of `model` may be the backend's alone
    afterwards: only its small tensors are there for others. Raises `ConfigError` for a quantization that the device
    does not have.
    """
    backend: Backend
    if pool.device.type == "cpu" and gather is None:  # it is one compiled step, which has no place to meet others in
        backend = CpuDecoder(
            decoder_weights(model),
            layout,
            pool,
            max_tokens=max_tokens,
            threads=threads,
            parallel_from=_PARALLEL_BESIDE if beside else _PARALLEL_ALONE,
            quantization=quantization,
        )
    elif pool.device.type == "cuda" and find_spec("triton"):  # AMD's devices are called cuda too
        from lattice_serve.kernels.decoder.triton import TritonDecoder

        backend = TritonDecoder(
            decoder_weights(model), layout, pool, max_tokens=max_tokens, quantization=quantization, gather=gather
        )
    else:
        if quantization is not None:
            raise ConfigError(f"no quantization by torch on {pool.device}: leave it out", param="quantization")
        return TorchBackend(model, layout, pool, max_tokens, gather)
    for layer in model.layers:  # packed now, and not to be kept twice
        for linear in (layer.mixer.in_proj, layer.mixer.out_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            linear.weight = torch.nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
    return backend


def decoder_weights(model: LatticeForCausalLM) -> DecoderWeights:
    """The tensors of a model as the decoders of `kernels` take them."""
    layers = [
        LayerWeights(
            mixer_norm=layer.mixer_norm,
            in_proj=layer.mixer.in_proj.weight,
            mixer=layer.mixer.weights(),
            out_proj=layer.mixer.out_proj.weight,
            mlp_norm=layer.mlp_norm,
            gate_up_proj=layer.mlp.gate_up_proj.weight,
            down_proj=layer.mlp.down_proj.weight,
        )
        for layer in model.layers
    ]
    return DecoderWeights(
        embedding=model.embedding,
        layers=layers,
        norm=model.norm,
        head=model.head_weight,
        norm_eps=model.config.norm_eps,
    )
