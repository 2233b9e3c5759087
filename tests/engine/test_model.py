"""The Lattice language model: one function however its input is cut, with a gradient for every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM, ModelState

CONFIG = LatticeConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_heads=2,
    head_dim=12,
    num_slots=5,
    intermediate_size=32,
    chunk_size=4,
)


def make(**changes: Any) -> LatticeForCausalLM:
    model = LatticeForCausalLM(CONFIG.model_copy(update=changes))
    model.initialize(0)
    return model.double()


def random_tokens(B: int, T: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(T))


def tensors(state: ModelState) -> list[Tensor]:
    return [x for layer in state.layers for x in (*layer.lattice.tensors(), layer.tail)]


def assert_same(actual: ModelState, truth: ModelState) -> None:
    for mine, theirs in zip(tensors(actual), tensors(truth), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert [x.lattice.position for x in actual.layers] == [x.lattice.position for x in truth.layers]


@settings(max_examples=25)
@given(
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    C=st.sampled_from([1, 3, 4, 16]),
    objective=st.sampled_from(["decoding", "similarity", "encoding"]),
    use_forget_gate=st.booleans(),
)
@torch.no_grad()
def test_any_split_gives_the_same(pieces: list[int], C: int, objective: str, use_forget_gate: bool) -> None:
    model = make(chunk_size=C, objective=objective, use_forget_gate=use_forget_gate)
    tokens = random_tokens(2, sum(pieces))
    logits, truth = model(tokens)
    state, outputs = None, []
    for piece in tokens.split(pieces, dim=1):
        out, state = model(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), logits, rtol=0, atol=1e-10)
    assert state is not None
    assert_same(state, truth)


@torch.no_grad()
def test_a_sequence_is_the_same_in_any_batch() -> None:
    model, tokens = make(), random_tokens(4, 10)
    logits, whole = model(tokens)
    rows = [model(tokens[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(torch.cat([out for out, _ in rows]), logits, rtol=0, atol=1e-10)
    assert_same(ModelState.join([state for _, state in rows]), whole)
    for (_, alone), part in zip(rows, whole.split(4), strict=True):
        assert_same(part, alone)
    backwards = ModelState.join([state for _, state in rows[::-1]])
    picked = whole.where(torch.tensor([True, False, False, False]), backwards)
    assert_same(picked.split(4)[0], rows[3][1])
    assert_same(picked.split(4)[1], rows[1][1])


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it() -> None:
    model, tokens = make(), random_tokens(1, 11)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % CONFIG.vocab_size
    (a, _), (b, _) = model(tokens), model(changed)
    assert torch.equal(a[:, :6], b[:, :6])
    assert (a[:, 6:] != b[:, 6:]).any(dim=-1).all()


@torch.no_grad()
def test_the_state_it_is_given_stays_as_it_was() -> None:
    model = make()
    _, state = model(random_tokens(2, 6))
    before = [x.clone() for x in tensors(state)]
    first, _ = model(random_tokens(2, 5), state)
    again, _ = model(random_tokens(2, 5), state)
    assert torch.equal(first, again)
    assert all(map(torch.equal, tensors(state), before))


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("objective", ["decoding", "similarity", "encoding"])
def test_every_parameter_has_a_gradient(objective: str, tie_word_embeddings: bool) -> None:
    model = make(objective=objective, tie_word_embeddings=tie_word_embeddings)
    tokens = random_tokens(2, 40)
    loss, _ = model.loss(tokens, tokens.roll(-1, dims=1))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # An embedding of a token that was not seen has none of its own.
        rows = parameter.grad[tokens.unique()] if name == "embedding" else parameter.grad
        assert (rows != 0).all(), name


def test_gradients_reach_through_the_state_unless_detached() -> None:
    model, tokens = make(), random_tokens(1, 12)
    whole = torch.autograd.grad(model(tokens)[0][:, 6:].sum(), list(model.parameters()))
    _, state = model(tokens[:, :6])
    pieces = torch.autograd.grad(model(tokens[:, 6:], state)[0].sum(), list(model.parameters()), retain_graph=True)
    for mine, truth in zip(pieces, whole, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-10)
    model.zero_grad()
    model(tokens[:, 6:], state.detach())[0].sum().backward()
    assert model.layers[0].mixer.anchor.grad is None
    assert model.layers[0].mixer.conv.grad is not None


def test_the_loss_is_the_mean_cross_entropy() -> None:
    model, tokens = make(), random_tokens(2, 9)
    targets = tokens.roll(-1, dims=1)
    loss, _ = model.loss(tokens, targets)
    logits, _ = model(tokens)
    truth = -logits.log_softmax(dim=-1).gather(-1, targets[..., None]).mean()
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-6)


def test_a_seed_is_a_model() -> None:
    one, same, other = make(), make(), LatticeForCausalLM(CONFIG)
    other.initialize(1)
    weights = [dict(model.named_parameters()) for model in (one, same, other.double())]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["embedding"], weights[2]["embedding"])
