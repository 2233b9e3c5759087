"""Norms, SwiGLU and the short convolution against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import conv1d

from lattice_serve.kernels import rms_norm, swiglu
from lattice_serve.kernels.pointwise import l2_normalize, short_conv
from tests.kernels.naive import error, normal

every_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    x, weight = (scale * normal(3, 5, 37)).to(dtype), normal(37, seed=1).to(dtype)
    wide = x.double().numpy()
    truth = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * weight.double().numpy()
    mine = rms_norm(x, weight, 1e-6)
    assert mine.dtype == dtype
    assert error(mine, torch.from_numpy(truth)) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_l2_normalize(dtype: torch.dtype, tolerance: float) -> None:
    x = normal(4, 3, 13).to(dtype)
    x[0] = 0
    wide = x.double().numpy()
    truth = wide / np.sqrt((wide**2).sum(axis=-1, keepdims=True) + 1e-6)
    mine = l2_normalize(x, 1e-6)
    assert mine.dtype == dtype
    assert error(mine, torch.from_numpy(truth)) <= tolerance
    assert not mine[0].any()


@every_dtype
def test_swiglu(dtype: torch.dtype, tolerance: float) -> None:
    x = (5 * normal(2, 3, 22)).to(dtype)
    gate, up = np.split(x.double().numpy(), 2, axis=-1)
    mine = swiglu(x)
    assert mine.dtype == dtype
    assert error(mine, torch.from_numpy(gate / (1 + np.exp(-gate)) * up)) <= tolerance


@given(pieces=st.lists(st.integers(0, 9), min_size=1, max_size=5), taps=st.integers(1, 5))
def test_short_conv_in_pieces_is_conv1d_of_the_whole(pieces: list[int], taps: int) -> None:
    T = sum(pieces)
    x, weight, first_tail = normal(2, T, 6), normal(6, taps, seed=1), normal(2, taps - 1, 6, seed=2)
    inputs = torch.cat((first_tail, x), dim=1)
    truth = conv1d(inputs.mT, weight[:, None], groups=6).mT if T else torch.zeros_like(x)
    tail, outputs, start = first_tail, [], 0
    for n in pieces:
        y, tail = short_conv(x[:, start : start + n], weight, tail)
        outputs.append(y)
        start += n
    assert error(torch.cat(outputs, dim=1), truth) <= 1e-14
    assert torch.equal(tail, inputs[:, T:])
    assert tail.numel() == 0 or tail.untyped_storage().data_ptr() != first_tail.untyped_storage().data_ptr()
