"""The Lattice recurrence: both forms against the plain equations, and what those equations promise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lattice_serve.kernels.mixers.lattice import LatticeState, lattice_chunk, lattice_recurrent
from lattice_serve.kernels.mixers.lattice.recurrent import factors, update
from tests.kernels.naive import (
    CHUNK_SIZES,
    DIMENSIONS,
    GATES,
    OBJECTIVES,
    Tokens,
    error,
    lengths,
    naive,
    random_tokens,
    state_error,
    step,
)

Form = Callable[..., tuple[Tensor, LatticeState]]

FORMS = [lattice_recurrent, lattice_chunk]
every_chunk_size = pytest.mark.parametrize("C", CHUNK_SIZES)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
every_gate = pytest.mark.parametrize("gate", GATES)
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize(("d", "m"), DIMENSIONS)
@every_gate
@every_objective
@every_chunk_size
def test_token_by_token_is_the_plain_equations(C: int, objective: str, gate: str, d: int, m: int) -> None:
    tokens, anchor = random_tokens(2 * C + 7, C=C, d=d, m=m, gate=gate)
    y, R, S = naive(tokens, anchor, C, objective)
    mine, state = lattice_recurrent(*tokens, LatticeState.initial(anchor, C), chunk_size=C, objective=objective)
    assert error(mine, y) <= 1e-10
    assert error(state.memory(), S) <= 1e-10
    assert error(state.unnormalised(), R) <= 1e-10
    assert error(state.a.square()[..., None] + state.e, R.square().sum(dim=2)) <= 1e-10
    assert state.position == 2 * C + 7
    assert not state.h[:, :, state.pending :].any()
    assert not state.c[:, :, state.pending :].any()


@pytest.mark.parametrize(("d", "m"), DIMENSIONS)
@every_gate
@every_objective
@every_chunk_size
def test_whole_chunks_are_the_same_function(C: int, objective: str, gate: str, d: int, m: int) -> None:
    for T in lengths(C):
        tokens, anchor = random_tokens(T, C=C, d=d, m=m, gate=gate, seed=T)
        start = LatticeState.initial(anchor, C)
        y, truth = lattice_recurrent(*tokens, start, chunk_size=C, objective=objective)
        mine, state = lattice_chunk(*tokens, start, chunk_size=C, objective=objective)
        assert error(mine, y) <= 1e-10, T
        assert state_error(state, truth) <= 1e-10, T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@every_gate
@every_objective
@every_chunk_size
def test_narrow_inputs_with_a_float32_state(
    C: int, objective: str, gate: str, dtype: torch.dtype, tolerance: float
) -> None:
    """The steps of "encoding" are as long as |v|^2: with long ones, or gates that shrink what they are added to, it is
    chaotic, and rounding its inputs in float64 moves it as far. So v is short, and 100 tokens have no forget gate.
    """
    for T in lengths(C):
        tokens, anchor = random_tokens(T, C=C, d=33, m=12, gate=gate, seed=T)
        if objective == "encoding":
            if T > C + 1 and gate != "none":
                continue
            tokens = tokens._replace(v=tokens.v / (4 * tokens.v.norm(dim=-1, keepdim=True)))
        tokens, anchor = tokens.cast(dtype), anchor.float()
        exact = LatticeState.initial(anchor.double(), C)
        y, truth = lattice_recurrent(*tokens.cast(torch.float64), exact, chunk_size=C, objective=objective)
        for form in FORMS:
            mine, state = form(*tokens, LatticeState.initial(anchor, C), chunk_size=C, objective=objective)
            assert mine.dtype == dtype
            assert {x.dtype for x in state.tensors()} == {torch.float32}
            assert error(mine, y) <= tolerance, (T, form)
            assert error(state.memory(), truth.memory()) <= 1e-5, (T, form)


@every_form
@every_objective
@every_chunk_size
def test_updates_are_orthogonal_and_columns_have_unit_norm(C: int, objective: str, form: Form) -> None:
    tokens, anchor = random_tokens(3 * C + 2, C=C)
    state = LatticeState.initial(anchor, C)
    for t in range(3 * C + 2):
        before, (q, k, v, gamma, mu) = state, tokens.cut(t, t + 1)
        _, state = form(q, k, v, gamma, mu, before, chunk_size=C, objective=objective)
        if state.pending:
            delta = state.unnormalised() - mu[:, 0, :, None, None] * before.unnormalised()
        else:
            h, c = factors(before.anchor, k.movedim(2, 1), v.movedim(2, 1), gamma.movedim(2, 1), objective)
            delta = update(before.anchor, h[:, :, 0], c[:, :, 0])
        assert float((delta * before.anchor).sum(dim=2).abs().max()) <= 1e-12
        assert float((state.memory().norm(dim=2) - 1).abs().max()) <= 1e-12
        assert float((state.anchor.norm(dim=2) - 1).abs().max()) <= 1e-12
        if C == 1:
            assert float((delta * before.memory()).sum(dim=2).abs().max()) <= 1e-12


@every_form
@every_objective
def test_chunk_size_one_is_the_papers_recurrence(objective: str, form: Form) -> None:
    """Every token's update is orthogonal to the memory just before it."""
    tokens, anchor = random_tokens(25, C=1, d=6, m=4, gate="none", B=1, H=1)
    mine, state = form(*tokens, LatticeState.initial(anchor, 1), chunk_size=1, objective=objective)
    q, k, v, gamma, mu = (x[0, :, 0].numpy() for x in tokens)
    S = anchor[0, 0].numpy()
    for t in range(25):
        _, S = step(S, S, k[t], v[t], float(gamma[t]), float(mu[t]), objective)
        np.testing.assert_allclose(mine[0, t, 0].numpy(), S @ q[t], rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.anchor[0, 0].numpy(), S, rtol=0, atol=1e-12)


