"""The Lattice language model: one definition for training and for serving.

Block: RMSNorm -> input projection -> mixer (short convolution, gates, Lattice recurrence, output norm and gate) ->
output projection -> residual; RMSNorm -> SwiGLU -> residual. What runs each operation, and where the memory of the
sequences lives, is the business of the `Ops` that a forward pass is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lattice_serve import kernels
from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.models.causal_lm import CausalLM, Gather, RaggedBatch
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.kernels.decoder.cpu import CpuDecoder
from lattice_serve.kernels.decoder.weights import DecoderWeights, LayerWeights
from lattice_serve.kernels.mixers.lattice import MixerShape, MixerState, MixerWeights, StateLayout, mix

if TYPE_CHECKING:
    from lattice_serve.engine.backend import Backend


class Ops(Protocol):
    """The operations of one forward pass; activations are [..., width], whatever the leading dimensions."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def add(self, x: Tensor, product: Tensor) -> Tensor:
        """The residual stream x with what a projection adds to it."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def swiglu(self, gate_up: Tensor) -> Tensor: ...

    def mix(self, layer: int, z: Tensor) -> Tensor:
        """Run layer `layer`'s mixer over its projection z [..., in_width], reading and writing its memory."""
        ...


class ModelState:
    """Memory of a batch of B sequences in every layer, for dense (equally long) sequences."""

    def __init__(self, layers: list[MixerState]) -> None:
        self.layers = layers

    def detach(self) -> ModelState:
        return ModelState([layer.detach() for layer in self.layers])

    def where(self, rows: Tensor, other: ModelState) -> ModelState:
        """Rows of `other` where `rows` [B] bool is true, of this state elsewhere."""
        return ModelState([a.where(rows, b) for a, b in zip(self.layers, other.layers, strict=True)])

    def split(self, parts: int) -> list[ModelState]:
        """This batch as `parts` batches of equal size, sharing its storage."""
        return [ModelState(list(layers)) for layers in zip(*(s.split(parts) for s in self.layers), strict=True)]

    @classmethod
    def join(cls, states: Sequence[ModelState]) -> ModelState:
        """One batch of all `states`, which are at one position; a copy."""
        return cls([MixerState.join(layers) for layers in zip(*(s.layers for s in states), strict=True)])


