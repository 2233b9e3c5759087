"""Scalar functions for Numba kernels that LLVM can vectorise, which libm calls are not."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

REDUCE = {"reassoc", "contract", "nsz"}
"""Fast-math flags of kernels: sums may be vectorised, NaN and infinity keep their meaning."""


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    """float32 with the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def as_float32(typingctx: Any, value: Any) -> Any:
    """float32 of a float32, or of the bits of a bfloat16 in a uint16; a function of one argument in a kernel."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), ir.Constant(word, 16)), ir.FloatType())

    if value not in (types.float32, types.uint16):
        return None
    return types.float32(value), codegen


@njit(fastmath={"contract"}, cache=True)
def exp(x: Any) -> Any:
    """e^x in float32, within 2 units in the last place for x in [-87, 88], held at the ends outside; NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, Cody and Waite), a polynomial in r, n into the exponent.
    """
    x = np.float32(x)
    clipped = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(clipped * np.float32(1.44269504) + np.float32(0.5))
    r = clipped - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    scaled = p * _float_of_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return scaled if x == x else x


@njit(fastmath={"contract"}, cache=True)
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) in float32."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@njit(fastmath={"contract"}, cache=True)
def silu(x: Any) -> Any:
    """x / (1 + e^-x) in float32."""
    return np.float32(x) / (np.float32(1.0) + exp(-x))
