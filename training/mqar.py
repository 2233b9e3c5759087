"""Multi-query associative recall: does one layer's memory bind values to keys and give them back?

A sequence shows pairs (key, value), then every key again in another order; after each of those the value is asked for.
Source: S. Arora and others, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.training.forward import IGNORED, total_nll
from lattice_serve.training.optimizer import build_optimizers


def recall_set(sequences: int, pairs: int, vocab_size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """tokens and targets, int64 [sequences, 3 pairs]; a target is `IGNORED` but where a value is asked for.

    The lower half of the vocabulary are keys, each at most once a sequence, the upper half values.
    """
    half = vocab_size // 2
    if pairs > half:
        raise ValueError(f"pairs {pairs}: give at most {half}, half of vocab_size {vocab_size}")
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(sequences, half, generator=generator).argsort(dim=1)[:, :pairs]
    values = torch.randint(half, 2 * half, (sequences, pairs), generator=generator)
    order = torch.rand(sequences, pairs, generator=generator).argsort(dim=1)
    shown = torch.stack((keys, values), dim=2).flatten(1)
    tokens = torch.cat((shown, keys.gather(1, order)), dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, 2 * pairs :] = values.gather(1, order)
    return tokens, targets


def train_single_layer(
    config: LatticeConfig, tokens: Tensor, targets: Tensor, *, steps: int, lr: float = 1e-2, seed: int = 0
) -> list[float]:
    """Fit a model of one layer to the whole set at every step; returns the mean loss in nats of each step."""
    if config.num_hidden_layers != 1:
        raise ValueError(f"num_hidden_layers {config.num_hidden_layers}: this is a test of one layer")
    model = LatticeForCausalLM(config)
    model.initialize(seed)
    (optimizer,) = build_optimizers(model, "adamw", lr=lr, muon_lr=lr, weight_decay=0.0)
    asked = int((targets != IGNORED).sum())
    losses = []
    for _ in range(steps):
        nll, _ = total_nll(model, tokens, targets, model.initial_state(len(tokens)), torch.float32)
        optimizer.zero_grad(set_to_none=True)
        (nll / asked).backward()
        optimizer.step()
        losses.append(float(nll.detach()) / asked)
    return losses