class DenseOps:
    """Differentiable torch operations over [B, T, width]; `state` is the memory after the pass."""

    def __init__(self, model: LatticeForCausalLM, state: ModelState) -> None:
        self.model = model
        self.state = ModelState(list(state.layers))

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def add(self, x: Tensor, product: Tensor) -> Tensor:
        return x + product

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return kernels.rms_norm(x, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return kernels.swiglu(gate_up)

    def mix(self, layer: int, z: Tensor) -> Tensor:
        weights = self.model.layers[layer].mixer.weights()
        y, self.state.layers[layer] = mix(z, weights, self.model.shape, self.state.layers[layer])
        return y


class RowOps:
    """Torch operations over a ragged batch [T, width], whose memory lies in state rows."""

    def __init__(self, model: LatticeForCausalLM, batch: RaggedBatch) -> None:
        self._model, self._batch = model, batch
        self.linear, self.add = batch.linear, batch.add

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return kernels.rms_norm(x, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return kernels.swiglu(gate_up)

    def mix(self, layer: int, z: Tensor) -> Tensor:
        model = self._model
        layout, weights = model.layout, model.layers[layer].mixer.weights()

        def recur(z: Tensor, row: Tensor, position: int) -> Tensor:
            y, state = mix(z[None], weights, model.shape, layout.load(row, layer, position))
            layout.store(row, layer, state)
            return y[0]

        return self._batch.scan(z, model.shape.out_width, recur)


class Mixer(nn.Module):
    def __init__(self, config: LatticeConfig, shape: MixerShape) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, shape.in_width, bias=False)
        self.conv = nn.Parameter(torch.empty(shape.conv_width, shape.taps))
        self.gate_bias = nn.Parameter(torch.empty(2 * shape.H))
        self.anchor = nn.Parameter(torch.empty(shape.H, shape.d, shape.m))
        self.norm = nn.Parameter(torch.empty(shape.d))
        self.out_proj = nn.Linear(shape.out_width, config.hidden_size, bias=False)

    def weights(self) -> MixerWeights:
        return MixerWeights(conv=self.conv, gate_bias=self.gate_bias, norm=self.norm, anchor=self.anchor)


class MLP(nn.Module):
    def __init__(self, config: LatticeConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Layer(nn.Module):
    def __init__(self, config: LatticeConfig, shape: MixerShape, index: int) -> None:
        super().__init__()
        self.index = index
        self.eps = config.norm_eps
        self.mixer_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.mixer = Mixer(config, shape)
        self.mlp_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        z = ops.linear(ops.rms_norm(x, self.mixer_norm, self.eps), self.mixer.in_proj.weight)
        x = ops.add(x, ops.linear(ops.mix(self.index, z), self.mixer.out_proj.weight))
        gate_up = ops.linear(ops.rms_norm(x, self.mlp_norm, self.eps), self.mlp.gate_up_proj.weight)
        return ops.add(x, ops.linear(ops.swiglu(gate_up), self.mlp.down_proj.weight))


class LatticeForCausalLM(CausalLM):
    config_class = LatticeConfig
    config: LatticeConfig

    def __init__(self, config: LatticeConfig) -> None:
        super().__init__()
        self.config = config
        self.shape = MixerShape(
            H=config.num_heads,
            d=config.head_dim,
            m=config.num_slots,
            C=config.chunk_size,
            taps=config.conv_kernel_size,
            objective=config.objective,
            use_forget_gate=config.use_forget_gate,
            norm_eps=config.norm_eps,
        )
        self.layout = StateLayout(self.shape, config.num_hidden_layers)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers: list[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, self.shape, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        if not config.tie_word_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Random parameters: normal of standard deviation ``1 / sqrt(fan in)``, residual outputs smaller by depth.

        The forget gate opens near 1 and the step size near 0.5, so a new model keeps what it sees.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        scale = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("norm", "mixer_norm", "mlp_norm"):
                parameter.fill_(1)
            elif leaf == "gate_bias":
                H = self.shape.H
                parameter[:H], parameter[H:] = 0.0, 4.0
            elif leaf == "embedding":
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]), generator=generator)
            else:
                fan_in = parameter.shape[-2] if leaf == "anchor" else parameter.shape[-1]
                std = 1 / math.sqrt(fan_in)
                if name.endswith(("out_proj.weight", "down_proj.weight")):
                    std *= scale
                parameter.normal_(std=std, generator=generator)

    @property
    def row_size(self) -> int:
        return self.layout.row_size

    def initial_row(self) -> Tensor:
        row = torch.zeros(self.row_size)
        for i, layer in enumerate(self.layers):
            self.layout.store(row, i, MixerState.initial(self.shape, layer.mixer.weights(), 1).to("cpu"))
        return row

    def run(self, tokens: Tensor, batch: RaggedBatch) -> Tensor:
        return self.hidden(tokens, RowOps(self, batch))

    def compile_step(
        self,
        pool: Tensor,
        *,
        max_tokens: int,
        threads: int,
        parallel_from: int,
        quantization: Literal["int8"] | None,
        gather: Gather | None,
    ) -> Backend | None:
        backend: Backend
        if pool.device.type == "cpu" and gather is None:  # it is one compiled step, with no place to meet others in
            backend = CpuDecoder(
                self.decoder_weights(),
                self.layout,
                pool,
                max_tokens=max_tokens,
                threads=threads,
                parallel_from=parallel_from,
                quantization=quantization,
            )
        elif pool.device.type == "cuda":  # AMD's devices are called cuda too
            if not find_spec("triton"):
                raise ConfigError(
                    f"device is {str(pool.device)!r}, which needs triton: install lattice-serve[gpu], or give cpu",
                    param="device",
                )
            from lattice_serve.kernels.decoder.triton import TritonDecoder

            backend = TritonDecoder(
                self.decoder_weights(),
                self.layout,
                pool,
                max_tokens=max_tokens,
                quantization=quantization,
                gather=gather,
            )
        else:
            return None
        for layer in self.layers:  # packed now, and not to be kept twice
            for linear in (layer.mixer.in_proj, layer.mixer.out_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
                linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        return backend

    def decoder_weights(self) -> DecoderWeights:
        """Returns the tensors as the compiled steps of `kernels` take them."""
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
            for layer in self.layers
        ]
        return DecoderWeights(
            embedding=self.embedding,
            layers=layers,
            norm=self.norm,
            head=self.head_weight,
            norm_eps=self.config.norm_eps,
        )

    def initial_state(self, batch: int) -> ModelState:
        """Memory of `batch` sequences before their first token; differentiable in the learned initial memory."""
        return ModelState([MixerState.initial(self.shape, layer.mixer.weights(), batch) for layer in self.layers])

    def hidden(self, tokens: Tensor, ops: Ops) -> Tensor:
        """tokens [...] int64 -> final hidden states [..., hidden_size] after the last norm."""
        x = F.embedding(tokens, self.embedding)
        x = x.float() if x.element_size() < 4 else x  # the residual stream stays wide, whatever the weights are
        for layer in self.layers:
            x = layer(x, ops)
        return ops.rms_norm(x, self.norm, self.config.norm_eps)

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, hidden_size]"""
        return self.embedding if self.config.tie_word_embeddings else self.head

    def forward(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """tokens [B, T] int64 -> logits [B, T, vocab_size] and the memory after them. `state` is left as it was."""
        ops = DenseOps(self, state or self.initial_state(tokens.shape[0]))
        return ops.linear(self.hidden(tokens, ops), self.head_weight), ops.state

    def loss(self, tokens: Tensor, targets: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Mean cross entropy in nats of targets [B, T] given tokens [B, T], and the memory after them."""
        logits, state = self(tokens, state)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), state
