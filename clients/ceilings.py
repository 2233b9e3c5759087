"""How long the machine must take, at the least: bytes over bandwidth, operations over their rate."""

from __future__ import annotations

import msgspec

from lattice_serve.engine.config import ModelConfig
from lattice_serve.kernels.numba.features import Products

BITS = {"float32": 32, "bfloat16": 16, "int8": 8}
"""Of a weight, by what the engine says it is stored in."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What tokens cost, counted from a model's shape: matrices, embedding excepted, and the recurrence."""

    weight_bytes: int
    """Read once a step."""
    state_bytes: int
    """Read and written for a token in decode, on average over a chunk."""
    flops: int
    """Of a token's products with matrices; a multiply-add is two."""
    recurrence_flops: int
    """Of a token's recurrence, in float32 always."""
    head_flops: int
    """More products where its logits are wanted."""

    @classmethod
    def of(cls, config: ModelConfig, weight_bits: int) -> Work:
        layers, H, d, m, C = (
            config.num_hidden_layers,
            config.num_heads,
            config.head_dim,
            config.num_slots,
            config.chunk_size,
        )
        channels = 2 * m + d
        projections = H * (channels + d + 2) + H * d + 3 * config.intermediate_size
        body, head = layers * config.hidden_size * projections, config.vocab_size * config.hidden_size
        # The anchor is read for h, w and y and written once a chunk; of the pending h and c half are there on average,
        # and one line of each is added; two vectors of slots and the convolution's tail are read and written.
        anchor = d * m * (1 + 1 / C)
        pending = (d + m) * (C - 1) / 2 + (d + m) + 4 * m
        tail = 2 * (config.conv_kernel_size - 1) * channels
        # Three products with the anchor, a fourth a token when the chunk's end folds it in; four with what is pending.
        recurrence = 4 * d * m + 2 * (d + m) * (C - 1) / 2
        return cls(
            weight_bytes=(body + head) * weight_bits // 8,
            state_bytes=round(4 * layers * H * (anchor + pending + tail)),
            flops=2 * body,
            recurrence_flops=round(2 * layers * H * recurrence),
            head_flops=2 * head,
        )


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
