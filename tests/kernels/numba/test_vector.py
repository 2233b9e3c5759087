"""Norm, SwiGLU and functions of vectors of the CPU kernels against float64, and what the CPU says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lattice_serve.kernels import rms_norm as reference_norm
from lattice_serve.kernels import swiglu as reference_swiglu
from lattice_serve.kernels.numba import features as cpu_features
from lattice_serve.kernels.numba.dots import cross_dots, dots
from lattice_serve.kernels.numba.features import Stored, has_bf16
from lattice_serve.kernels.numba.lanes import LANES, padded
from lattice_serve.kernels.numba.math import exp, sigmoid, silu
from lattice_serve.kernels.numba.vector import larger, largest, load, pointer, store
from lattice_serve.kernels.pointwise.cpu import rms_norm, swiglu
from tests.kernels.harness import bands, poison
from tests.kernels.naive import error, normal

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Function = Callable[[Any], Any]

widths = pytest.mark.parametrize("n", [1, 3, 16, 37, 130])
SMALLEST, LARGEST = 2.0**-126, 2.0**127
"""Powers of two that are normal numbers in float32."""


def filled(x: Tensor) -> Tensor:
    """float32 lines, filled up with zeros to whole vectors."""
    return F.pad(x.float(), (0, padded(x.shape[-1]) - x.shape[-1]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@widths
def test_rms_norm(n: int, scale: float) -> None:
    x, weight = (scale * normal(9, n)).float(), normal(n, seed=1).float()
    x[4] = 0
    with bands(filled(x), filled(weight), poison(9, padded(n))) as (lines, weights, out):
        for i in range(9):
            flat = [array.numpy().reshape(-1) for array in (lines, weights, out)]
            rms_norm(flat[0], i * padded(n), n, flat[1], 0, np.float32(1e-6), flat[2], i)
    assert error(out[:, :n], reference_norm(x.double(), weight.double(), 1e-6)) <= 1e-6
    assert not out[:, n:].any()
    assert not out[4].any()


@widths
def test_swiglu(n: int) -> None:
    gate, up = (5 * normal(2, 9, n)).float()
    in_turn = torch.stack([filled(part).unflatten(1, (-1, LANES)) for part in (gate, up)], dim=2).flatten(1)
    with bands(in_turn, poison(9, padded(n))) as (lines, out):
        flat = [array.numpy().reshape(-1) for array in (lines, out)]
        for i in range(9):
            swiglu(flat[0], i * in_turn.shape[1], n, flat[1], i, n, 0)
    assert error(out[:, :n], reference_swiglu(torch.cat((gate, up), dim=1).double())) <= 1e-6
    assert not out[:, n:].any()


def _each(function: Any, x: Any, out: Any) -> None:
    for i in range(0, len(x), LANES):
        store(out, i, function(load(x, i)))


_compiled_each: Any = njit(_each)


def each(function: Function, x: Float32) -> Float32:
    """Vector by vector, as kernels do."""
    lines = np.zeros(padded(len(x)), dtype=np.float32)
    lines[: len(x)] = x
    out = np.full_like(lines, np.nan)
    _compiled_each(function, lines, out)
    return out[: len(x)]


def one(function: Function, x: float) -> float:
    return float(each(function, np.array([x], dtype=np.float32))[0])


def everywhere() -> Float32:
    """Finite numbers: every exponent of both signs, subnormal ones, many where results change, and the edges."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    edges = np.array([0, 1e-45, SMALLEST, 2**-25, 87, 88, 88.7, 89, 103, 104, LARGEST], dtype=np.float32)
    edges = np.concatenate((edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))))
    x = np.concatenate((bits[np.isfinite(bits)], random.uniform(-110, 110, 200_000), edges, -edges))
    return x.astype(np.float32)


def ulps(actual: Float32, truth: Float64) -> float:
    """The largest difference in units of the last place of the true value in float32."""
    return float((np.abs(actual - truth) / np.spacing(np.abs(truth).astype(np.float32))).max())


def test_exp() -> None:
    """Within 2 units over [-87, 88], held at the ends outside."""
    x = everywhere()
    y = each(exp, x)
    inside = (x >= -87) & (x <= 88)
    assert ulps(y[inside], np.exp(x[inside].astype(np.float64))) <= 2
    assert (y[x < -87] == one(exp, -87)).all()
    assert (y[x > 88] == one(exp, 88)).all()
    assert one(exp, 0) == 1


def test_sigmoid() -> None:
    """Within 4 units from -87 on: 2 of exp, half of the sum, half of the quotient, and their unit may be half as wide.
    Below, where the true value is less than the smallest normal number, so is this one.
    """
    x = everywhere()
    y = each(sigmoid, x)
    inside = x >= -87
    with np.errstate(over="ignore"):
        truth = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert ulps(y[inside], truth[inside]) <= 4
    assert ((y[~inside] >= 0) & (y[~inside] <= 2 * SMALLEST)).all()
    assert one(sigmoid, 0) == 0.5


def test_silu() -> None:
    """Within 4 units from -87 on; below, where it is nearly 0, no further from 0 than x times sigmoid's remainder."""
    x = everywhere()
    y = each(silu, x)
    inside = x >= -87
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        truth = wide / (1 + np.exp(-wide))
    assert ulps(y[inside], truth[inside]) <= 4
    assert ((y[~inside] <= 0) & (y[~inside] >= 2 * SMALLEST * wide[~inside])).all()
    assert (np.signbit(y) == np.signbit(x)).all()


