"""The mixer against its equations in numpy, and over any split of a sequence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lattice_serve.kernels.mixers.lattice import MixerShape, MixerState, MixerWeights, mix
from tests.kernels.naive import CHUNK_SIZES, OBJECTIVES, Array, Tokens, cast, error, naive, random_mixer, state_error

SHAPE = MixerShape(H=2, d=7, m=3, C=4, taps=4, objective="decoding", use_forget_gate=True, norm_eps=1e-6)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def plain_mix(z: Tensor, weights: MixerWeights, shape: MixerShape) -> Tensor:
    """`mix` from a sequence's start, column by column of z: q, k, v, output gate, gamma, mu."""
    H, d, m, taps = shape.H, shape.d, shape.m, shape.taps
    B, T, _ = z.shape
    columns = np.split(z.numpy(), np.cumsum([H * m, H * m, H * d, H * d, H]), axis=-1)
    conv_in = np.concatenate(columns[:3], axis=-1)
    u = np.zeros_like(conv_in)
    for t in range(T):
        for j in range(taps):
            if t - taps + 1 + j >= 0:
                u[:, t] += weights.conv.numpy()[:, j] * conv_in[:, t - taps + 1 + j]
    u *= sigmoid(u)
    q, k, v = (x.reshape(B, T, H, n) for x, n in zip(np.split(u, [H * m, 2 * H * m], axis=-1), (m, m, d), strict=True))
    q, k = (x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    gamma, mu = (sigmoid(x + bias) for x, bias in zip(columns[4:], np.split(weights.gate_bias.numpy(), 2), strict=True))
    f = 10 ** (-12 / shape.C)
    mu = f + (1 - f) * mu if shape.use_forget_gate else np.ones_like(mu)
    anchor = weights.anchor / weights.anchor.norm(dim=1, keepdim=True)
    tokens = Tokens(*map(torch.from_numpy, (q, k, v, gamma, mu)))
    y = naive(tokens, anchor.expand(B, -1, -1, -1), shape.C, shape.objective)[0].numpy()
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + shape.norm_eps) * weights.norm.numpy()
    gate = columns[3].reshape(B, T, H, d)
    return torch.from_numpy((y * gate * sigmoid(gate)).reshape(B, T, H * d))


@pytest.mark.parametrize("use_forget_gate", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("C", CHUNK_SIZES)
def test_mix_is_its_equations(C: int, objective: str, use_forget_gate: bool) -> None:
    shape = replace(SHAPE, C=C, objective=objective, use_forget_gate=use_forget_gate)
    z, weights = random_mixer(shape, 2 * C + 3)
    y, _ = mix(z, weights, shape, MixerState.initial(shape, weights, 2))
    assert error(y, plain_mix(z, weights, shape)) <= 1e-10


@settings(max_examples=40)
@given(
    pieces=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    C=st.sampled_from(CHUNK_SIZES),
    objective=st.sampled_from(OBJECTIVES),
    taps=st.integers(1, 4),
)
def test_any_split_gives_the_same(pieces: list[int], C: int, objective: str, taps: int) -> None:
    shape = replace(SHAPE, C=C, objective=objective, taps=taps)
    z, weights = random_mixer(shape, sum(pieces))
    y, truth = mix(z, weights, shape, MixerState.initial(shape, weights, 2))
    state, outputs = MixerState.initial(shape, weights, 2), []
    for piece in z.split(pieces, dim=1):
        out, state = mix(piece, weights, shape, state)
        outputs.append(out)
    assert error(torch.cat(outputs, dim=1), y) <= 1e-10
    assert state_error(state.lattice, truth.lattice) <= 1e-10
    assert torch.equal(state.tail, truth.tail)


def test_the_state_it_is_given_stays_as_it_was() -> None:
    z, weights = random_mixer(SHAPE, 6)
    _, state = mix(z, weights, SHAPE, MixerState.initial(SHAPE, weights, 2))
    before = [x.clone() for x in (*state.lattice.tensors(), state.tail)]
    _, after = mix(z, weights, SHAPE, state)
    assert (state.lattice.position, after.lattice.position) == (6, 12)
    for x, copy in zip((*state.lattice.tensors(), state.tail), before, strict=True):
        assert torch.equal(x, copy)


def test_bfloat16_in_and_out_around_a_float32_state() -> None:
    z, weights = random_mixer(SHAPE, 21)
    z = z.bfloat16()
    narrow = cast(weights, torch.bfloat16)
    y, state = mix(z, narrow, SHAPE, MixerState.initial(SHAPE, narrow, 2))
    assert y.dtype == torch.bfloat16
    assert {x.dtype for x in state.lattice.tensors()} == {torch.float32}
    rounded = cast(narrow, torch.float64)
    assert error(y, plain_mix(z.double(), rounded, SHAPE)) <= 1e-2


def test_a_batch_splits_joins_and_selects_rows() -> None:
    z, weights = random_mixer(SHAPE, 6, B=4)
    y, whole = mix(z, weights, SHAPE, MixerState.initial(SHAPE, weights, 4))
    halves = []
    for rows in (z[:2], z[2:]):
        out, half = mix(rows, weights, SHAPE, MixerState.initial(SHAPE, weights, 2))
        halves.append(half)
        torch.testing.assert_close(out, y[:2] if len(halves) == 1 else y[2:], rtol=1e-12, atol=1e-12)
    for joined in (MixerState.join(halves), MixerState.join(whole.split(2))):
        assert state_error(joined.lattice, whole.lattice) <= 1e-12
        assert torch.equal(joined.tail, whole.tail)
    swapped = MixerState.join(halves[::-1])
    picked = whole.where(torch.tensor([False, False, True, True]), swapped)
    assert state_error(picked.lattice, MixerState.join([halves[0], halves[0]]).lattice) <= 1e-12
    assert torch.equal(picked.tail, torch.cat((whole.tail[:2], whole.tail[:2])))
