"""The small Triton kernels against float64: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from lattice_serve.kernels.linear.quantize import quantize
from lattice_serve.kernels.linear.tiles import ARCHITECTURES, Phase, part
from tests.kernels.harness import same_bits
from tests.kernels.naive import error, normal
from tests.triton_device import DEVICE

# isort: split
from lattice_serve.kernels.linear.triton import gated_linear, linear, parts
from lattice_serve.kernels.pointwise.triton import add_rms_norm
from lattice_serve.kernels.triton import dependent_launch as dependent

BF16 = 2**-8 if DEVICE == "cuda" else 2**-7
"""A bfloat16's rounding, as a share: to the nearest on a GPU, towards zero by Triton's interpreter."""

every_out = pytest.mark.parametrize(("out_dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, BF16)])


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=seed).to(dtype).to(DEVICE)


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN in the middle of a longer vector of marks: the middle, and the whole."""
    size = int(torch.tensor(shape).prod())
    whole = torch.full((size + 128,), -12345.0, dtype=dtype, device=DEVICE)
    middle = whole[64:-64].view(shape)
    middle.fill_(float("nan"))
    return middle, whole


def assert_bands(whole: Tensor) -> None:
    mark = torch.tensor(-12345.0).to(whole.dtype).item()
    assert bool((whole[:64] == mark).all()), "written before the start"
    assert bool((whole[-64:] == mark).all()), "written past the end"


@every_out
@pytest.mark.parametrize(("M", "n"), [(1, 1), (3, 37), (5, 64), (2, 200)])
@pytest.mark.parametrize("P", [0, 1, 3])
def test_add_rms_norm(M: int, n: int, P: int, out_dtype: torch.dtype, tolerance: float) -> None:
    x, weight, added = floats(M, n), floats(n, seed=1), floats(max(P, 1), M, n, seed=2) if P else None
    wide = x.double() + (added.double().sum(0) if added is not None else 0)
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    out, whole = guarded(M, n, dtype=out_dtype)
    stream, stream_whole = guarded(M, n, dtype=torch.float32)
    stream.copy_(x)
    assert add_rms_norm(stream, added, weight, 1e-6, out) is out
    assert error(out, truth) <= tolerance
    assert error(stream, wide) <= 1e-6
    assert same_bits(stream, x) or P
    assert_bands(whole)
    assert_bands(stream_whole)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("M", "N", "K", "P"), [(1, 1, 1, 1), (3, 37, 50, 1), (5, 20, 300, 3), (33, 300, 70, 2)])
def test_linear(phase: Phase, kind: str, M: int, N: int, K: int, P: int) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    x, weight = floats(M, K, dtype=dtype), floats(N, K, seed=1, dtype=dtype)
    scales, exact = None, weight.double()
    if kind == "int8":
        weight, scales = quantize(weight)
        exact = weight.double() * scales.double()[:, None]
    out, whole = guarded(P, M, N, dtype=torch.float32)
    assert linear(x, weight, scales, phase, out) is out
    assert error(out.sum(0), x.double() @ exact.mT) <= 2e-6
    assert_bands(whole)
    narrow, whole = guarded(1, M, N, dtype=torch.bfloat16)
    assert error(linear(x, weight, scales, phase, narrow)[0], x.double() @ exact.mT) <= BF16
    assert_bands(whole)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("M", "n", "K"), [(1, 1, 1), (3, 37, 50), (33, 150, 300)])
