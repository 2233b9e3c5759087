"""How long the machine must take, at the least: bytes over bandwidth, operations over their rate."""

from __future__ import annotations

import msgspec

from lattice_serve.engine.models.base import Work
from lattice_serve.kernels.numba.features import Products

BITS = {"float32": 32, "bfloat16": 16, "int8": 8}
"""Of a weight, by what the engine says it is stored in."""


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine's processors can do together, as measured just now."""

    bytes_per_second: float
    flops_per_second: float
    """Of products with matrices, by what multiplies them."""
    float32_flops_per_second: float

    @classmethod
    def measure(cls, threads: int, products: Products, size: int) -> Ceilings:
        """size: bytes that a step reads."""
        from lattice_serve.kernels.numba import machine_limits as limits

        return cls(
            bytes_per_second=limits.bandwidth(threads, size),
            flops_per_second=limits.flops(threads, products),
            float32_flops_per_second=limits.flops(threads, "float32"),
        )

    def decode_seconds(self, work: Work, batch: int) -> float:
        """The least that a step of `batch` sequences can take."""
        bytes_ = work.weight_bytes + batch * work.state_bytes
        return max(bytes_ / self.bytes_per_second, self._compute_seconds(work, batch, batch))

    def prefill_seconds(self, work: Work, tokens: int) -> float:
        """The least that a prompt can take whose last token alone needs logits."""
        return self._compute_seconds(work, tokens, 1)

    def _compute_seconds(self, work: Work, tokens: int, wanted: int) -> float:
        products = tokens * work.flops + wanted * work.head_flops
        return products / self.flops_per_second + tokens * work.recurrence_flops / self.float32_flops_per_second