@pytest.mark.parametrize(
    ("function", "at_minus", "at_plus"),
    [(exp, np.exp(-87.0), np.exp(88.0)), (sigmoid, 0.0, 1.0), (silu, -np.inf, np.inf)],
    ids=["exp", "sigmoid", "silu"],
)
def test_what_is_not_finite(function: Function, at_minus: float, at_plus: float) -> None:
    """exp is held at its ends, so silu of -inf is -inf: it cannot be taken for a number."""
    x = np.array([-np.inf, np.inf, np.nan, -np.nan], dtype=np.float32)
    y = each(function, x)
    np.testing.assert_allclose(y[:2], [at_minus, at_plus], rtol=1e-6, atol=2 * SMALLEST)
    assert np.isnan(y[2:]).all()


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(
    ("stored", "features", "expected"),
    [
        ("bfloat16", (), ["float32"]),
        ("bfloat16", ("avx2", "avx512f"), ["float32"]),
        ("bfloat16", ("avx512f", "avx512bf16"), ["avx512_bf16", "float32"]),
        ("bfloat16", ("avx512bf16", "amx-tile", "amx-bf16"), ["float32"]),
        ("bfloat16", ("avx512f", "avx512vnni", "amx-tile", "amx-int8"), ["float32"]),
        ("bfloat16", ("avx512f", "avx512bf16", "amx-tile", "amx-bf16"), ["amx", "avx512_bf16", "float32"]),
        ("int8", ("avx512f", "avx512bf16", "amx-tile", "amx-bf16"), ["float32"]),
        ("int8", ("avx512f", "avx512vnni"), ["avx512_vnni", "float32"]),
        ("int8", ("avxvnni", "avx512vnni"), ["float32"]),
        ("int8", ("avx512f", "avx512vnni", "amx-tile", "amx-int8"), ["amx_int8", "avx512_vnni", "float32"]),
        ("float32", ("avx512f", "avx512vnni", "avx512bf16", "amx-tile", "amx-int8", "amx-bf16"), ["float32"]),
    ],
)
def test_available_products(
    stored: Stored, features: tuple[str, ...], expected: list[str], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMX is what the system must allow, too."""
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: dict.fromkeys(features, True))
    monkeypatch.setattr(cpu_features, "_may_use_tiles", lambda: allowed)
    found = cpu_features.available_products.__wrapped__(stored)
    assert list(found) == [each for each in expected if allowed or not each.startswith("amx")]


def test_dots_of_rows_are_those_of_one_row() -> None:
    """In the lanes that are said, with the same bits."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(16 * 48).astype(np.float32) for _ in range(2))
    truth = (x.astype(np.float64) * w).reshape(16, 48).sum(axis=1)

    def several(rows: Any) -> Any:
        return njit(lambda x, w, r, out: store(out, 0, dots(rows, pointer(x, 48 * r), 48, pointer(w, 48 * r), 48, 48)))

    alone = np.empty((16, LANES), dtype=np.float32)
    one, four, sixteen = several(1), several(4), several(16)
    for r in range(16):
        one(x, w, r, alone[r])
    assert (alone == alone[:, :1]).all()
    np.testing.assert_allclose(alone[:, 0], truth, rtol=0, atol=1e-5)
    out = np.empty(LANES, dtype=np.float32)
    sixteen(x, w, 0, out)
    np.testing.assert_array_equal(out, alone[:, 0])
    for r in range(0, 16, 4):
        four(x, w, r, out)
        np.testing.assert_array_equal(out, alone[r : r + 4, 0].repeat(4))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_cross_dots_are_dots(rows: int) -> None:
    """Of each row with each of 16 lines, with the same bits, and nothing else is written."""
    rng = np.random.default_rng(rows)
    x, w = (rng.standard_normal(size).astype(np.float32) for size in (rows * 64, 16 * 48))
    run = njit(lambda x, w, out: cross_dots(rows, x, 64, w, 48, 48, pointer(out, 16)))
    dot = njit(lambda x, w, out: store(out, 0, dots(16, x, 0, w, 48, 48)))
    out, expected = (np.full(16 + rows * 64, np.nan, dtype=np.float32) for _ in range(2))
    run(x, w, out)
    for r in range(rows):
        dot(x[r * 64 :], w, expected[16 + r * 64 :])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("bad", [0.0, 1e-38, float("inf"), float("nan"), -float("inf")])
def test_largest_of_a_vector(bad: float) -> None:
    """Without signs, and NaN beyond infinity, wherever it is."""

    run = njit(lambda x, y: largest(larger(load(x, 0), load(y, 0))))
    rng = np.random.default_rng(0)
    for place in range(2 * LANES):
        x = -rng.random(2 * LANES, dtype=np.float32)
        x[place] = bad
        np.testing.assert_equal(np.float32(run(x[:LANES], x[LANES:])), np.abs(x).max())


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (b"processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse2\n", True),
        (b"processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        (b"processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        (b"processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16x no_amx_bf16\n", False),
        (b"processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: bf16\n", False),
        (b"model name\t: bf16\nbugs\t\t: amx_bf16\nflags\t\t: fpu\n", False),
        (b"model name\t: \xff\xfe\nflags\t\t: avx512_bf16\n", True),
        (b"bf16\n", False),
        (b"", False),
    ],
)
def test_has_bf16(tmp_path: Path, cpuinfo: bytes, expected: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_bytes(cpuinfo)
    assert has_bf16(path) is expected


def test_has_bf16_of_what_cannot_be_read(tmp_path: Path) -> None:
    assert has_bf16(tmp_path / "missing") is False
    assert has_bf16(tmp_path) is False
