"""The Lattice recurrence token by token: the oracle for every other form.

Source: Karami, Pascanu, Mirrokni, "Lattice: Learning to Efficiently Compress the Memory", arXiv 2504.05646: the
orthogonal online-gradient update with columns on the unit sphere. With A the anchor of the token's chunk:

    h_t = v_t - A k_t  (decoding)  |  v_t  (similarity, encoding)
    c_t = gamma_t k_t  (decoding, similarity)  |  gamma_t (k_t - A^T v_t)  (encoding)
    Delta_t[:, i] = c_t[i] (h_t - w_t[i] A[:, i]),  w_t = A^T h_t
    R_t = mu_t R_{t-1} + Delta_t,   S_t = R_t with columns normalised,   y_t = S_t q_t

and A <- S_t at a chunk's last token. C = 1 is the paper's exact recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lattice_serve.kernels.mixers.lattice.state import LatticeState, check_inputs


def factors(A: Tensor, k: Tensor, v: Tensor, gamma: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """h [..., n, d] and c [..., n, m] of n tokens against anchor A [..., d, m]; gamma [..., n]."""
    if objective == "decoding":
        return v - k @ A.mT, gamma[..., None] * k
    if objective == "similarity":
        return v, gamma[..., None] * k
    return v, gamma[..., None] * (k - v @ A)


def update(A: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """Delta [..., d, m] of one token, h [..., d], c [..., m]: each column orthogonal to that of A."""
    w = (A.mT @ h[..., None])[..., 0]
    return c[..., None, :] * (h[..., None] - w[..., None, :] * A)


def lattice_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    mu: Tensor,
    state: LatticeState,
    *,
    chunk_size: int,
    objective: str = "decoding",
) -> tuple[Tensor, LatticeState]:
    """Run T tokens from `state`, which is left as it was.

    q, k [B, T, H, m], v [B, T, H, d], gamma, mu [B, T, H] of any float dtype; computed in the state's.
    Returns y [B, T, H, d] in v's dtype and the state after the last token, which shares no storage with any
    argument. Raises ValueError when a shape, dtype, chunk size or the objective does not fit.
    """
    check_inputs(q, k, v, gamma, mu, state, chunk_size, objective)
    dtype = state.anchor.dtype
    q, k, v_, gamma, mu = (x.to(dtype).movedim(2, 1) for x in (q, k, v, gamma, mu))
    state = state.clone()
    A, R = state.anchor, state.unnormalised()
    ys = []
    for t in range(q.shape[2]):
        slot = state.pending
        mu_t = mu[:, :, t]
        h_t, c_t = (
            x[..., 0, :] for x in factors(A, k[:, :, t, None], v_[:, :, t, None], gamma[:, :, t, None], objective)
        )
        R = mu_t[..., None, None] * R + update(A, h_t, c_t)
        S = R / R.norm(dim=2, keepdim=True)
        ys.append((S @ q[:, :, t, :, None])[..., 0])
        position = state.position + 1
        if slot + 1 == chunk_size:
            A = R = S
            state = LatticeState.at_chunk_start(A, chunk_size, position=position)
            continue
        h, c = state.h.clone(), state.c * mu_t[..., None, None]
        h[:, :, slot], c[:, :, slot] = h_t, c_t
        a = mu_t * state.a
        b = mu_t[..., None] * state.b + c_t * (A.mT @ h_t[..., None])[..., 0]
        e = (R.square().sum(dim=2) - a.square()[..., None]).clamp_min(0)
        state = LatticeState(anchor=A, h=h, c=c, a=a, b=b, e=e, position=position)
    if not ys:
        return torch.zeros_like(v), state
    return torch.stack(ys, dim=1).to(v.dtype), state
