from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lattice_serve.clients.bench_offline import OfflineBench
from lattice_serve.clients.ceilings import BITS, Ceilings
from lattice_serve.clients.errors import ClientError
from lattice_serve.engine.llm import LLM
from lattice_serve.engine.models.base import Work
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.kernels.mixers.lattice import StateLayout
from lattice_serve.kernels.numba.features import Products, available_products
from tests.tiny import init_tiny_model


class PlayedEngine:
    """Answers at once with tokens made from the prompt; remembers how much was asked of it."""

    info = SimpleNamespace(vocab_size=50)

    def __init__(self, *, confused: bool = False, short: bool = False) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self.confused = confused
        self.short = short

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, progress: bool) -> list[Any]:
        assert params.ignore_eos
        assert not progress
        self.asked.append((len(prompts), len(prompts[0]), params.max_tokens))
        shift = len(prompts) if self.confused else 0
        tokens = params.max_tokens - self.short
        return [SimpleNamespace(token_ids=[sum(prompt) + shift] * tokens) for prompt in prompts]


def _bench(engine: PlayedEngine, seconds: Sequence[float] = ()) -> OfflineBench:
    """`seconds` are what the clock says each counted run took; the first run of each phase takes ages."""
    ticks = itertools.chain([0.0], *((start + 0.0, start + took) for start, took in enumerate(seconds, 100)))
    return OfflineBench(cast(Any, engine), repeats=3, clock=lambda: next(ticks))


def test_decode_counts_every_token_and_the_median_run() -> None:
    engine = PlayedEngine()
    measured = _bench(engine, [0.5, 0.25, 0.75]).decode(batch=4, tokens=10)
    assert engine.asked == [(4, 1, 10)] * 4
    assert (measured.phase, measured.batch, measured.tokens) == ("decode", 4, 10)
    assert (measured.tokens_per_second, measured.fastest) == (80.0, 160.0)
    assert measured.slowest == pytest.approx(40 / 0.75)


def test_prefill_counts_the_prompt() -> None:
    engine = PlayedEngine()
    measured = _bench(engine, [0.5, 0.5, 0.5]).prefill(100)
    assert engine.asked == [(1, 100, 1)] * 4
    assert (measured.phase, measured.batch, measured.tokens, measured.tokens_per_second) == ("prefill", 1, 100, 200.0)


def test_the_gate() -> None:
    _bench(PlayedEngine()).check()
    with pytest.raises(ClientError, match="in a batch"):
        _bench(PlayedEngine(confused=True)).check()
    with pytest.raises(ClientError, match="ended an answer"):
        _bench(PlayedEngine(short=True)).decode(1, 2)


CONFIG = LatticeConfig(
    vocab_size=100, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=4, num_slots=8, intermediate_size=32,
    chunk_size=4,
)  # fmt: skip


def test_work_is_that_of_the_matrices() -> None:
    work = CONFIG.work(BITS["int8"])
    model = LatticeForCausalLM(CONFIG)
    matrices = [p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    head = CONFIG.vocab_size * CONFIG.hidden_size
    assert work.weight_bytes == sum(matrices) + head
    assert work.head_flops == 2 * head
    recurrence = 2 * 2 * 2 * (4 * 4 * 8 + 3 * (4 + 8))  # multiply-adds, layers and heads
    assert work.flops == 2 * sum(matrices)
    assert work.recurrence_flops == recurrence
    assert 4 * 2 * 2 * 4 * 8 < work.state_bytes < 2 * StateLayout(model.shape, 2).row_bytes


def test_the_share_of_the_limit() -> None:
    ceilings = Ceilings(bytes_per_second=1000.0, flops_per_second=1e6, float32_flops_per_second=1e5)
    work = Work(weight_bytes=100, state_bytes=10, flops=1500, recurrence_flops=50, head_flops=3000)
    engine = PlayedEngine()
    bench = OfflineBench(
        cast(Any, engine), repeats=1, clock=itertools.chain([0.0], [1.0, 5.0] * 2).__next__, work=work,
        ceilings=ceilings,
    )  # fmt: skip
    # A step reads 140 bytes, 0.14 s, and has 20,000 operations, 0.02 s.
    assert bench.decode(batch=4, tokens=10).floor_seconds == pytest.approx(1.4)
    assert ceilings.decode_seconds(work, 100) == pytest.approx(1.1)
    assert ceilings.decode_seconds(work, 10_000) == pytest.approx(100.1)
    assert ceilings.prefill_seconds(work, 100) == pytest.approx(0.203)


@pytest.mark.parametrize("products", [*available_products("bfloat16"), *available_products("int8")[:-1]])
def test_this_machine_has_limits(products: Products) -> None:
    ceilings = Ceilings.measure(threads=1, products=products, size=1 << 24)
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e14
    assert 1e8 < ceilings.float32_flops_per_second < 1e14


def test_far_into_a_text(tmp_path: Path) -> None:
    llm = LLM(init_tiny_model(tmp_path / "tiny"), max_rows=1)
    far = OfflineBench(llm, repeats=2).far(position=300, tokens=20)
    assert far.near_tokens_per_second > 0
    assert far.far_tokens_per_second > 0
    assert llm.generate([list(range(300))], progress=False)[0].cached_tokens == 0
    assert far.grown_bytes < 100 << 20
    with pytest.raises(ClientError, match="decode-tokens"):
        OfflineBench(llm).far(position=3, tokens=2)
