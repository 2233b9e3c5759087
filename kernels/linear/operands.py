"""What a matrix product on the CPU is given, by name: a packed weight, and where the outputs go."""

from __future__ import annotations

from typing import NamedTuple

from lattice_serve.kernels.numba.types import Floats, Strips


class Matrix(NamedTuple):
    """A packed weight [N, K] among others: `linear.packing` says how strips lie."""

    strips: Strips
    first_strip: int
    """Where its strips begin, in elements."""
    scales: Floats
    first_scale: int
    N: int
    K: int


class Output(NamedTuple):
    """Row after row of outputs in a float32 array."""

    array: Floats
    begin: int
    """Where the first row has the first of the outputs that are asked for."""
    stride: int
    """Floats from row to row."""
    add: bool
    """Whether the outputs are added to what is there."""


class Destination(NamedTuple):
    """An `Output` with the scales of the weight; begin and scales are those of output 0 of the weight."""

    scales: Floats
    first_scale: int
    array: Floats
    begin: int
    stride: int
    add: bool
