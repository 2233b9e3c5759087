"""What a Lattice layer remembers: the anchor memory and the pending factors of the unfinished chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

OBJECTIVES = ("decoding", "similarity", "encoding")


@dataclass(slots=True, kw_only=True)
class LatticeState:
    """State of B sequences, H heads each, at one position.

    With A the anchor, the unnormalised memory is ``R = A * (a - b) + h^T c`` and its squared column norms are
    ``a^2 + e``; rows of `h` and `c` past ``position % chunk_size`` are zero, and so are `b` and `e` at a
    chunk's start. All tensors have one float dtype.
    """

    anchor: Tensor
    """[B, H, d, m], columns of unit norm: the memory at the start of the chunk."""
    h: Tensor
    """[B, H, C, d], errors (or values) of the tokens seen in the chunk."""
    c: Tensor
    """[B, H, C, m], their coefficients, decayed by every forget gate since."""
    a: Tensor
    """[B, H], product of the chunk's forget gates so far."""
    b: Tensor
    """[B, H, m], what the update's projection takes off the anchor's coefficient."""
    e: Tensor
    """[B, H, m], squared norm of the part of R orthogonal to the anchor."""
    position: int
    """Tokens seen since the sequence began."""

    @classmethod
    def initial(cls, anchor: Tensor, chunk_size: int) -> LatticeState:
        """State before the first token; `anchor` [B, H, d, m] is copied, its columns are normalised.

        Differentiable in `anchor`. Raises ValueError on a wrong shape or chunk size and on a zero column.
        """
        if anchor.ndim != 4 or not anchor.is_floating_point():
            raise ValueError(f"anchor must be a float tensor [B, H, d, m], not {anchor.dtype} {tuple(anchor.shape)}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        norm = anchor.norm(dim=2, keepdim=True)
        if not bool(((norm > 0) & norm.isfinite()).all()):
            raise ValueError("anchor has a column of zeros, or one that is not finite: every column needs a direction")
        return cls.at_chunk_start(anchor / norm, chunk_size, position=0)

    @classmethod
    def at_chunk_start(cls, anchor: Tensor, chunk_size: int, *, position: int) -> LatticeState:
        """State with nothing pending around `anchor` [B, H, d, m], which is kept, not copied."""
        B, H, d, m = anchor.shape
        return cls(
            anchor=anchor,
            h=anchor.new_zeros(B, H, chunk_size, d),
            c=anchor.new_zeros(B, H, chunk_size, m),
            a=anchor.new_ones(B, H),
            b=anchor.new_zeros(B, H, m),
            e=anchor.new_zeros(B, H, m),
            position=position,
        )

    @property
    def chunk_size(self) -> int:
        return self.h.shape[2]

    @property
    def pending(self) -> int:
        """Tokens of the unfinished chunk."""
        return self.position % self.chunk_size

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "position")

    def unnormalised(self) -> Tensor:
        """R [B, H, d, m]."""
        return self.anchor * (self.a[..., None] - self.b)[:, :, None, :] + self.h.mT @ self.c

    def memory(self) -> Tensor:
        """S [B, H, d, m], columns of unit norm; a tensor of its own."""
        R = self.unnormalised()
        S: Tensor = R / R.norm(dim=2, keepdim=True)
        return S

    def clone(self) -> LatticeState:
        return self.map(Tensor.clone)

    def detach(self) -> LatticeState:
        """The same values, cut from the autograd graph; shares storage with this state."""
        return self.map(Tensor.detach)

    def where(self, rows: Tensor, other: LatticeState) -> LatticeState:
        """Rows of `other` where `rows` [B] bool is true, of this state elsewhere; both at one `pending`.

        The result has this state's position: only ``position % chunk_size`` has a meaning in it.
        """
        if self.pending != other.pending:
            raise ValueError(f"states differ in pending tokens: {self.pending} and {other.pending}")

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return self._with([pick(mine, theirs) for mine, theirs in pairs])

    def split(self, parts: int) -> list[LatticeState]:
        """This batch as `parts` batches of equal size; they share its storage. B must be a multiple of `parts`."""
        pieces = [t.tensor_split(parts) for t in self.tensors()]
        return [self._with([piece[i] for piece in pieces]) for i in range(parts)]

    @classmethod
    def join(cls, states: Sequence[LatticeState]) -> LatticeState:
        """One batch of all `states`, which are at one position; a copy."""
        columns = zip(*(state.tensors() for state in states), strict=True)
        return states[0]._with([torch.cat(column) for column in columns])

    def map(self, function: Callable[[Tensor], Tensor]) -> LatticeState:
        """This state with `function` of each tensor."""
        return self._with([function(t) for t in self.tensors()])

    def _with(self, tensors: list[Tensor]) -> LatticeState:
        anchor, h, c, a, b, e = tensors
        return LatticeState(anchor=anchor, h=h, c=c, a=a, b=b, e=e, position=self.position)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, mu: Tensor, state: LatticeState, C: int, objective: str
) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and chunk sizes agree and the objective is known."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}: give {', '.join(OBJECTIVES)}")
    B, H, d, m = state.anchor.shape
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, H, m], not {tuple(q.shape)}")
    T = q.shape[1]
    expected = {"q": (B, T, H, m), "k": (B, T, H, m), "v": (B, T, H, d), "gamma": (B, T, H), "mu": (B, T, H)}
    for (name, shape), tensor in zip(expected.items(), (q, k, v, gamma, mu), strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} beside a state of B={B}, H={H}, d={d}, m={m}, not {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float tensor, not {tensor.dtype}")
    if state.chunk_size != C:
        raise ValueError(f"chunk_size is {C}, but the state was made for {state.chunk_size}")
