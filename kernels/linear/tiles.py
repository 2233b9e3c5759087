"""How a matrix product is cut into programs on each architecture: a table kept here, nothing is tried at serving time.

A product's bits are those of its order of sums: along K within a part, part by part. Into how many parts K is cut
depends on the weight alone, so a row's bits never depend on how many rows are beside it. The shape of a tile does not
change them either where an instruction adds up K as its shorter siblings do: seen so on Hopper in bfloat16 (H200, 60
shapes of tiles), where tiles are chosen by the number of rows. Elsewhere nobody has looked, and decode has one shape.

The figures of Hopper are the fastest of those tried on an H200. Those of the others were not measured: they follow
from shared memory, and from the number of processors that decode has to keep loading.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch

Phase: TypeAlias = Literal["decode", "prefill"]

_PART_BYTES = 256
"""A part of K is a multiple of so many bytes of activations, as every step of a tile divides it."""
_BLOCK = 32
"""Outputs of a program, where the parts of K are counted out."""
_MOST_PARTS = 4
"""More parts would cost more to add up than they save in waiting."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A program has b_m rows and b_n outputs, and steps over K by `k_bytes` of activations."""

    b_m: int
    b_n: int
    k_bytes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Architecture:
    processors: int
    decode: tuple[tuple[int, Tiles], ...]
    """(most rows, tiles), the fewest rows first; the last are for any number of rows."""
    prefill: tuple[Tiles, ...]
    """Large ones first: those that leave no processor idle are taken, or the last."""

    def tiles(self, phase: Phase, rows: int, outputs: int, itemsize: int) -> Tiles:
        """For a product of so many rows and outputs, activations of so many bytes."""
        if itemsize == 4:  # tensor cores have no part in it, and nobody has looked at its bits
            return self.prefill[-1] if phase == "prefill" else self.decode[0][1]
        if phase == "prefill":
            busy = (t for t in self.prefill if -(-rows // t.b_m) * -(-outputs // t.b_n) >= self.processors)
            return next(busy, self.prefill[-1])
        return next((tiles for most, tiles in self.decode if rows <= most), self.decode[-1][1])

    def splits(self, phase: Phase, N: int, K: int, itemsize: int) -> int:
        """Parts of K that are summed apart: in decode, so many that all processors load a part of a small weight."""
        if phase == "prefill":
            return 1
        units = -(-K * itemsize // _PART_BYTES)
        wanted = min(_MOST_PARTS, -(-self.processors // -(-N // _BLOCK)), units)
        return -(-units // -(-units // wanted))


def part(K: int, P: int, itemsize: int) -> int:
    """Elements of each of P parts of K, the last of which may be shorter."""
    units = -(-K * itemsize // _PART_BYTES)
    return -(-units // P) * _PART_BYTES // itemsize


_HOPPER = ((16, Tiles(16, 32, 256, 4, 4)), (64, Tiles(64, 32, 256, 4, 4)), (128, Tiles(128, 64, 128, 8, 4)))

ARCHITECTURES = {
    "sm_80": Architecture(108, ((64, Tiles(64, 32, 256, 4, 3)),), (Tiles(128, 128, 64, 8, 3),)),
    "sm_90": Architecture(132, _HOPPER, (Tiles(128, 128, 128, 8, 3), Tiles(64, 64, 128, 4, 4))),
    "sm_100": Architecture(148, ((64, Tiles(64, 32, 256, 4, 4)),), (Tiles(128, 128, 128, 8, 3),)),
    "gfx942": Architecture(304, ((64, Tiles(64, 32, 256, 4, 2)),), (Tiles(128, 128, 64, 8, 2),)),
    "interpreter": Architecture(
        4,
        ((2, Tiles(16, 128, 256, 1, 1)), (16, Tiles(16, 256, 256, 1, 1))),
        (Tiles(32, 256, 256, 1, 1), Tiles(16, 256, 256, 1, 1)),
    ),
}
_FAMILIES = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}
"""By major compute capability; 12 (RTX 50) has the shared memory and the instructions of 8."""


@cache
def architecture(device: torch.device) -> Architecture:
    """The entry for a device; that of Ampere, or of MI300 on AMD, for one that is not listed."""
    if device.type == "cpu":
        return ARCHITECTURES["interpreter"]
    if torch.version.hip:
        return ARCHITECTURES["gfx942"]
    return ARCHITECTURES[_FAMILIES.get(torch.cuda.get_device_capability(device)[0], "sm_80")]
