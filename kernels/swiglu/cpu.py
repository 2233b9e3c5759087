"""SwiGLU on the CPU, element by element."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit, types
from numba.extending import overload

from lattice_serve.kernels.cpu.math import silu
from lattice_serve.kernels.cpu.vector import load
from lattice_serve.kernels.lanes import LANES
from lattice_serve.kernels.linear.activations import put
from lattice_serve.kernels.linear.aside import take, turns


@njit(cache=True)
def swiglu(x: Any, o_x: int, n: int, out: Any, row: int, K: int, k: int) -> None:
    """`kernels.swiglu.swiglu` of n elements, to k and on of a row of activations of K, to the end of the last vector.

    From o_x of x, float32 [..], on there is a vector of gates, one of ups, and so on in turn.
    """
    for i in range(0, n, LANES):
        put(out, row, K, k + i, silu(load(x, o_x + 2 * i)) * load(x, o_x + 2 * i + LANES))


class SwigluRows(NamedTuple):
    """`swiglu` of some rows, one a turn, to do beside a product (`kernels.linear.aside`)."""

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


def _is_swiglu(work: Any) -> bool:
    return isinstance(work, types.BaseTuple) and getattr(work, "instance_class", None) is SwigluRows


@overload(turns, strict=False)
def _turns(work: Any) -> Any:
    return (lambda work: work.rows) if _is_swiglu(work) else None


@overload(take, strict=False)
def _take(work: Any, turn: Any) -> Any:
    def row(work: Any, turn: int) -> None:
        swiglu(work.x, work.o_x + turn * work.x_row, work.n, work.out, work.first + turn, work.K, work.k)

    return row if _is_swiglu(work) else None
