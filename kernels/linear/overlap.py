"""Work for vectors while the matrix unit multiplies, in turns: the unit leaves most of the processor idle.

It is of one type, whoever multiplies, so that products are compiled once.
"""

from __future__ import annotations

from typing import NamedTuple

from numba.extending import register_jitable

from lattice_serve.kernels.numba.inner import njit_inner
from lattice_serve.kernels.numba.types import Floats, Rows
from lattice_serve.kernels.pointwise.cpu import swiglu


class SwigluRows(NamedTuple):
    """`swiglu` of some rows, one row a turn."""

    gates_ups: Floats
    """Pointer to those of the first row."""
    stride: int
    """Floats from row to row of gates_ups."""
    n: int
    """Outputs of a row."""
    out: Rows
    first: int
    """The row of `out` for the first one."""
    rows: int
    K: int
    """Columns of `out`."""
    k: int
    """The first column that is written."""


@register_jitable
def no_work(gates_ups: Floats, out: Rows) -> SwigluRows:
    """Returns no work, of the type that work with such arrays has."""
    return SwigluRows(gates_ups, 0, 0, out, 0, 0, 0, 0)


@njit_inner()
def take_turns(work: SwigluRows, turn: int, count: int) -> int:
    """Takes up to so many turns from `turn` on; returns the next one."""
    end = min(turn + count, work.rows)
    while turn < end:
        swiglu(work.gates_ups, turn * work.stride, work.n, work.out, work.first + turn, work.K, work.k)
        turn += 1
    return turn
