"""Work for vectors while the matrix unit multiplies, in turns: the unit leaves most of the processor idle.

It is of one type, whoever multiplies, so that products are compiled once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit
from numba.extending import register_jitable

from lattice_serve.kernels.pointwise.cpu import swiglu


class SwigluRows(NamedTuple):
    """`swiglu` of some rows, one a turn."""

    x: Any
    o_x: int
    x_row: int
    """Floats from row to row."""
    n: int
    out: Any
    first: int
    """The row of `out` for the first one."""
    rows: int
    K: int
    k: int


@register_jitable
def nothing(x: Any, out: Any) -> SwigluRows:
    """No work, of the type that work with such arrays has."""
    return SwigluRows(x, 0, 0, 0, out, 0, 0, 0, 0)


@njit(cache=True)
def take_turns(work: Any, turn: int, count: int) -> int:
    """Take up to so many turns from `turn` on; the one that is next."""
    end = min(turn + count, work.rows)
    while turn < end:
        swiglu(work.x, work.o_x + turn * work.x_row, work.n, work.out, work.first + turn, work.K, work.k)
        turn += 1
    return turn
