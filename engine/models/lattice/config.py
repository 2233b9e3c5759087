"""`config.json` of a Lattice model. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

from pydantic import Field

from lattice_serve.engine.models.base import LARGEST_SIZE, ModelConfig, Sharding, Work

Objective: TypeAlias = Literal["decoding", "similarity", "encoding"]

_LARGEST_CHUNK = 1024
"""A state row grows with it, and no tensor of the weights has it."""


class LatticeConfig(ModelConfig):
    """The letters of the paper: d is `head_dim`, m is `num_slots`, C is `chunk_size`."""

    matrices: ClassVar[tuple[str, ...]] = ("embedding", "head", "weight")

    model_type: Literal["lattice"] = "lattice"
    architectures: tuple[Literal["LatticeForCausalLM"]] = ("LatticeForCausalLM",)
    num_heads: int = Field(ge=1, le=LARGEST_SIZE)
    head_dim: int = Field(ge=1, le=LARGEST_SIZE)
    num_slots: int = Field(ge=1, le=LARGEST_SIZE)
    intermediate_size: int = Field(ge=1, le=LARGEST_SIZE)
    conv_kernel_size: int = Field(default=4, ge=1, le=LARGEST_SIZE)
    chunk_size: int = Field(default=16, ge=1, le=_LARGEST_CHUNK)
    objective: Objective = "decoding"
    use_forget_gate: bool = True
    norm_eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)

    @property
    def chunk_alignment(self) -> int:
        return self.chunk_size

    @property
    def divisible(self) -> dict[str, int]:
        """A share is a Lattice model itself, of fewer heads and a narrower MLP, but that its residual stream is the sum
        of all shares'. Embedding, norms and head are whole in each: one process alone needs logits."""
        return {"num_heads": self.num_heads, "intermediate_size": self.intermediate_size}

    def sharding(self, name: str) -> Sharding | None:
        H, m, d, inner = self.num_heads, self.num_slots, self.head_dim, self.intermediate_size
        table = {
            "mixer.in_proj.weight": Sharding(0, (H * m, H * m, H * d, H * d, H, H)),
            "mixer.conv": Sharding(0, (H * m, H * m, H * d)),
            "mixer.gate_bias": Sharding(0, (H, H)),
            "mixer.anchor": Sharding(0, (H,)),
            "mixer.out_proj.weight": Sharding(1, (H * d,)),
            "mlp.gate_up_proj.weight": Sharding(0, (inner, inner)),
            "mlp.down_proj.weight": Sharding(1, (inner,)),
        }
        return table.get(".".join(name.split(".")[2:]))  # what follows "layers.0"

    def work(self, weight_bits: int) -> Work:
        layers, H, d, m, C = self.num_hidden_layers, self.num_heads, self.head_dim, self.num_slots, self.chunk_size
        channels = 2 * m + d
        projections = H * (channels + d + 2) + H * d + 3 * self.intermediate_size
        body, head = layers * self.hidden_size * projections, self.vocab_size * self.hidden_size
        # The anchor is read for h, w and y and written once a chunk; of the pending h and c half are there on average,
        # and one line of each is added; two vectors of slots and the convolution's tail are read and written.
        anchor = d * m * (1 + 1 / C)
        pending = (d + m) * (C - 1) / 2 + (d + m) + 4 * m
        tail = 2 * (self.conv_kernel_size - 1) * channels
        # Three products with the anchor, a fourth a token when the chunk's end folds it in; four with what is pending.
        recurrence = 4 * d * m + 2 * (d + m) * (C - 1) / 2
        return Work(
            weight_bytes=(body + head) * weight_bits // 8,
            state_bytes=round(4 * layers * H * (anchor + pending + tail)),
            flops=2 * body,
            recurrence_flops=round(2 * layers * H * recurrence),
            head_flops=2 * head,
        )
