"""The model's forward pass as training and scoring run it: any precision, logits of a few rows at a time."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lattice_serve import kernels
from lattice_serve.engine.models.lattice.model import DenseOps, LatticeForCausalLM, ModelState
from lattice_serve.kernels.mixers.lattice import chunk
from lattice_serve.kernels.mixers.lattice import reference as mixer
from lattice_serve.kernels.numba.features import has_bf16

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]

IGNORED = -100
"""A target that does not count."""

_ROWS = 1024
"""Rows of logits at a time: 16 MB at 4096 pieces, which stays in a last-level cache."""


def matmul_dtype(precision: Precision) -> torch.dtype:
    """What the dense products run in; "auto" is bfloat16 where the CPU multiplies it in hardware, else float32."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    return torch.bfloat16 if has_bf16() else torch.float32


class MixedOps(DenseOps):
    """Dense products in `dtype`; residual stream, norms and recurrence stay in the parameters' float32."""

    def __init__(self, model: LatticeForCausalLM, state: ModelState, dtype: torch.dtype) -> None:
        super().__init__(model, state)
        self._dtype = dtype

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(self._dtype), weight.to(self._dtype)).to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropies of hidden @ weight^T, summed; gradients are made on the way, while the logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        w = weight.to(dtype)
        want_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if want_gradient else None
        d_weight = torch.zeros_like(weight) if want_gradient else None
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            x, target = hidden[rows].to(dtype), targets[rows]
            counted = target != IGNORED
            index = target.clamp_min(0)[:, None]
            log_p = (x @ w.T).to(weight.dtype)
            log_p -= log_p.logsumexp(dim=-1, keepdim=True)
            total -= log_p.gather(1, index)[counted].sum(dtype=torch.float64)
            if d_hidden is not None and d_weight is not None:
                g = log_p.exp_()
                g.scatter_add_(1, index, torch.full_like(index, -1, dtype=g.dtype))
                g = (g * counted[:, None] if not counted.all() else g).to(dtype)
                d_hidden[rows] = g @ w
                d_weight += g.T @ x
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradients[0].to(d_hidden.dtype)
        return d_hidden * scale, d_weight * scale, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum of the cross entropies, in nats, float64 [].

    hidden [N, n], weight [V, n], targets [N] int64 with `IGNORED` where nothing counts; the products run in `dtype`.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, dtype)  # type: ignore[no-untyped-call]
    return total


def total_nll(
    model: LatticeForCausalLM, tokens: Tensor, targets: Tensor, state: ModelState, dtype: torch.dtype
) -> tuple[Tensor, ModelState]:
    """Sum of the negative log-likelihoods of targets given tokens (both int64 [B, T]), and the memory after them."""
    ops = MixedOps(model, state, dtype)
    hidden = model.hidden(tokens, ops)
    return linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets.flatten(), dtype), ops.state


def compile_kernels() -> None:
    """Fuse the small operations of the network with torch.compile, for the whole process; the values stay the same."""
    places = (
        (chunk, "one_chunk"),
        (mixer, "rms_norm"),
        (mixer, "short_conv"),
        (kernels, "rms_norm"),
        (kernels, "swiglu"),
    )
    for module, name in places:
        setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
