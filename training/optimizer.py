"""AdamW and Muon, and which parameter gets which.

Muon (K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest orthogonal one, found
with five Newton-Schulz iterations. The step is scaled by 0.2 sqrt(max(rows, columns)), so that its root mean square
is that of AdamW and both take one learning rate and weight decay (J. Liu and others, "Muon is Scalable for LLM
Training", arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lattice_serve.engine.models.lattice.model import LatticeForCausalLM

OptimizerName: TypeAlias = Literal["adamw", "muon"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Roughly U V^T of `matrix` = U S V^T, [rows, columns] or a batch of such: singular values near 1 (0.7 to 1.2)."""
    a, b, c = _COEFFICIENTS
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: torch.Tensor = x.mT if tall else x
    return out


class Muon(torch.optim.Optimizer):
    """Momentum SGD with Nesterov's look-ahead whose update is orthogonalised; for matrices [rows, columns] only.

    A parameter group may name the `sections` (row counts) of its matrices: several maps stored as one, orthogonalised
    apart.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, *, momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "sections": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(momentum, group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                sections = group["sections"] or [param.shape[0]]
                for part, direction in zip(param.split(sections), update.split(sections), strict=True):
                    scale = 0.2 * math.sqrt(max(part.shape))
                    part.add_(orthogonalise(direction), alpha=-group["lr"] * scale)
        return loss


def build_optimizers(
    model: LatticeForCausalLM, name: OptimizerName, *, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW over all parameters, or Muon over the hidden matrices and AdamW over the rest.

    Weight decay is for linear maps and embeddings, not for gains, biases, convolutions and initial memories. Each group
    keeps its peak learning rate as `peak_lr`.
    """
    shape = model.shape
    sections = {
        "in_proj.weight": [shape.H * shape.m, shape.H * shape.m, shape.H * shape.d, shape.H * shape.d, 2 * shape.H],
        "gate_up_proj.weight": [model.config.intermediate_size] * 2,
    }
    hidden: dict[str, list[nn.Parameter]] = {}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for path, param in model.named_parameters():
        if path in ("embedding", "head"):
            decayed.append(param)
        elif not path.endswith("_proj.weight"):
            plain.append(param)
        elif name == "adamw":
            decayed.append(param)
        else:
            hidden.setdefault(".".join(path.split(".")[-2:]), []).append(param)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, foreach=True)
    ]
    if hidden:
        matrices = [{"params": params, "sections": sections.get(path)} for path, params in hidden.items()]
        optimizers.append(Muon(matrices, muon_lr, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate(progress: float, *, warmup: float, cooldown: float, final: float) -> float:
    """Share of the peak rate at `progress` in [0, 1] of the run: linear up, constant, cosine down to `final`."""
    if progress < warmup:
        return progress / warmup
    start = max(warmup, 1 - cooldown)
    if progress <= start:
        return 1.0
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - start) / (1 - start))))
