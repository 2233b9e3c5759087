"""A model family of the tests: a gated running average. It shows what a family has to give, and no more.

    g_t = sigmoid(W_g x_t),  s_t = g_t s_{t-1} + (1 - g_t) W_v x_t,  y_t = W_o s_t,  x = x + y    in every layer

A sequence's state row holds s of every layer. The family has the torch reference alone, which `TorchBackend` runs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lattice_serve.engine.models.base import ModelConfig, Sharding, Work
from lattice_serve.engine.models.causal_lm import CausalLM, RaggedBatch
from lattice_serve.engine.models.registry import Family
from lattice_serve.kernels import rms_norm


class ToyConfig(ModelConfig):
    matrices: ClassVar[tuple[str, ...]] = ("embedding", "gate", "value", "out")

    model_type: Literal["toy"] = "toy"
    architectures: tuple[Literal["ToyForCausalLM"]] = ("ToyForCausalLM",)
    state_size: int = Field(ge=1)

    @property
    def divisible(self) -> dict[str, int]:
        return {}

    def sharding(self, name: str) -> Sharding | None:
        return None

    def work(self, weight_bits: int) -> Work:
        body = 3 * self.num_hidden_layers * self.hidden_size * self.state_size
        head = self.vocab_size * self.hidden_size
        return Work(
            weight_bytes=(body + head) * weight_bits // 8,
            state_bytes=2 * 4 * self.num_hidden_layers * self.state_size,
            flops=2 * body,
            recurrence_flops=3 * self.num_hidden_layers * self.state_size,
            head_flops=2 * head,
        )


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        n, k = config.state_size, config.hidden_size
        self.norm = nn.Parameter(torch.empty(k))
        self.gate, self.value = nn.Parameter(torch.empty(n, k)), nn.Parameter(torch.empty(n, k))
        self.out = nn.Parameter(torch.empty(k, n))


class ToyForCausalLM(CausalLM):
    config_class = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers: list[ToyLayer] = nn.ModuleList(  # type: ignore[assignment]
            ToyLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.empty(config.hidden_size))

    @property
    def row_size(self) -> int:
        return self.config.num_hidden_layers * self.config.state_size

    @property
    def head_weight(self) -> Tensor:
        return self.embedding

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]), generator=generator)

    def initial_row(self) -> Tensor:
        return torch.zeros(self.row_size)

    def run(self, tokens: Tensor, batch: RaggedBatch) -> Tensor:
        x = F.embedding(tokens, self.embedding).float()
        for i, layer in enumerate(self.layers):
            normed = rms_norm(x, layer.norm, 1e-6)
            gates_values = torch.cat((batch.linear(normed, layer.gate), batch.linear(normed, layer.value)), dim=1)
            states = batch.scan(gates_values, self.config.state_size, partial(self._average, i))
            x = batch.add(x, batch.linear(states, layer.out))
        return rms_norm(x, self.norm, 1e-6)

    def _average(self, layer: int, gates_values: Tensor, row: Tensor, position: int) -> Tensor:
        """gates_values [t, 2 n] of one sequence's tokens -> its averages after each, [t, n]."""
        n = self.config.state_size
        state = row[layer * n : (layer + 1) * n]
        out = gates_values.new_empty(len(gates_values), n)
        for t, (gate, value) in enumerate(gates_values.unflatten(1, (2, n))):
            state.copy_(torch.lerp(value, state, gate.sigmoid()))
            out[t] = state
        return out


TOY = Family(config="tests.toy:ToyConfig", model="tests.toy:ToyForCausalLM")
