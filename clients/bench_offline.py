"""What the engine does without a server: decode at several batch sizes, prefill, and decode far into a text."""

from __future__ import annotations

import os
import random
import statistics
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from lattice_serve.clients.ceilings import Ceilings
from lattice_serve.clients.errors import ClientError
from lattice_serve.engine.models.base import Work
from lattice_serve.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from lattice_serve.engine.llm import LLM

Phase: TypeAlias = Literal["prefill", "decode"]

GATE_PROMPTS = 4
GATE_TOKENS = 16
SLICE = 100
"""Tokens of a turn of two that are compared."""


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
    floor_seconds: float | None = None
    """The least that the counted tokens could take on this machine; None where that was not measured."""

    @property
    def share(self) -> float | None:
        """Of what the machine allows, 0 to 1."""
        if self.floor_seconds is None:
            return None
        return self.floor_seconds * self.tokens_per_second / (self.batch * self.tokens)


class FarDecode(msgspec.Struct, frozen=True, kw_only=True):
    """Decode after a long prompt beside decode after a short one, in turn."""

    position: int
    """Tokens of the long prompt."""
    tokens: int
    near_tokens_per_second: float
    """Medians."""
    far_tokens_per_second: float
    grown_bytes: int
    """By how much the process's resident memory grew meanwhile."""


def check_far(tokens: int) -> None:
    """Raises `ClientError` for fewer than 3 tokens: the first and the last of a turn are not counted."""
    if tokens < 3:
        raise ClientError(f"decode-tokens is {tokens}: give at least 3 to compare positions")


def resident_bytes() -> int:
    """Memory of this process that is in use; Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class OfflineBench:
    """Measures `llm`, which must have a row for each sequence of the largest batch."""

    def __init__(
        self,
        llm: LLM,
        *,
        repeats: int = 3,
        seed: int = 0,
        clock: Callable[[], float] = perf_counter,
        work: Work | None = None,
        ceilings: Ceilings | None = None,
    ) -> None:
        self._llm = llm
        self._work, self._ceilings = work, ceilings
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
        measured = self._measure("decode", batch, prompt_tokens=1, tokens=tokens)
        if self._ceilings is None or self._work is None:
            return measured
        floor = tokens * self._ceilings.decode_seconds(self._work, batch)
        return msgspec.structs.replace(measured, floor_seconds=floor)

    def prefill(self, tokens: int) -> Measured:
        """One prompt of `tokens` and one token out."""
        measured = self._measure("prefill", 1, prompt_tokens=tokens, tokens=1)
        if self._ceilings is None or self._work is None:
            return measured
        return msgspec.structs.replace(measured, floor_seconds=self._ceilings.prefill_seconds(self._work, tokens))

    def far(self, position: int, tokens: int) -> FarDecode:
        """Needs a prefix cache that holds the state of the long prompt: each turn begins where that ends.

        Raises `ClientError` as `check_far` does.
        """
        check_far(tokens)
        near, far = self._prompts(1, 1)[0], self._prompts(1, position)[0]
        self._generate([far], 1)
        rates: dict[int, list[float]] = {len(near): [], len(far): []}
        held = resident_bytes()
        turns, rest = divmod(tokens, SLICE)
        for turn, count in enumerate(([SLICE] * turns + [rest] * (rest > 2)) * self._repeats):
            # In short turns, each begun by the other: a slow moment of the machine is no slow position.
            for prompt in (near, far) if turn % 2 == 0 else (far, near):
                rates[len(prompt)].append(self._stream(prompt, count))
        return FarDecode(
            position=position,
            tokens=tokens,
            near_tokens_per_second=statistics.median(rates[len(near)]),
            far_tokens_per_second=statistics.median(rates[len(far)]),
            grown_bytes=resident_bytes() - held,
        )

    def _stream(self, prompt: Sequence[int], tokens: int) -> float:
        """Tokens a second from the first to the last but one; with the last, the cache is given the whole text."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        times = [self._clock() for _ in self._llm.stream(prompt, params)]
        return (len(times) - 2) / (times[-2] - times[0])

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

    def _prompts(self, batch: int, tokens: int) -> list[array[int]]:
        vocabulary = range(self._llm.info.vocab_size)
        return [array("i", self._draw.choices(vocabulary, k=tokens)) for _ in range(batch)]

    def _generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        answers = [list(done.token_ids) for done in self._llm.generate(prompts, params, progress=False)]
        if any(len(answer) != tokens for answer in answers):
            raise ClientError(f"the engine ended an answer before {tokens} tokens: not measured")
        return answers
