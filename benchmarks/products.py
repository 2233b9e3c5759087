"""A whole prompt beside its matrix products alone, by torch (oneDNN) in bfloat16, with nothing in between.

`lattice bench offline` measures what a processor multiplies from its first-level cache; this is what a good library
makes of that. torch multiplies each matrix of each layer in turn, and one layer's over and over, which then lies in a
cache, each by the fastest of three ways: a new tensor out, a given one, or the weight packed ahead. Rounds in turn,
medians; torch's products are held to float32 first.

    python benchmarks/products.py [MODEL] [--tokens 512] [--threads N] [--rounds 9]

Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from lattice_serve.clients.bench_offline import OfflineBench
from lattice_serve.engine.llm import LLM
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.engine.processors import available_cpus
from lattice_serve.engine.weights import load_model, resolve_model

Product: TypeAlias = Callable[[], Tensor]
TOLERANCE = 1e-2
"""Of the largest output; bfloat16 keeps 2^-9 of each factor."""


def ways(weight: Tensor, x: Tensor) -> list[Product]:
    """x weight^T by torch. Raises SystemExit where one of them is wrong."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    out = torch.empty(len(x), len(weight), dtype=x.dtype)
    made: list[Product] = [
        lambda: linear(x, weight),
        lambda: torch.mm(x, weight.mT, out=out),
        lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
    ]
    truth = linear(x.float(), weight.float())
    for way in made:
        if (way().float() - truth).abs().max() > TOLERANCE * truth.abs().max():
            raise SystemExit(f"torch's product of {tuple(weight.shape)} is wrong: not measured")
    return made


def seconds(products: Sequence[Product]) -> float:
    start = time.perf_counter()
    for product in products:
        product()
    return time.perf_counter() - start


class Matrix:
    """One matrix of all layers, and how long torch takes for them."""

    def __init__(self, name: str, weights: Sequence[Tensor], tokens: int) -> None:
        outputs, inputs = weights[0].shape
        self.name = f"{name} {outputs} x {inputs}"
        self.flops = 2 * tokens * outputs * inputs * len(weights)
        x = torch.randn(tokens, inputs).to(weights[0].dtype)
        self._ways = list(zip(*(ways(weight, x) for weight in weights), strict=True))
        self._layers: list[list[float]] = [[] for _ in self._ways]
        self._one: list[list[float]] = [[] for _ in self._ways]

    def measure(self) -> None:
        for products, layers, one in zip(self._ways, self._layers, self._one, strict=True):
            layers.append(seconds(products))
            one.append(seconds(products[:1] * len(products)))

    @property
    def layers_seconds(self) -> float:
        """Of all layers', by the way that is the fastest."""
        return min(map(median, self._layers))

    @property
    def one_seconds(self) -> float:
        """Of one layer's, as often."""
        return min(map(median, self._one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="model folder (the bundled model)")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="medians are of that many (%(default)s)")
    options = parser.parse_args()
    llm = LLM(options.model, dtype="bfloat16", threads=options.threads, max_rows=4, prefix_cache_memory=0)
    bench = OfflineBench(llm, repeats=1)
    bench.check()
    torch.set_num_threads(options.threads)
    model = load_model(resolve_model(options.model), device="cpu", dtype=torch.bfloat16)
    assert isinstance(model, LatticeForCausalLM), "the benchmark is of Lattice models"
    layers = model.decoder_weights().layers
    matrices = [
        Matrix(name, [getattr(layer, name) for layer in layers], options.tokens)
        for name in ("in_proj", "out_proj", "gate_up_proj", "down_proj")
    ]
    prompts = []
    for _ in range(options.rounds):  # in turn, so that a slow minute slows both
        prompts.append(options.tokens / bench.prefill(options.tokens).tokens_per_second)
        for matrix in matrices:
            matrix.measure()
    prompt, flops = median(prompts), sum(matrix.flops for matrix in matrices)
    alone, cached = (sum(getattr(matrix, each) for matrix in matrices) for each in ("layers_seconds", "one_seconds"))
    table = Table(
        "", "ms", "TFLOP/s", "one layer's", title=f"{options.tokens} tokens, {options.threads} threads, bfloat16"
    )
    for name, of, taken, one in (
        *((f"torch, {m.name}", m.flops, m.layers_seconds, m.one_seconds) for m in matrices),
        ("torch, all of these", flops, alone, cached),
    ):
        table.add_row(name, f"{1e3 * taken:.1f}", f"{of / taken / 1e12:.2f}", f"{of / one / 1e12:.2f}")
    table.add_row("lattice-serve, the whole prompt", f"{1e3 * prompt:.1f}", f"{flops / prompt / 1e12:.2f}")
    Console().print(table)
    print(json.dumps({
        "benchmark": "products",
        "tokens": options.tokens,
        "threads": options.threads,
        "products_seconds": alone,
        "cached_products_seconds": cached,
        "prompt_seconds": prompt,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
