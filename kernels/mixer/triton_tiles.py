"""Where prefill's kernels leave things for each other: a tile of scratch for each chunk of a head."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import triton

from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.triton_parts import geometry, tile_width

_ROWS = 16
"""A tensor core has no smaller product; tokens of a tile where C = 1."""


def tile_tokens(C: int) -> int:
    """Tokens of a tile: a chunk, but where that is one token, several."""
    return C if C > 1 else _ROWS


@cache
def tile_rows(C: int) -> int:
    """Rows b_t of a tile: a tensor core has no smaller product than one of 16."""
    return max(_ROWS, triton.next_power_of_2(C))


@cache
def tile_lines(layout: StateLayout) -> tuple[tuple[int, ...], int]:
    """Where a tile of one head has its parts, in elements, and its size: q | -k | c [b_t, b_m] | v [b_t, b_d] |
    A^T, the memory that the chunk begins with [b_m, b_d]."""
    s = layout.shape
    b_d, b_m, b_t = tile_width(s.d), tile_width(s.m), tile_rows(s.C)
    sizes = (b_t * b_m, b_t * b_m, b_t * b_m, b_t * b_d, b_m * b_d)
    *places, size = itertools.accumulate(sizes, initial=0)
    return tuple(places), size


def tile_options(layout: StateLayout, names: str, **more: Any) -> dict[str, Any]:
    constants = geometry(layout)
    places, size = tile_lines(layout)
    tile = {"b_t": tile_rows(layout.shape.C), "tile_places": places, "tile_size": size}
    return {name: constants[name] for name in names.split()} | tile | more
