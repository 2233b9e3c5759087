"""Functions of vectors (`kernels.cpu.vector`) that libm has for scalars only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from lattice_serve.kernels.cpu.vector import floor, fma, inverse, maximum, minimum, power_of_two, splat, unless_nan


@njit(inline="always")
def constant(value: float) -> Any:
    return splat(np.float32(value))


@njit(cache=True)
def exp(x: Any) -> Any:
    """e^x within 2 units in the last place for x in [-87, 88], held at the ends outside; NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, Cody and Waite), a polynomial in r, n into the exponent.
    """
    held = minimum(maximum(x, constant(-87.0)), constant(88.0))
    n = floor(fma(held, constant(1.44269504), constant(0.5)))
    r = fma(n, constant(-0.693359375), held)
    r = fma(n, constant(2.12194440e-4), r)
    p = fma(constant(1.9875691500e-4), r, constant(1.3981999507e-3))
    p = fma(p, r, constant(8.3334519073e-3))
    p = fma(p, r, constant(4.1665795894e-2))
    p = fma(p, r, constant(1.6666665459e-1))
    p = fma(p, r, constant(5.0000001201e-1))
    p = fma(p * r, r, r) + constant(1.0)
    return unless_nan(p * power_of_two(n), x)


@njit(cache=True)
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return inverse(constant(1.0) + exp(-x))


@njit(cache=True)
def silu(x: Any) -> Any:
    """x / (1 + e^-x)."""
    return x * inverse(constant(1.0) + exp(-x))
