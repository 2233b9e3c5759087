"""Functions of vectors (`kernels.numba.vector`) that libm has for scalars only."""

from __future__ import annotations

import numpy as np
from numba import njit

from lattice_serve.kernels.numba.types import Vector
from lattice_serve.kernels.numba.vector import fma, inverse, maximum, minimum, power_of_two, splat

_WHOLE = 1.5 * 2**23 + 127
"""A float32 beside it that is n more has n + 127, the exponent of 2^n, in its lowest bits."""


@njit(inline="always")
def constant(value: float) -> Vector:
    return splat(np.float32(value))


@njit(inline="always")
def _exp(x: Vector, sign: float) -> tuple[Vector, Vector]:
    """p and s = 2^n with p s = e^(sign x), for sign 1 or -1; NaN stays NaN in p.

    sign x is held in [-87, 88]. It is n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, Cody and Waite). p = e^r is
    1 + r + r^2 times a polynomial, the best of its degree: 3e-9 off.
    """
    held = minimum(constant(87.5 + 0.5 * sign), maximum(constant(-87.5 + 0.5 * sign), x))
    t = fma(held, constant(1.44269504 * sign), constant(_WHOLE))
    n = t - constant(_WHOLE)
    r = fma(n, constant(-0.693359375 * sign), held)  # times sign, as all odd powers of it below
    r = fma(n, constant(2.12194440e-4 * sign), r)
    p = fma(constant(1.381459180265665e-3), r, constant(8.368716575205326e-3 * sign))
    p = fma(p, r, constant(4.166838899254799e-2))
    p = fma(p, r, constant(1.666652113199234e-1 * sign))
    p = fma(p, r, constant(4.999999403953552e-1))
    p = fma(p, r, constant(sign))
    return fma(p, r, constant(1.0)), power_of_two(t)


@njit(cache=True)
def exp(x: Vector) -> Vector:
    """e^x within 2 units in the last place for x in [-87, 88], held at the ends outside; NaN stays NaN."""
    p, s = _exp(x, 1.0)
    return p * s


@njit(cache=True)
def sigmoid(x: Vector) -> Vector:
    """1 / (1 + e^-x)."""
    p, s = _exp(x, -1.0)
    return inverse(fma(p, s, constant(1.0)))


@njit(cache=True)
def silu(x: Vector) -> Vector:
    """x / (1 + e^-x)."""
    return x * sigmoid(x)
