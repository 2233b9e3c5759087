"""The equations of one token in numpy, one head at a time, and random tokens and weights to try them on."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, silu

from lattice_serve.kernels.mixers.lattice import LatticeState, MixerShape, MixerWeights

Array = NDArray[np.float64]

CHUNK_SIZES = [1, 3, 4, 16]
OBJECTIVES = ["decoding", "similarity", "encoding"]
GATES = ["none", "mixed", "floor"]
DIMENSIONS = [(7, 3), (5, 6)]  # d, m


class Tokens(NamedTuple):
    """The arguments of both forms, in their order."""

    q: Tensor
    k: Tensor
    v: Tensor
    gamma: Tensor
    mu: Tensor

    def cut(self, start: int, stop: int) -> Tokens:
        return Tokens(*(x[:, start:stop] for x in self))

    def cast(self, dtype: torch.dtype) -> Tokens:
        return Tokens(*(x.to(dtype) for x in self))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths(C: int) -> list[int]:
    return sorted({1, max(C - 1, 1), C, C + 1, 100})


def random_tokens(
    T: int, *, C: int, d: int = 7, m: int = 3, gate: str = "mixed", B: int = 2, H: int = 2, seed: int = 0
) -> tuple[Tokens, Tensor]:
    """T tokens and an initial memory [B, H, d, m] of unit columns, float64.

    gate "none" is mu = 1, "floor" its smallest value f, "mixed" uniform over [f, 1] with a third of the gates at f.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    f = 10.0 ** (-12 / C)
    mu = f + (1 - f) * uniform(B, T, H)
    if gate == "none":
        mu = torch.ones_like(mu)
    else:
        mu = torch.where((uniform(B, T, H) < 1 / 3) | torch.tensor(gate == "floor"), f, mu)
    q, k = (normalize(silu(normal(B, T, H, m)), dim=-1) for _ in range(2))
    tokens = Tokens(q=q, k=k, v=normal(B, T, H, d), gamma=normal(B, T, H).sigmoid(), mu=mu)
    return tokens, normalize(normal(B, H, d, m), dim=2)


def random_mixer(shape: MixerShape, T: int, *, B: int = 2) -> tuple[Tensor, MixerWeights]:
    """The projection z [B, T, in_width] of random tokens, and weights; float64."""
    generator = torch.Generator().manual_seed(T)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weights = MixerWeights(
        conv=normal(shape.conv_width, shape.taps),
        gate_bias=normal(2 * shape.H),
        norm=normal(shape.d),
        anchor=normal(shape.H, shape.d, shape.m),
    )
    return normal(B, T, shape.in_width), weights


def cast(weights: MixerWeights, dtype: torch.dtype) -> MixerWeights:
    return MixerWeights(**{f.name: getattr(weights, f.name).to(dtype) for f in fields(weights)})


def coefficients(A: Array, k: Array, v: Array, gamma: float, objective: str) -> tuple[Array, Array]:
    """h [d] and c [m] of one token of one head."""
    h = v - A @ k if objective == "decoding" else v
    c = gamma * (k - A.T @ v) if objective == "encoding" else gamma * k
    return h, c


def step(A: Array, R: Array, k: Array, v: Array, gamma: float, mu: float, objective: str) -> tuple[Array, Array]:
    """R_t and S_t [d, m] of one token of one head, by the projection of h off each column of A."""
    h, c = coefficients(A, k, v, gamma, objective)
    new = np.empty_like(R)
    for i in range(A.shape[1]):
        column = A[:, i]
        new[:, i] = mu * R[:, i] + c[i] * (np.eye(len(column)) - np.outer(column, column)) @ h
    return new, new / np.sqrt((new**2).sum(axis=0))


def naive(tokens: Tokens, anchor: Tensor, C: int, objective: str) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H, d] and, after the last token, R and S [B, H, d, m]; R is S at a chunk's start."""
    q, k, v, gamma, mu = (x.double().numpy() for x in tokens)
    y, R_end, S_end = np.empty_like(v), anchor.double().numpy().copy(), anchor.double().numpy().copy()
    for b, head in np.ndindex(*anchor.shape[:2]):
        A = R = S = R_end[b, head]
        for t in range(q.shape[1]):
            at = (b, t, head)
            R, S = step(A, R, k[at], v[at], gamma[at], mu[at], objective)
            y[at] = S @ q[at]
            if (t + 1) % C == 0:
                A = R = S
        R_end[b, head], S_end[b, head] = R, S
    return torch.from_numpy(y), torch.from_numpy(R_end), torch.from_numpy(S_end)


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest difference as a share of the largest true value; infinite where `actual` is not finite."""
    difference = (actual.double() - truth.double()).abs()
    if not bool(difference.isfinite().all()):
        return float("inf")
    if difference.numel() == 0:
        return 0.0
    return float(difference.max() / truth.double().abs().max().clamp_min(1e-30))


def state_error(actual: LatticeState, truth: LatticeState) -> float:
    """The largest `error` of a state's tensors; infinite at another position."""
    if actual.position != truth.position:
        return float("inf")
    return max(error(mine, theirs) for mine, theirs in zip(actual.tensors(), truth.tensors(), strict=True))
