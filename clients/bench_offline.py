"""What the engine does without a server: decode at several batch sizes, and prefill."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from lattice_serve.clients.errors import ClientError
from lattice_serve.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from lattice_serve.engine.llm import LLM

Phase: TypeAlias = Literal["prefill", "decode"]

GATE_PROMPTS = 4
GATE_TOKENS = 16


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One phase at one batch size, over all repeats; rates count the tokens of the whole batch."""

    phase: Phase
    batch: int
    tokens: int
    """A sequence's, each repeat."""
    tokens_per_second: float
    """Median."""
    slowest: float
    fastest: float


class OfflineBench:
    """Measures `llm`, which must have a row for each sequence of the largest batch."""

    def __init__(self, llm: LLM, *, repeats: int = 3, seed: int = 0, clock: Callable[[], float] = perf_counter) -> None:
        self._llm = llm
        self._repeats = repeats
        self._draw = random.Random(seed)
        self._clock = clock

    def check(self) -> None:
        """Greedy answers are the same alone and in a batch. Raises `ClientError` where not: its speed means nothing."""
        prompts = self._prompts(GATE_PROMPTS, 8)
        together = self._generate(prompts, GATE_TOKENS)
        alone = [self._generate([prompt], GATE_TOKENS)[0] for prompt in prompts]
        if together != alone:
            raise ClientError("the engine answers otherwise in a batch than alone: not measured")

    def decode(self, batch: int, tokens: int) -> Measured:
        """Every prompt is one token, so that each step, the first included, makes one token a sequence."""
        return self._measure("decode", batch, prompt_tokens=1, tokens=tokens)

    def prefill(self, tokens: int) -> Measured:
        """One prompt of `tokens` and one token out."""
        return self._measure("prefill", 1, prompt_tokens=tokens, tokens=1)

    def _measure(self, phase: Phase, batch: int, *, prompt_tokens: int, tokens: int) -> Measured:
        counted = max(prompt_tokens, tokens)
        rates = []
        for repeat in range(self._repeats + 1):
            prompts = self._prompts(batch, prompt_tokens)
            start = self._clock()
            self._generate(prompts, tokens)
            if repeat > 0:  # The first run of a shape compiles and allocates.
                rates.append(batch * counted / (self._clock() - start))
        return Measured(
            phase=phase,
            batch=batch,
            tokens=counted,
            tokens_per_second=statistics.median(rates),
            slowest=min(rates),
            fastest=max(rates),
        )

    def _prompts(self, batch: int, tokens: int) -> list[list[int]]:
        vocabulary = range(self._llm.info.vocab_size)
        return [self._draw.choices(vocabulary, k=tokens) for _ in range(batch)]

    def _generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        answers = [list(done.token_ids) for done in self._llm.generate(prompts, params, progress=False)]
        if any(len(answer) != tokens for answer in answers):
            raise ClientError(f"the engine ended an answer before {tokens} tokens: not measured")
        return answers
