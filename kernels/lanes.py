"""How long a vector is, for whoever lays out memory."""

from numba.extending import register_jitable

LANES = 16
"""Floats in 64 bytes: the longest vector of any processor so far, and a cache line."""


@register_jitable
def padded(n: int) -> int:
    """The next multiple of `LANES`."""
    return -(-n // LANES) * LANES