@every_objective
def test_an_update_is_a_gradient_step_on_the_objective(objective: str) -> None:
    """Of the memory with its columns normalised, as the paper defines it: this is where the projection comes from."""
    (_, k, v, gamma, _), anchor = random_tokens(1, C=1, d=6, m=4, B=1, H=1)
    k_t, v_t = k[0, 0, 0], v[0, 0, 0]
    Z = anchor[0, 0].clone().requires_grad_()
    S = Z / Z.norm(dim=0)
    loss = {
        "decoding": (v_t - S @ k_t).square().sum() / 2,
        "similarity": -(v_t @ S @ k_t),
        "encoding": (k_t - S.T @ v_t).square().sum() / 2,
    }[objective]
    (gradient,) = torch.autograd.grad(loss, Z)
    h, c = factors(anchor, k.movedim(2, 1), v.movedim(2, 1), gamma.movedim(2, 1), objective)
    delta = update(anchor, h[:, :, 0], c[:, :, 0])[0, 0]
    torch.testing.assert_close(delta, -gamma[0, 0, 0] * gradient, rtol=1e-12, atol=1e-12)


pieces = st.lists(st.tuples(st.integers(0, 20), st.sampled_from(FORMS)), min_size=1, max_size=6)


@settings(max_examples=80)
@given(
    pieces=pieces,
    C=st.sampled_from(CHUNK_SIZES),
    objective=st.sampled_from(OBJECTIVES),
    gate=st.sampled_from(GATES),
    whole=st.sampled_from(FORMS),
)
def test_any_split_gives_the_same(
    pieces: list[tuple[int, Form]], C: int, objective: str, gate: str, whole: Form
) -> None:
    T = sum(n for n, _ in pieces)
    tokens, anchor = random_tokens(T, C=C, gate=gate, seed=T)
    y, truth = whole(*tokens, LatticeState.initial(anchor, C), chunk_size=C, objective=objective)
    state, outputs, start = LatticeState.initial(anchor, C), [], 0
    for n, form in pieces:
        out, state = form(*tokens.cut(start, start + n), state, chunk_size=C, objective=objective)
        outputs.append(out)
        start += n
    assert error(torch.cat(outputs, dim=1), y) <= 1e-10
    assert state_error(state, truth) <= 1e-10


@pytest.mark.parametrize("first", [0, 3], ids=["chunk start", "pending"])
@every_objective
def test_gradients(objective: str, first: int) -> None:
    """From `first` tokens into a chunk, over its end, into the next one: of y and of every tensor of the state."""
    C, T = 4, first + 6
    tokens, anchor = random_tokens(T, C=C, d=3, m=2, B=1, H=1)
    # Away from the floor, where a gate is so small that the finite differences, not the gradient, are wrong.
    mu = 0.5 + 0.5 * torch.rand_like(tokens.mu)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, mu: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        given, state = Tokens(q, k, v, gamma, mu), LatticeState.initial(anchor, C)
        if first:
            _, state = lattice_chunk(*given.cut(0, first), state, chunk_size=C, objective=objective)
        y, state = lattice_chunk(*given.cut(first, T), state, chunk_size=C, objective=objective)
        return y, *state.tensors()

    inputs = tuple(x.clone().requires_grad_() for x in (*tokens[:4], mu, anchor))
    assert torch.autograd.gradcheck(run, inputs)


@every_gate
@every_objective
@every_chunk_size
def test_gradients_are_those_of_the_token_by_token_form(C: int, objective: str, gate: str) -> None:
    tokens, anchor = random_tokens(2 * C + 3, C=C, gate=gate)
    weight = torch.randn(tokens.v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for form in FORMS:
        inputs = [x.clone().requires_grad_() for x in (*tokens, anchor)]
        state = LatticeState.initial(inputs[5], C)
        y, end = form(*Tokens(*inputs[:5]), state, chunk_size=C, objective=objective)
        gradients.append(torch.autograd.grad((y * weight).sum() + end.memory().square().sum(dim=3).sum(), inputs))
    # As a share of the largest of all: at the floor with C = 1 only a direction matters, so that of gamma is all but 0.
    truth, mine = (torch.cat([x.flatten() for x in grads]) for grads in gradients)
    assert error(mine, truth) <= 1e-12


@every_gate
@every_objective
@every_chunk_size
def test_one_token_again_and_again_in_float32(C: int, objective: str, gate: str) -> None:
    """Accurate where the function is well conditioned; finite, with columns of unit norm, everywhere.

    "encoding" is chaotic here, and "similarity" at the floor leaves a difference of nearly equal vectors at each token.
    """
    tokens, anchor = random_tokens(1, C=C, d=20, m=12, gate=gate, B=1, H=1)
    tokens = Tokens(*(x.float().repeat(1, 512, *[1] * (x.ndim - 2)) for x in tokens))
    anchor = anchor.float()
    conditioned = objective == "decoding" or (objective == "similarity" and gate != "floor")
    if conditioned:
        exact = LatticeState.initial(anchor.double(), C)
        y, truth = lattice_recurrent(*tokens.cast(torch.float64), exact, chunk_size=C, objective=objective)
    for form in FORMS:
        mine, state = form(*tokens, LatticeState.initial(anchor, C), chunk_size=C, objective=objective)
        assert mine.isfinite().all()
        assert error(state.memory().norm(dim=2), torch.ones(1, 1, 12)) <= 1e-6
        if conditioned:
            assert error(mine, y) <= 1e-4
            assert error(state.memory(), truth.memory()) <= 1e-4
