"""What a decode step and a prefill must move and compute on a GPU, and the time that takes at the least.

    python benchmarks/roofline.py

Bytes are those that the kernels of `kernels/` ask for: `tests/kernels/test_roofline.py` holds the counts of this file
to every load and store that Triton's interpreter carries out. FLOPs are those of the products in the tiles that
compiled code has. The ceilings are the vendor's; `benchmarks/gpu.py` measures a device's own, and times against them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.kernels.linear.tiles import ARCHITECTURES
from lattice_serve.kernels.mixers.lattice import MixerShape, StateLayout

MODELS = {
    "117M": LatticeConfig(
        vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_heads=12, head_dim=64, num_slots=64,
        intermediate_size=2048, chunk_size=16, tie_word_embeddings=True, torch_dtype="bfloat16",
    ),
    "1.3B": LatticeConfig(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=24, num_heads=16, head_dim=128, num_slots=128,
        intermediate_size=5120, chunk_size=16, tie_word_embeddings=True, torch_dtype="bfloat16",
    ),
}  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Device:
    bytes_per_second: float
    flops_per_second: float
    """Of bfloat16 on tensor cores, dense."""


DEVICES = {"H100": Device(3.35e12, 989e12), "H200": Device(4.8e12, 989e12)}
"""SXM, by the vendor's data sheets."""


def layout_of(config: LatticeConfig) -> StateLayout:
    shape = MixerShape(
        H=config.num_heads, d=config.head_dim, m=config.num_slots, C=config.chunk_size, taps=config.conv_kernel_size,
        objective=config.objective, use_forget_gate=config.use_forget_gate, norm_eps=config.norm_eps,
    )  # fmt: skip
    return StateLayout(shape, config.num_hidden_layers)


def mixer_decode_bytes(shape: MixerShape, slot: int, itemsize: int) -> int:
    """That one token of one layer reads and writes as row `slot` of its chunk, each place once: what is read again is
    in the cache. Activations have `itemsize` bytes, the state is float32."""
    H, d, m, C, taps = shape.H, shape.d, shape.m, shape.C, shape.taps
    channels, gates, last = 2 * m + d, 1 + shape.use_forget_gate, slot == C - 1
    read = d * m + (taps - 1) * channels + slot * (d + m) + (2 * m + 1 if slot else 0)
    written = (channels if taps > 1 else 0) + (d * m if last else d + 3 * m + 1)
    weights = channels * taps + gates
    activations = channels + d + gates + d
    return H * (4 * (read + written + weights) + itemsize * activations) + 4 * d + 16


@dataclass(frozen=True)
class Step:
    """What the device has to do for it."""

    bytes: float
    flops: float

    def seconds(self, device: Device) -> float:
        return max(self.bytes / device.bytes_per_second, self.flops / device.flops_per_second)


def matrix_sizes(config: LatticeConfig) -> tuple[int, int]:
    """Elements of the matrices of all layers, and of the head."""
    shape = layout_of(config).shape
    layer = config.hidden_size * (shape.in_width + shape.out_width + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer, config.vocab_size * config.hidden_size


def decode_step(config: LatticeConfig, batch: int, weight_bytes: int = 2) -> Step:
    """One token of each of `batch` sequences, on average over the places of a chunk.

    Weights and states are read once; activations of a step stay in the cache. Products are done in tiles of as many
    rows as `linear.tiles` says, empty ones included.
    """
    shape = layout_of(config).shape
    layers, head = matrix_sizes(config)
    mixer = sum(mixer_decode_bytes(shape, slot, 2) for slot in range(shape.C)) / shape.C
    rows = ARCHITECTURES["sm_90"].tiles("decode", batch, config.vocab_size, 2).b_m
    tiles = -(-batch // rows) * rows
    state = config.num_hidden_layers * batch * mixer
    return Step((layers + head) * weight_bytes + state + 4 * batch * config.vocab_size, 2 * tiles * (layers + head))


def chunk_flops(shape: MixerShape) -> int:
    """Of the products of a chunk of one head, rows that fill up its tile included; those in tf32 count twice, for that
    runs at half the rate of bfloat16."""
    d, m = shape.d, shape.m
    b_t = max(16, shape.C)
    advance = 2 * m * (b_t * m + b_t * d + m * d)
    read = 2 * b_t * (2 * d * m + b_t * d)
    fine = 2 * b_t * (d * m + b_t * (d + 4 * m))
    return advance + read + 2 * fine


def prefill(config: LatticeConfig, tokens: int) -> Step:
    """A prompt whose last token alone needs logits."""
    shape = layout_of(config).shape
    layers, head = matrix_sizes(config)
    chunks = -(-tokens // shape.C)
    b_t = max(16, shape.C)
    d, m, H, L = shape.d, shape.m, shape.H, config.num_hidden_layers
    # in bfloat16: q, k, c and v are written once and read, but for q, twice; memories are written and read
    scratch = 2 * chunks * H * (2 * d * m + b_t * (2 * m + 3 * (2 * m + d)))
    activations = 2 * tokens * (shape.in_width * 2 + shape.out_width * 2 + config.intermediate_size * 6)
    stream = 4 * tokens * config.hidden_size * 6
    moved = (layers + head) * 2 + L * (scratch + activations + stream)
    return Step(moved, 2 * tokens * layers + 2 * head + L * H * chunks * chunk_flops(shape))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result: dict[str, dict[str, int]] = {}
    for name, config in MODELS.items():
        row = layout_of(config).row_bytes
        columns = [f"{label}: {what}" for label in DEVICES for what in ("us a step", "tokens/s")]
        table = Table("", "MB", "GFLOP", *columns, title=f"{name}: {row / 1e6:.2f} MB a state row")
        steps = {f"decode, batch {batch}": (decode_step(config, batch), batch) for batch in BATCHES}
        steps |= {f"prefill of {tokens}": (prefill(config, tokens), tokens) for tokens in (512, 8192)}
        result[name] = {}
        for label, (step, tokens) in steps.items():
            cells = []
            for key, device in DEVICES.items():
                seconds = step.seconds(device)
                result[name][f"{label}, {key}, tokens/s"] = int(tokens / seconds)
                cells += [f"{seconds * 1e6:,.0f}", f"{tokens / seconds:,.0f}"]
            table.add_row(label, f"{step.bytes / 1e6:,.0f}", f"{step.flops / 1e9:,.0f}", *cells)
        Console().print(table)
    print(json.dumps({"benchmark": "roofline", "floors": result}))


if __name__ == "__main__":
    main()