def test_gated_linear(phase: Phase, kind: str, M: int, n: int, K: int) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    x, weight = floats(M, K, dtype=dtype), floats(2 * n, K, seed=1, dtype=dtype)
    scales, exact = None, weight.double()
    if kind == "int8":
        weight, scales = quantize(weight)
        exact = weight.double() * scales.double()[:, None]
    gate, up = (x.double() @ exact.mT).chunk(2, dim=1)
    out, whole = guarded(M, n, dtype=torch.float32)
    assert gated_linear(x, weight, scales, phase, out) is out
    assert error(out, gate * gate.sigmoid() * up) <= 2e-6
    assert_bands(whole)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_row_has_its_bits_whatever_is_beside_it(phase: Phase, kind: str) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    x, weight = floats(35, 150, dtype=dtype), floats(20, 150, seed=1, dtype=dtype)
    scales = None
    if kind == "int8":
        weight, scales = quantize(weight)

    def product(rows: Tensor) -> Tensor:
        return linear(rows.contiguous(), weight, scales, phase, torch.empty(2, len(rows), 20, device=DEVICE))

    whole = product(x)
    for row in (0, 17, 34):  # in tiles of another shape than all together, too
        assert same_bits(product(x[row : row + 1])[:, 0], whole[:, row])
    assert same_bits(product(x.roll(5, dims=0)).roll(-5, dims=1), whole)


def test_quantised_values_are_the_nearest() -> None:
    weight = floats(6, 40)
    weight[2] = 0
    whole, scales = quantize(weight)
    assert bool((scales[:, None] * whole.float() - weight).abs().le(scales[:, None] / 2 * (1 + 1e-5)).all())
    assert not whole[2].any()
    assert bool((whole.abs().amax(dim=1)[scales > 0] == 127).all())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("N", "K"), [(768, 768), (768, 2048), (3096, 768), (32000, 768), (16, 16)])
def test_every_part_of_a_split_has_something_to_sum(name: str, itemsize: int, N: int, K: int) -> None:
    architecture = ARCHITECTURES[name]
    P = architecture.splits("decode", N, K, itemsize)
    assert 1 <= P <= 4
    assert (P - 1) * part(K, P, itemsize) < K <= P * part(K, P, itemsize)
    cases: list[tuple[Phase, int]] = [("decode", 1), ("decode", 17), ("decode", 500), ("prefill", 1)]
    for phase, rows in cases:
        assert part(K, P, itemsize) % (architecture.tiles(phase, rows, N, itemsize).k_bytes // itemsize) == 0
    assert architecture.splits("prefill", N, K, itemsize) == 1


def test_what_does_not_fit_is_named() -> None:
    x, weight = floats(3, 8), floats(5, 8)
    with pytest.raises(ValueError, match="out must be"):
        add_rms_norm(x, None, floats(8), 1e-6, floats(3, 7))
    with pytest.raises(ValueError, match="parts must be"):
        add_rms_norm(x, floats(2, 3, 7), floats(8), 1e-6, floats(3, 8))
    with pytest.raises(ValueError, match=r"x must be torch\.float32"):
        add_rms_norm(x.bfloat16(), None, floats(8), 1e-6, floats(3, 8))
    with pytest.raises(ValueError, match="weight must be"):
        gated_linear(x, floats(6, 7), None, "decode", floats(3, 3))
    with pytest.raises(ValueError, match=r"weight is torch\.int8"):
        linear(x, weight.to(torch.int8), None, "decode", floats(1, 3, 5))
    with pytest.raises(ValueError, match="out must be"):
        linear(x, weight, None, "decode", floats(3, 5))
    with pytest.raises(ValueError, match="scales must be"):
        linear(x, weight.to(torch.int8), floats(4), "decode", floats(1, 3, 5))
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        linear(x.double(), weight.double(), None, "decode", floats(1, 3, 5))
    assert parts(x.device, "prefill", weight, 4) == 1


@pytest.mark.parametrize(
    ("capability", "driver", "early"),
    [
        ((8, 0), 13_000, False),
        ((9, 0), 13_000, True),
        ((9, 0), 12_020, False),
        ((9, 0), 0, False),
        ((10, 0), 13_000, False),
    ],
)
def test_launches_depend_where_that_is_known_to_work(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], driver: int, early: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dependent, "driver_version", lambda: driver)
    options = dependent.dependent.__wrapped__(torch.device("cuda", 0))
    assert options == ({"early": True, "launch_pdl": True} if early else {"early": False})


def test_no_driver_knows_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert dependent.driver_version() == 0
