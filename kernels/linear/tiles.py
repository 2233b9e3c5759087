"""How a matrix product is cut into programs on each architecture: a table kept here, nothing is tried at serving time.

A product's bits are those of its tiles' order of sums. So decode has one shape of tile for any number of rows, prefill
another, and how K is split depends on the weight alone: a row's bits never depend on how many rows are beside it.

None of these figures was measured on a GPU: they follow from shared memory (b_k is 128 bytes, or 256 in decode), from
the instruction of 64 rows that Hopper has, and from the number of processors that decode has to keep loading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Phase: TypeAlias = Literal["decode", "prefill"]


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
    decode: Tiles
    prefill: Tiles

    def tiles(self, phase: Phase) -> Tiles:
        return self.decode if phase == "decode" else self.prefill

    def splits(self, phase: Phase, N: int, K: int, itemsize: int) -> int:
        """Parts of K that are summed apart: in decode, so many that all processors load a part of a small weight."""
        if phase == "prefill":
            return 1
        blocks, steps = -(-N // self.decode.b_n), -(-K * itemsize // self.decode.k_bytes)
        splits = 1
        while blocks * splits < self.processors and splits < 8 and steps // (2 * splits) >= 2:
            splits *= 2
        return splits


ARCHITECTURES = {
    "sm_80": Architecture(108, Tiles(64, 32, 256, 4, 3), Tiles(128, 128, 64, 8, 3)),
    "sm_90": Architecture(132, Tiles(64, 32, 256, 4, 4), Tiles(128, 128, 128, 8, 3)),
    "sm_100": Architecture(148, Tiles(64, 32, 256, 4, 4), Tiles(128, 128, 128, 8, 3)),
    "gfx942": Architecture(304, Tiles(64, 32, 256, 4, 2), Tiles(128, 128, 64, 8, 2)),
    "interpreter": Architecture(4, Tiles(16, 256, 256, 1, 1), Tiles(32, 256, 256, 1, 1)),
}
_FAMILIES = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}
"""By major compute capability; 12 (RTX 50) has the shared memory and the instructions of 8."""


def architecture(device: torch.device) -> Architecture:
    """The entry for a device; that of Ampere, or of MI300 on AMD, for one that is not listed."""
    if device.type == "cpu":
        return ARCHITECTURES["interpreter"]
    if torch.version.hip:
        return ARCHITECTURES["gfx942"]
    return ARCHITECTURES[_FAMILIES.get(torch.cuda.get_device_capability(device)[0], "sm_80")]
