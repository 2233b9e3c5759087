"""``x weight^T`` by torch, with every row's bits independent of how many rows there are.

A product library picks its loops by the number of rows, and different loops may add up in a different order. Which
numbers of rows agree is found by trying, on the weights and the processor at hand: seen so far, float32 agrees at
multiples of 4 rows (any number from 12 on) and bfloat16 in hardware at every number. Rows are padded to such a
multiple; where no multiple agrees, every product is done in blocks of one size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Rows of a block where nothing smaller agrees, and of the product that the others are compared with."""

_MULTIPLES = (1, 4, 8, 16, 32)


class RowInvariantLinear:
    """Products of activations with the weights it was probed on."""

    def __init__(self, weights: Iterable[Tensor], max_rows: int) -> None:
        """Probe one weight [N, K] of every shape and dtype, up to `max_rows` rows: takes milliseconds a shape."""
        representatives = {(w.shape, w.dtype): w for w in weights}.values()
        fits = [m for m in _MULTIPLES if all(_agrees(w, m, max_rows) for w in representatives)]
        self.row_multiple: int | None = fits[0] if fits else None
        """Rows are padded to a multiple of this; None: products are done in blocks of `BLOCK` rows."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, K] float32, weight [N, K] float32 or bfloat16 -> [M, N] float32, summed in float32."""
        rows = len(x)
        if self.row_multiple is None:
            blocks = [_product(_pad(block, BLOCK), weight) for block in x.split(BLOCK)]
            return torch.cat(blocks)[:rows]
        return _product(_pad(x, self.row_multiple), weight)[:rows]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight).float()


def _pad(x: Tensor, multiple: int) -> Tensor:
    missing = -len(x) % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _agrees(weight: Tensor, multiple: int, max_rows: int) -> bool:
    """Whether padded products of every size tried give each row the bits that a block of `BLOCK` rows gives it."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    block = torch.randn(BLOCK, weight.shape[1], generator=generator).to(weight.device)
    expected = _product(block, weight)
    largest = -(-max(max_rows, BLOCK) // BLOCK) * BLOCK
    sizes = [*range(1, BLOCK + 1, 1 if multiple < 8 else 3), largest // 2 // multiple * multiple or 1, largest]
    for rows in sizes:
        x = block.repeat(-(-rows // BLOCK), 1)[:rows]
        got = _product(_pad(x, multiple), weight)[:rows]
        if not torch.equal(got, expected.repeat(-(-rows // BLOCK), 1)[:rows]):
            return False
    # A row's place among the others must not matter either.
    return torch.equal(_product(block.roll(5, dims=0), weight), expected.roll(5, dims=0))
