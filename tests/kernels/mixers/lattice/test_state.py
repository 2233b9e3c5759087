"""The state of a Lattice layer: what it shares, what it weighs, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lattice_serve.kernels.mixers.lattice import LatticeState, lattice_chunk, lattice_recurrent
from tests.kernels.naive import CHUNK_SIZES, Tokens, error, random_tokens

Form = Callable[..., tuple[Tensor, LatticeState]]

every_chunk_size = pytest.mark.parametrize("C", CHUNK_SIZES)
every_form = pytest.mark.parametrize("form", [lattice_recurrent, lattice_chunk])


def storages(*tensors: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("T", [0, 1, 2, 3, 16, 19])
@every_chunk_size
@every_form
def test_a_call_shares_nothing_with_its_arguments(form: Form, C: int, T: int, first: int) -> None:
    tokens, anchor = random_tokens(first + T, C=C)
    _, state = form(*tokens.cut(0, first), LatticeState.initial(anchor, C), chunk_size=C)
    tokens = tokens.cut(first, first + T)
    arguments = (*tokens, *state.tensors())
    before, position = [x.clone() for x in arguments], state.position
    y, after = form(*tokens, state, chunk_size=C)
    assert not storages(*arguments) & storages(y, *after.tensors())
    assert not storages(y) & storages(*after.tensors())
    assert state.position == position
    assert after.position == position + T
    for x, copy in zip(arguments, before, strict=True):
        assert torch.equal(x, copy)


def test_an_initial_state_is_a_copy_of_unit_columns() -> None:
    _, anchor = random_tokens(0, C=4)
    scaled = anchor * torch.tensor([2.0, 0.5, 1e-6], dtype=torch.float64)
    state = LatticeState.initial(scaled, 4)
    assert error(state.anchor, anchor) <= 1e-15
    assert error(state.memory(), anchor) <= 1e-15
    assert not storages(anchor, scaled) & storages(*state.tensors(), state.memory())
    assert (state.chunk_size, state.position, state.pending) == (4, 0, 0)


@pytest.mark.parametrize("T", [0, 3, 8, 9])
def test_copies_and_views(T: int) -> None:
    tokens, anchor = random_tokens(T, C=4)
    _, state = lattice_chunk(*tokens, LatticeState.initial(anchor, 4), chunk_size=4)
    assert not storages(state.memory()) & storages(*state.tensors())
    assert not storages(*state.clone().tensors()) & storages(*state.tensors())
    assert storages(*state.detach().tensors()) == storages(*state.tensors())


def test_detach_cuts_the_graph() -> None:
    tokens, anchor = random_tokens(5, C=4)
    _, state = lattice_chunk(*tokens, LatticeState.initial(anchor.requires_grad_(), 4), chunk_size=4)
    assert state.anchor.requires_grad
    assert not any(x.requires_grad for x in state.detach().tensors())


@pytest.mark.parametrize("C", [1, 16])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.float64, 8)])
def test_its_size_is_the_same_at_every_position(dtype: torch.dtype, width: int, C: int) -> None:
    B, H, d, m = 2, 3, 7, 5
    tokens, anchor = random_tokens(20, C=C, d=d, m=m, B=B, H=H)
    state = LatticeState.initial(anchor.to(dtype), C)
    size = B * H * (d * m + C * (d + m) + 1 + 2 * m) * width
    assert state.nbytes == size
    for t in range(20):
        _, state = lattice_chunk(*tokens.cut(t, t + 1), state, chunk_size=C)
        assert state.nbytes == size


def test_a_batch_splits_joins_and_selects_rows() -> None:
    tokens, anchor = random_tokens(6, C=4, B=4)
    _, whole = lattice_chunk(*tokens, LatticeState.initial(anchor, 4), chunk_size=4)
    parts = []
    for b in range(4):
        row = Tokens(*(x[b : b + 1] for x in tokens))
        parts.append(lattice_chunk(*row, LatticeState.initial(anchor[b : b + 1], 4), chunk_size=4)[1])
    joined = LatticeState.join(parts)
    assert joined.position == whole.position == 6
    for mine, theirs in zip(joined.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert not storages(*joined.tensors()) & storages(*(x for part in parts for x in part.tensors()))
    for half, rows in zip(whole.split(2), (slice(0, 2), slice(2, 4)), strict=True):
        assert half.position == 6
        for mine, theirs in zip(half.tensors(), whole.tensors(), strict=True):
            assert torch.equal(mine, theirs[rows])
    other = LatticeState.join(parts[::-1])
    picked = joined.where(torch.tensor([True, False, False, True]), other)
    for mine, old, new in zip(picked.tensors(), joined.tensors(), other.tensors(), strict=True):
        assert torch.equal(mine, torch.stack([new[0], old[1], old[2], new[3]]))
    with pytest.raises(ValueError, match="pending tokens: 2 and 0"):
        whole.where(torch.ones(4, dtype=torch.bool), LatticeState.initial(anchor, 4))


@pytest.mark.parametrize(
    ("anchor", "C", "message"),
    [
        (torch.ones(2, 3, 4), 4, r"anchor must be .*\[B, H, d, m\], not torch.float32 \(2, 3, 4\)"),
        (torch.ones(1, 1, 3, 2, dtype=torch.int64), 4, "anchor must be a float tensor"),
        (torch.ones(1, 1, 3, 2), 0, "chunk_size must be at least 1, not 0"),
        (torch.zeros(1, 1, 3, 2), 4, "anchor has a column of zeros"),
        (torch.full((1, 1, 3, 2), torch.nan), 4, "anchor has a column .* not finite"),
        (torch.full((1, 1, 3, 2), torch.inf), 4, "anchor has a column .* not finite"),
    ],
)
def test_an_initial_memory_it_cannot_use(anchor: Tensor, C: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatticeState.initial(anchor, C)


@every_form
def test_an_argument_that_does_not_fit_is_named(form: Form) -> None:
    tokens, anchor = random_tokens(5, C=4)
    state = LatticeState.initial(anchor, 4)
    given = tokens._asdict()
    for name, x in given.items():
        for wrong in (x[..., :-1], x[:, :-1] if name != "q" else x[0], x.repeat(2, *[1] * (x.ndim - 1))):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                form(**{**given, name: wrong}, state=state, chunk_size=4)
        with pytest.raises(ValueError, match=f"^{name} must be a float tensor"):
            form(**{**given, name: x.long()}, state=state, chunk_size=4)
    with pytest.raises(ValueError, match=r"^chunk_size is 8, but the state was made for 4"):
        form(*tokens, state, chunk_size=8)
    with pytest.raises(ValueError, match=r"^objective is 'recall'"):
        form(*tokens, state, chunk_size=4, objective="recall")
