"""The Lattice recurrence a chunk at a time: matrix products and row scans only, differentiable.

The same function as `lattice_recurrent` (which has the source). For the n tokens of a chunk, rows of Q, K, V, H, c, W:

    H = V - K A^T,  W = H A,  G = H H^T
    a_t = prod_{r<=t} mu_r,  M[t, s] = prod_{s<r<=t} mu_r for s <= t else 0,  L = M without its diagonal
    b = M (c * W),  p = a - b
    u = 2 c * ((L * G) c - W * (L (c * W))) + c * c * (diag(G) - W * W)
    n2 = a^2 + (M * M) u                      squared column norms of R_t, at least a^2
    Y = (Q / sqrt(n2) * p) A^T + (M * ((Q / sqrt(n2)) c^T)) H
    R = A * p[last] + H^T (M[last] * c),  A' = R with columns normalised by their own norms

Tokens pending from an earlier call are first rows whose gates are 1, their decay being in c already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lattice_serve.kernels.mixers.lattice.recurrent import factors
from lattice_serve.kernels.mixers.lattice.state import LatticeState, check_inputs


def _decay(mu: Tensor) -> tuple[Tensor, Tensor]:
    """a [..., n] and M [..., n, n] of gates mu [..., n], by products."""
    n = mu.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=mu.device).tril(-1)
    M = torch.where(lower, mu[..., None], torch.ones((), dtype=mu.dtype, device=mu.device)).cumprod(dim=-2).tril()
    return mu.cumprod(dim=-1), M


def one_chunk(
    A: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, a: Tensor, M: Tensor, objective: str,
    h_old: Tensor | None = None, c_old: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """n tokens of one chunk, N heads: A [N, d, m], q, k [N, n, m], v [N, n, d], gamma [N, n].

    With r old rows, a [N, r + n] and M [N, r + n, r + n] include them. Returns y [N, n, d], H, c of all rows, and p, b,
    e [N, m] of the last row.
    """
    H, c = factors(A, k, v, gamma, objective)
    old = 0
    if h_old is not None and c_old is not None:
        old = h_old.shape[1]
        H, c = torch.cat((h_old, H), dim=1), torch.cat((c_old, c), dim=1)
    W = torch.bmm(H, A)
    G = torch.bmm(H, H.mT)
    cW = c * W
    b = torch.bmm(M, cW)
    a1 = a[..., None]
    p = a1 - b
    # M (c W) - c W is L (c W), and (M G) c - diag(G) c is (L G) c: one diagonal left out for both.
    diagonal = H.square().sum(dim=-1, keepdim=True)
    MGc = torch.bmm(M * G, c)
    u = c * (2 * (MGc - W * b) - c * diagonal + W * cW)
    e = torch.bmm(M * M, u).clamp_min(0)
    n2 = a1 * a1 + e
    rows = slice(old, None)
    qn = q * n2[:, rows].rsqrt()
    y = torch.baddbmm(torch.bmm(qn * p[:, rows], A.mT), M[:, rows] * torch.bmm(qn, c.mT), H)
    return y, H, c, p[:, -1], b[:, -1], e[:, -1]


def _end(A: Tensor, H: Tensor, c: Tensor, p: Tensor, M: Tensor) -> Tensor:
    """The anchor [N, d, m] after a whole chunk."""
    R = torch.baddbmm(A * p[:, None, :], H.mT, M[:, -1, :, None] * c)
    A = R / R.norm(dim=1, keepdim=True)
    return A


def lattice_chunk(
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
    """Run T tokens from `state`, which is left as it was, from any position to any position.

    q, k [B, T, H, m], v [B, T, H, d], gamma, mu [B, T, H] of any float dtype; computed in the state's.
    Returns y [B, T, H, d] in v's dtype and the state after the last token, which shares no storage with any
    argument. Raises ValueError when a shape, dtype, chunk size or the objective does not fit.
    """
    check_inputs(q, k, v, gamma, mu, state, chunk_size, objective)
    B, T, H, _ = q.shape
    if T == 0:
        return torch.zeros_like(v), state.clone()
    A = state.anchor.flatten(0, 1)
    # [B, T, H, ...] -> [B H, T, ...] in the state's dtype
    heads = [x.to(A.dtype).movedim(2, 1).flatten(0, 1) for x in (q, k, v, gamma, mu)]
    ys: list[Tensor] = []
    done, position = 0, state.position
    pending: LatticeState | None = state if state.pending else None
    while done < T:
        old = position % chunk_size
        n = min(chunk_size - old, T - done)
        if old == 0 and T - done >= chunk_size:
            n = (T - done) // chunk_size * chunk_size
            y, A = _whole_chunks(A, [x[:, done : done + n] for x in heads], chunk_size, objective)
            pending = None
        else:
            y, A, pending = _part(
                A, [x[:, done : done + n] for x in heads], pending, old, chunk_size, objective, (B, H)
            )
        ys.append(y)
        done += n
        position += n
    out = (ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)).unflatten(0, (B, H)).movedim(1, 2).to(v.dtype)
    if pending is None:
        return out, LatticeState.at_chunk_start(A.unflatten(0, (B, H)), chunk_size, position=position)
    pending.position = position
    return out, pending


def _whole_chunks(A: Tensor, heads: list[Tensor], C: int, objective: str) -> tuple[Tensor, Tensor]:
    """y [N, T, d] and the last anchor, for T a multiple of C from a chunk's start."""
    # [N, T, ...] -> T / C contiguous chunks; unbind, not slices, whose backward would fill a whole zero tensor each
    q, k, v, gamma, mu = (x.unflatten(1, (-1, C)).movedim(1, 0).contiguous() for x in heads)
    a, M = _decay(mu)
    ys = []
    for q_, k_, v_, gamma_, a_, M_ in zip(*(x.unbind(0) for x in (q, k, v, gamma, a, M)), strict=True):
        y, H, c, p, _, _ = one_chunk(A, q_, k_, v_, gamma_, a_, M_, objective)
        A = _end(A, H, c, p, M_)
        ys.append(y)
    return torch.cat(ys, dim=1), A


def _part(
    A: Tensor, heads: list[Tensor], pending: LatticeState | None, old: int, C: int, objective: str, BH: tuple[int, int]
) -> tuple[Tensor, Tensor, LatticeState | None]:
    """Tokens of one chunk from its row `old` on; the new anchor, and the pending factors unless the chunk is done."""
    q, k, v, gamma, mu = heads
    n = q.shape[1]
    h_old = c_old = None
    if pending is not None:
        h_old, c_old = pending.h.flatten(0, 1)[:, :old], pending.c.flatten(0, 1)[:, :old]
        mu = torch.cat((torch.ones_like(mu[:, :1]).expand(-1, old), mu), dim=1)
    a, M = _decay(mu)
    if pending is not None:
        a = a * pending.a.flatten(0, 1)[:, None]
    y, H, c, p, b, e = one_chunk(A, q, k, v, gamma, a, M, objective, h_old, c_old)
    if old + n == C:
        return y, _end(A, H, c, p, M), None
    pad = (0, 0, 0, C - old - n)
    h, c = torch.nn.functional.pad(H, pad), torch.nn.functional.pad(M[:, -1, :, None] * c, pad)
    anchor, h, c, a, b, e = (x.unflatten(0, BH) for x in (A.clone(), h, c, a[:, -1], b, e))
    return y, A, LatticeState(anchor=anchor, h=h, c=c, a=a, b=b, e=e, position=0)
