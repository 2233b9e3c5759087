from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lattice_serve.clients.bench_offline import OfflineBench
from lattice_serve.clients.errors import ClientError
from lattice_serve.engine.sampling import SamplingParams


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
