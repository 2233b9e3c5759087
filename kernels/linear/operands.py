"""What a matrix product on the CPU is given, by name: a packed weight, and where the outputs go.

Arrays are pointers (`vector.pointer`), which begin where they are wanted: compiled code counts no references to them.
"""

from __future__ import annotations

from typing import NamedTuple

from lattice_serve.kernels.numba.types import Floats, Strips


class Matrix(NamedTuple):
    """A packed weight [N, K]: `linear.packing` says how its strips lie."""

    strips: Strips
    scales: Floats
    """[N], one an output, where strips are int8."""
    N: int
    K: int


class Output(NamedTuple):
    """Where the outputs of row 0 begin, row after row."""

    begin: Floats
    stride: int
    """Floats from row to row."""
    add: bool
    """Whether the outputs are added to what is there."""


class Destination(NamedTuple):
    """Where the outputs of a weight go; begin and scales are those of its output 0."""

    scales: Floats
    begin: Floats
    stride: int
    add: bool
