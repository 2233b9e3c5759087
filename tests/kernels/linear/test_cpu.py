"""Matrix products on the CPU: near the exact ones, and every row's bits its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lattice_serve.kernels.linear import RowInvariantLinear
from lattice_serve.kernels.linear.int8 import LARGEST_K
from lattice_serve.kernels.linear.quantize import quantize
from lattice_serve.kernels.linear.row_invariant import BLOCK
from lattice_serve.kernels.numba.features import Products, available_products
from tests.kernels.harness import same_bits
from tests.kernels.linear.product import Product
from tests.kernels.naive import error, normal

Linear = Callable[[Tensor, Tensor], Tensor]

ROWS = 70
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
every_product = pytest.mark.parametrize(
    ("dtype", "products"),
    [(torch.float32, "float32"), *((torch.bfloat16, each) for each in available_products("bfloat16"))],
)
"""A dtype of weights, and what multiplies with them."""
every_size = pytest.mark.parametrize(
    ("N", "K"), [(1, 1), (5, 1), (33, 2), (7, 3), (64, 5), (100, 37), (31, 64), (257, 129)]
)


def random_product(N: int, K: int, dtype: torch.dtype, products: Products = "float32") -> tuple[Tensor, Tensor]:
    """x [ROWS, K] in float32, of bfloat16 where that is what is multiplied, and a weight [N, K]."""
    x = normal(ROWS, K).float()
    return x if products == "float32" else x.bfloat16().float(), normal(N, K, seed=1).to(dtype)


@every_product
@every_size
def test_it_is_the_product(N: int, K: int, dtype: torch.dtype, products: Products) -> None:
    """K products added up in float32, in whatever order, are off by at most K roundings of sum |x| |w|."""
    x, weight = random_product(N, K, dtype, products)
    y = Product(weight)(x, products)
    assert (y.dtype, y.shape) == (torch.float32, (ROWS, N))
    bound = K * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert bool(((y - x.double() @ weight.double().T).abs() <= bound).all())


@every_product
@every_size
def test_any_number_of_rows_gives_each_the_same_bits(N: int, K: int, dtype: torch.dtype, products: Products) -> None:
    x, weight = random_product(N, K, dtype)
    product = Product(weight)
    y = product(x, products)
    for rows in range(ROWS + 1):
        assert same_bits(product(x[:rows], products), y[:rows]), rows
        assert same_bits(product(x.roll(rows, dims=0), products), y.roll(rows, dims=0)), rows


@pytest.mark.parametrize("scale", [1e-19, 1e-20])
@pytest.mark.parametrize("products", available_products("bfloat16"))
def test_sums_that_are_next_to_nothing_have_the_bits_of_many_rows(products: Products, scale: float) -> None:
    """Some or all products are denormal, which a unit that multiplies may take for zeros."""
    x, weight = scale * normal(ROWS, 70).float(), (scale * normal(37, 70, seed=1)).bfloat16()
    product = Product(weight)
    y = product(x, products)
    for row in range(ROWS):
        assert same_bits(product(x[row : row + 1], products), y[row : row + 1]), row


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(150, 80, 600), (150, 128, 832), (300, 64, 1700)])
def test_many_rows_of_many_k_have_the_bits_of_few(M: int, N: int, K: int, quantized: bool) -> None:
    """Whatever parts of K many rows are multiplied by."""
    x, weight = normal(M, K).float(), normal(N, K, seed=1).bfloat16()
    product = Product(weight, "int8") if quantized else Product(weight)
    for products in available_products("int8" if quantized else "bfloat16"):
        y = product(x, products)
        for first, last in ((0, 1), (0, 127), (16, 144), (M - 1, M)):
            assert same_bits(product(x[first:last], products), y[first:last]), (products, first, last)


@pytest.mark.parametrize("products", available_products("bfloat16"))
def test_activations_are_rounded_to_bfloat16_as_torch_does(products: Products) -> None:
    x, weight = random_product(33, 40, torch.bfloat16)
    x[0, :4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 3.4e38])
    product = Product(weight)
    assert (products == "float32") ^ same_bits(product(x, products), product(x.bfloat16().float(), products))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_product
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, products: Products, bad: float) -> None:
    """Of x, and of the weight: its column of y."""
    x, weight = random_product(45, 7, dtype)
    y = Product(weight)(x, products)
    rows, columns = torch.arange(ROWS) != 12, torch.arange(45) != 40
    broken = x.clone()
    broken[12, 3] = bad
    mine = Product(weight)(broken, products)
    assert same_bits(mine[rows], y[rows])
    assert not bool(mine[12].isfinite().any())
    weight[40, 5] = bad
    mine = Product(weight)(x, products)
    assert same_bits(mine[:, columns], y[:, columns])
    assert not bool(mine[:, 40].isfinite().any())


@pytest.mark.parametrize("K", [2, 64])
@every_dtype
def test_a_weight_is_packed_as_a_copy_without_waste(dtype: torch.dtype, K: int) -> None:
    weight = torch.nn.Parameter(normal(256, K).to(dtype))
    product, x = Product(weight), normal(3, K).float()
    y = product(x)
    weight.data.zero_()
    assert same_bits(product(x), y)
    assert product.nbytes == weight.nbytes
    assert Product(weight[:255]).nbytes >= 255 * K * weight.itemsize


@pytest.mark.parametrize("products", available_products("int8"))
@every_size
def test_int8_is_near_and_as_exact_in_its_rows(N: int, K: int, products: Products) -> None:
    """Each weight is off by half of its output's scale at most, which is the largest weight / 127.

    Where activations are rounded, each is off by half of the row's largest / 32639.
    """
    x, weight = random_product(N, K, torch.bfloat16)
    product = Product(weight, "int8")
    y = product(x, products)
    half = weight.double().abs().amax(dim=1) / 254
    bound = x.double().abs().sum(dim=1, keepdim=True) * half * (1 + 1e-5) + 1e-6
    if products != "float32":
        bound += x.double().abs().amax(dim=1, keepdim=True) / 65278 * (weight.double().abs().sum(dim=1) + K * half)
    assert bool(((y - x.double() @ weight.double().T).abs() <= bound).all())
    for rows in range(ROWS + 1):
        assert same_bits(product(x[:rows], products), y[:rows]), rows
        assert same_bits(product(x.roll(rows, dims=0), products), y.roll(rows, dims=0)), rows


WHOLE = [each for each in available_products("int8") if each != "float32"]
every_whole = pytest.mark.parametrize("products", WHOLE)
"""Products of whole numbers, which are exact but for their scales."""


def whole_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What they are, of x as rounded to its steps; and how far float32 may be off in scaling both bytes' sums."""
    bytes_, scales = quantize(weight)
    peak = x.abs().amax(dim=1, keepdim=True)
    # As one division: torch would multiply with a reciprocal.
    inverse = torch.full_like(peak, 32639) / peak
    wholes = (x * torch.where(peak >= 2.0**-100, inverse, 0)).round().long()
    high = (wholes + 128).div(256, rounding_mode="floor")
    steps = torch.where(peak >= 2.0**-100, peak / 32639, 0).double() * scales.double()
    sums = [part @ bytes_.long().T for part in (high, wholes - 256 * high)]
    return (256 * sums[0] + sums[1]) * steps, 2.0**-21 * (256 * sums[0].abs() + sums[1].abs()) * steps


