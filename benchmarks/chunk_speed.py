"""The Lattice recurrence in torch on the CPU: a chunk at a time against token by token, in float32.

First a correctness gate: both forms against float64. Then alternating runs, so that other load on the machine falls on
both, and medians of their times. The chunk form is held against the arithmetic of its matrix products at the speed of
one large float32 product on the same threads. The token-by-token form is the oracle, written to be read: the ratio says
what the chunk form saves a prefill or a training step, not how fast a decode kernel could be.

    python benchmarks/chunk_speed.py --rounds 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from lattice_serve.kernels.mixers.lattice import LatticeState, lattice_chunk, lattice_recurrent

B, H, D, M, T, C = 1, 4, 64, 32, 512, 16
TOLERANCE = 1e-5
PRODUCT = 512


class Tokens(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    gamma: Tensor
    mu: Tensor


def inputs() -> tuple[Tokens, Tensor]:
    """Random tokens and an initial memory, float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (normalize(silu(normal(B, T, H, M)), dim=-1) for _ in range(2))
    floor = 10 ** (-12 / C)
    mu = floor + (1 - floor) * (normal(B, T, H) + 4).sigmoid()
    return Tokens(q, k, normal(B, T, H, D), normal(B, T, H).sigmoid(), mu), normal(B, H, D, M)


def flop() -> int:
    """Of the matrix products of one chunk-form pass."""
    # A token: four products with the memory (error, W, output, new anchor), two of C x d, four of C x m.
    return 2 * B * H * T * (4 * D * M + 2 * C * D + 4 * C * M)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Lattice recurrence: chunks against token by token, torch on the CPU")
    parser.add_argument("--rounds", type=int, default=9, help="alternating runs of each form (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    torch.set_num_threads(args.threads)

    exact, anchor = inputs()
    narrow = Tokens(*(x.float() for x in exact))
    state = LatticeState.initial(anchor.float(), C)
    square = torch.randn(PRODUCT, PRODUCT)
    calls: dict[str, Callable[[], object]] = {
        "chunk": lambda: lattice_chunk(*narrow, state, chunk_size=C),
        "sequential": lambda: lattice_recurrent(*narrow, state, chunk_size=C),
        "product": lambda: square @ square,
    }

    with torch.inference_mode():
        truth, _ = lattice_recurrent(*exact, LatticeState.initial(anchor, C), chunk_size=C)
        errors = {}
        for name, form in (("chunk", lattice_chunk), ("sequential", lattice_recurrent)):
            y, _ = form(*narrow, state, chunk_size=C)
            errors[name] = float((y.double() - truth).abs().max() / truth.abs().max())
        # Written so that NaN fails too.
        if not all(error <= TOLERANCE for error in errors.values()):
            sys.exit(f"correctness gate: error against float64 is {errors}, above {TOLERANCE}")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(args.rounds):
            for name, call in calls.items():
                times[name].append(seconds(call))

    median = {name: statistics.median(values) for name, values in times.items()}
    peak = 2 * PRODUCT**3 / median["product"]
    share = flop() / median["chunk"] / peak
    print(f"B={B} H={H} d={D} m={M} T={T} C={C}, float32, {args.threads} thread(s), median of {args.rounds}")
    print(f"{'form':12}{'ms':>10}{'tokens/s':>12}{'error':>10}")
    for name, error in errors.items():
        print(f"{name:12}{median[name] * 1e3:10.2f}{B * T / median[name]:12.0f}{error:10.1e}")
    ratio = median["sequential"] / median["chunk"]
    print(
        f"chunk is {ratio:.1f} times as fast; {share:.1%} of the {peak / 1e9:.1f} GFLOP/s of one product of {PRODUCT}"
    )
    result = {
        "benchmark": "chunk_speed",
        "shape": {"B": B, "H": H, "d": D, "m": M, "T": T, "C": C},
        "threads": args.threads,
        "rounds": args.rounds,
        "chunk_ms": round(median["chunk"] * 1e3, 3),
        "sequential_ms": round(median["sequential"] * 1e3, 3),
        "ratio": round(ratio, 2),
        "share_of_product_speed": round(share, 4),
        "error": errors,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
