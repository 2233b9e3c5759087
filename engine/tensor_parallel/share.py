"""The part of a model that one process has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lattice_serve.engine.config import ModelConfig
from lattice_serve.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Share:
    """Heads and MLP columns `rank / size` to `(rank + 1) / size` of every layer.

    A share is a Lattice model itself, of fewer heads and a narrower MLP, but that its residual stream is the sum of all
    shares'. Embedding, norms and head are whole in each: a tied head is there for the embedding's sake anyway, its
    logits are needed by one process only, and so they have the bits that one process gives them.
    """

    rank: int
    size: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """Raises `ConfigError` where the model cannot be divided by `size`."""
        parts = {"num_heads": whole.num_heads, "intermediate_size": whole.intermediate_size}
        for name, count in parts.items():
            if count % self.size:
                raise ConfigError(
                    f"tensor_parallel_size is {self.size}, which does not divide the model's {name}, {count}: "
                    "give a number that does",
                    param="tensor_parallel_size",
                )
        return whole.model_copy(update={name: count // self.size for name, count in parts.items()})

    def take(self, name: str, tensor: Tensor, whole: ModelConfig) -> Tensor:
        """This share of the parameter `name` of a model; the tensor itself where it is whole in all."""
        if self.size == 1:
            return tensor
        H, m, d, inner = whole.num_heads, whole.num_slots, whole.head_dim, whole.intermediate_size
        rows = {
            "mixer.in_proj.weight": (H * m, H * m, H * d, H * d, H, H),
            "mixer.conv": (H * m, H * m, H * d),
            "mixer.gate_bias": (H, H),
            "mixer.anchor": (H,),
            "mlp.gate_up_proj.weight": (inner, inner),
        }
        kind = ".".join(name.split(".")[2:])  # what follows "layers.0"
        if kind in rows:
            return torch.cat([part.chunk(self.size)[self.rank] for part in tensor.split(rows[kind])])
        if kind in ("mixer.out_proj.weight", "mlp.down_proj.weight"):
            return tensor.chunk(self.size, dim=1)[self.rank].contiguous()
        return tensor


WHOLE = Share(0, 1)