@every_whole
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whole_numbers_are_multiplied_exactly(products: Products, data: st.DataObject) -> None:
    M, N, K = (data.draw(st.integers(1, most), label=label) for most, label in ((40, "M"), (200, "N"), (200, "K")))
    x, weight = normal(M, K, seed=data.draw(st.integers(0, 99))).float(), normal(N, K, seed=1).float()
    for row in range(M):  # of any size, outliers among them, and of extremes alone
        x[row] *= 10.0 ** (row % 7 * 4 - 12)
        x[row, row % K] *= 1000.0 if row % 3 == 0 else 1.0
        if row % 5 == 4:
            x[row] = x[row].sign()
    weight[0] = weight[0].sign()
    weight[N // 2] = 0
    y = Product(weight, "int8")(x, products)
    expected, bound = whole_product(x, weight)
    assert bool(((y - expected).abs() <= bound).all())
    assert all(same_bits(Product(weight, "int8")(x, each), y) for each in WHOLE)


@every_whole
def test_the_largest_sums_fit(products: Products) -> None:
    x, weight = torch.ones(3, LARGEST_K), torch.ones(2, LARGEST_K)
    x[1] = -x[1]
    x[2] = 127 / 32639 * torch.ones(LARGEST_K)  # the largest lower byte
    x[2, 0] = 1
    y = Product(weight, "int8")(x, products)
    assert y[:, 0].tolist() == pytest.approx([LARGEST_K, -LARGEST_K, 1 + 127 / 32639 * (LARGEST_K - 1)], rel=1e-6)


def test_a_matrix_whose_sums_might_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{LARGEST_K + 1} inputs is too wide for int8"):
        Product(torch.ones(1, LARGEST_K + 1), "int8")


@every_whole
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_of_whole_numbers_that_is_not_finite_stays_alone(products: Products, bad: float) -> None:
    x, weight = random_product(45, 70, torch.bfloat16)
    product = Product(weight, "int8")
    y = product(x, products)
    broken = x.clone()
    broken[12, 66] = bad
    mine, rows = product(broken, products), torch.arange(ROWS) != 12
    assert same_bits(mine[rows], y[rows])
    assert not bool(mine[12].isfinite().any())


@every_whole
def test_rows_of_nothing_are_zero(products: Products) -> None:
    x = normal(5, 33).float()
    x[1], x[3] = 0, 1e-31 * x[3]
    y = Product(normal(20, 33, seed=1).float(), "int8")(x, products)
    assert not y[[1, 3]].any()
    assert bool(y[[0, 2, 4]].all())


def test_int8_of_an_output_without_weights_is_zero() -> None:
    weight = normal(20, 9).float()
    weight[7] = 0
    y = Product(weight, "int8")(normal(3, 9).float())
    assert not y[:, 7].any()
    assert bool(y[:, :7].all())


def check_rows(linear: Linear, weight: Tensor, tolerance: float) -> None:
    """Near the exact product, and each row's bits at any number of rows those among 2 * ROWS."""
    x = normal(2 * ROWS, weight.shape[1]).float()
    y = linear(x, weight)
    assert y.dtype == torch.float32
    assert error(y, x.double() @ weight.double().T) <= tolerance
    for rows in (1, 2, 3, 4, 7, 12, 13, 31, 63, 64, 65, 127, 128, 129):
        assert same_bits(linear(x[:rows], weight), y[:rows]), rows


@every_dtype
def test_products_of_torch_keep_their_rows_too(dtype: torch.dtype) -> None:
    weights = [random_product(N, K, dtype)[1] for N, K in ((100, 37), (64, 48))]
    linear = RowInvariantLinear(weights, max_rows=2 * ROWS)
    for weight in weights:
        check_rows(linear, weight, tolerance=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("multiple", [1, 4, 8, 16, 32, None])
def test_rows_are_filled_up_to_what_agrees(monkeypatch: pytest.MonkeyPatch, multiple: int | None) -> None:
    """On a library whose sums depend on how many rows are missing to `multiple`, or on every number of rows."""
    seen: set[int] = set()

    def library(x: Tensor, weight: Tensor, exact: Linear = F.linear) -> Tensor:
        seen.add(len(x))
        y = exact(x.double(), weight.double()).float()
        return y * (1 + 1e-6 * (-len(x) % multiple if multiple else len(x)))

    monkeypatch.setattr(F, "linear", library)
    _, weight = random_product(20, 9, torch.float32)
    linear = RowInvariantLinear([weight], max_rows=2 * ROWS)
    assert linear.row_multiple == multiple
    seen.clear()
    check_rows(linear, weight, tolerance=1e-3)
    assert seen == {BLOCK} if multiple is None else not any(rows % multiple for rows in seen)


def test_a_library_whose_rows_depend_on_their_place_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(x: Tensor, weight: Tensor, exact: Linear = F.linear) -> Tensor:
        return exact(x, weight) * (1 + 1e-6 * (torch.arange(len(x)) % BLOCK)[:, None])

    monkeypatch.setattr(F, "linear", library)
    assert RowInvariantLinear([normal(20, 9).float()], max_rows=ROWS).row_multiple is None
