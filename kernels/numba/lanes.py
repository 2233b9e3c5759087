"""How long a vector is, for whoever lays out memory."""

from typing import Any

import numpy as np
from numba.extending import register_jitable

LANES = 16
"""Floats in 64 bytes: the longest vector of any processor so far, and a cache line."""


@register_jitable
def padded(n: int) -> int:
    """The next multiple of `LANES`."""
    return -(-n // LANES) * LANES


@register_jitable
def spread(n: int) -> int:
    """The next multiple by an odd number: rows that far apart fall on all lines of a cache, not on few."""
    return (-(-n // LANES) | 1) * LANES


def aligned(size: int, dtype: Any) -> Any:
    """Zeros [size] that begin on a cache line: a vector that crosses one takes two loads, a tile many."""
    line = 4 * LANES
    memory = np.zeros(size * np.dtype(dtype).itemsize + line, dtype=np.uint8)
    begin = -memory.ctypes.data % line
    return memory[begin : begin + size * np.dtype(dtype).itemsize].view(dtype)
