"""A load for any OpenAI-compatible server, and what its clients saw.

Closed loop: a fixed number of clients, each with its next request as soon as its last is answered. Open loop: requests
come at random moments (Poisson) whether or not the server keeps up, and their clocks start when they were due, so that
a server that falls behind shows it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time

import msgspec

from lattice_serve.clients.client import AsyncClient
from lattice_serve.clients.errors import ClientError
from lattice_serve.clients.stats import Spread

FIRST_ORDINARY_TOKEN = 3
"""Below it, tokenizers keep pieces such as the end of a text."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent. Exactly one of `concurrency` and `rate` (requests a second) is given."""

    requests: int
    prompt_tokens: int = 128
    output_tokens: int = 64
    vocab_size: int = 1000
    """Prompts are random ids below it."""
    seed: int = 0
    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("give one of concurrency and rate")

    @property
    def label(self) -> str:
        return f"{self.concurrency} at once" if self.concurrency is not None else f"{self.rate:g} a second"

    def prompt(self, index: int) -> list[int]:
        """Token ids of request `index`; another load, or another seed, has others: no cache can help."""
        draw = random.Random(f"{self.seed} {self.label} {index}")
        return draw.choices(range(FIRST_ORDINARY_TOKEN, self.vocab_size), k=self.prompt_tokens)

    def arrivals(self) -> list[float]:
        """Seconds from the start at which each request of the open loop is due."""
        assert self.rate is not None
        draw = random.Random(self.seed)
        return list(itertools.accumulate(draw.expovariate(self.rate) for _ in range(self.requests)))


@dataclass(slots=True)
class Sample:
    """One request. Times are those of one clock, in seconds."""

    due: float
    arrivals: list[float] = field(default_factory=list)
    """When each token came; tokens that share a chunk share an entry."""
    tokens: int = 0
    end: float = 0.0
    error: str | None = None

    @property
    def time_to_first(self) -> float:
        return self.arrivals[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals)]


class Goal(msgspec.Struct, frozen=True):
    """What a request must keep to count as good; None: anything. Inter-token latency is the request's mean."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def met(self, sample: Sample) -> bool:
        if sample.error is not None:
            return False
        gaps = sample.gaps
        first_ok = self.ttft_ms is None or sample.time_to_first * 1e3 <= self.ttft_ms
        return first_ok and (self.itl_ms is None or not gaps or sum(gaps) / len(gaps) * 1e3 <= self.itl_ms)


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came back. Failed requests count in `failed`, `errors` and `goodput` alone."""

    load: Load
    failed: int
    errors: dict[str, int]
    """Message -> how often."""
    seconds: float
    """From the first request to the last answer."""
    output_tokens: int
    output_tokens_per_second: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    goodput: float | None
    """Share of all requests that met the goal; None without one."""
    busy: float = 0.0
    """Share of the time for which this process kept a processor busy: near 1 what it saw is its own slowness."""

    @classmethod
    def of(cls, load: Load, samples: Sequence[Sample], goal: Goal, processor_seconds: float = 0.0) -> LoadReport:
        good = [sample for sample in samples if sample.error is None]
        seconds = max(s.end for s in samples) - min(s.due for s in samples)
        output_tokens = sum(s.tokens for s in good)
        return cls(
            load=load,
            failed=len(samples) - len(good),
            errors=dict(Counter(s.error for s in samples if s.error is not None)),
            seconds=seconds,
            output_tokens=output_tokens,
            output_tokens_per_second=output_tokens / seconds,
            ttft_ms=Spread.of([s.time_to_first * 1e3 for s in good]),
            itl_ms=Spread.of([gap * 1e3 for s in good for gap in s.gaps]),
            e2e_ms=Spread.of([(s.end - s.due) * 1e3 for s in good]),
            goodput=None if goal == Goal() else sum(map(goal.met, samples)) / len(samples),
            busy=processor_seconds / seconds,
        )


async def run_load(client: AsyncClient, load: Load, goal: Goal, advance: Callable[[], object]) -> LoadReport:
    """Send `load` and report; `advance` is called after each answer.

    `client` should not retry: a refusal is a failure.
    """
    samples: list[Sample] = []
    began = process_time()

    async def send(index: int, due: float) -> None:
        samples.append(await _request(client, load, index, due))
        advance()

    if load.concurrency is not None:
        indices = iter(range(load.requests))

        async def work() -> None:
            for index in indices:
                await send(index, perf_counter())

        await asyncio.gather(*(work() for _ in range(load.concurrency)))
    else:
        start = perf_counter()

        async def arrive(index: int, after: float) -> None:
            await asyncio.sleep(start + after - perf_counter())
            await send(index, start + after)

        await asyncio.gather(*(arrive(index, after) for index, after in enumerate(load.arrivals())))
    return LoadReport.of(load, samples, goal, process_time() - began)


async def _request(client: AsyncClient, load: Load, index: int, due: float) -> Sample:
    sample = Sample(due)
    try:
        async with await client.completions(
            load.prompt(index),
            stream=True,
            max_tokens=load.output_tokens,
            temperature=0,
            ignore_eos=True,
            stream_options={"include_usage": True},
        ) as stream:
            async for chunk in stream:
                if chunk.choices:
                    sample.arrivals.append(perf_counter())
                if chunk.usage is not None:
                    sample.tokens = chunk.usage.completion_tokens
    except ClientError as error:
        sample.error = str(error)
    sample.end = perf_counter()
    if sample.error is None and (sample.tokens != load.output_tokens or not sample.arrivals):
        sample.error = f"{sample.tokens} tokens in {len(sample.arrivals)} chunks, not {load.output_tokens} tokens"
    # Some servers say the finish reason in a chunk of its own, which is no token.
    del sample.arrivals[load.output_tokens :]
    return sample
