"""The part of a model that one process has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.models.base import ModelConfig


@dataclass(frozen=True, slots=True)
class Share:
    """Parts `rank / size` to `(rank + 1) / size` of what a model's family divides (`ModelConfig.divisible`)."""

    rank: int
    size: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """Returns the configuration of this share. Raises `ConfigError` where the model cannot be divided."""
        if self.size == 1:
            return whole
        if not whole.divisible:
            raise ConfigError(
                f"tensor_parallel_size is {self.size}, and models of type {whole.model_type} cannot be divided: "
                "leave it out",
                param="tensor_parallel_size",
            )
        for name, count in whole.divisible.items():
            if count % self.size:
                raise ConfigError(
                    f"tensor_parallel_size is {self.size}, which does not divide the model's {name}, {count}: "
                    "give a number that does",
                    param="tensor_parallel_size",
                )
        return whole.divided(self.size)

    def take(self, name: str, tensor: Tensor, whole: ModelConfig) -> Tensor:
        """Returns this share of the tensor `name` of a model; the tensor itself where it is whole in all."""
        sharding = whole.sharding(name) if self.size > 1 else None
        if sharding is None:
            return tensor
        pieces = tensor.split(sharding.pieces, dim=sharding.dim)
        own = [piece.chunk(self.size, dim=sharding.dim)[self.rank] for piece in pieces]
        return torch.cat(own, dim=sharding.dim)


WHOLE = Share(0, 1)
