from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import pytest

from lattice_serve.clients.bench_http import FIRST_ORDINARY_TOKEN, Goal, Load, LoadReport, Sample, run_load
from lattice_serve.clients.client import AsyncClient
from lattice_serve.clients.stats import Spread

if TYPE_CHECKING:
    from tests.clients.conftest import PlayedServer

LOAD = Load(requests=3, concurrency=2, prompt_tokens=4, output_tokens=3, vocab_size=10)


class Scene(Load, frozen=True, kw_only=True):
    """A load whose prompts are a scene of the played server."""

    scene: str = "Once"

    def prompt(self, index: int) -> str:  # type: ignore[override]
        return self.scene


def test_prompts_are_random_ordinary_tokens() -> None:
    load = Load(requests=2, concurrency=1, prompt_tokens=500, vocab_size=10)
    assert set(load.prompt(0)) == set(range(FIRST_ORDINARY_TOKEN, 10))
    assert load.prompt(0) == load.prompt(0)
    other_seed = Load(requests=2, concurrency=1, prompt_tokens=500, vocab_size=10, seed=1)
    other_load = Load(requests=2, concurrency=2, prompt_tokens=500, vocab_size=10)
    prompts = [load.prompt(0), load.prompt(1), other_seed.prompt(0), other_load.prompt(0)]
    assert all(a != b for i, a in enumerate(prompts) for b in prompts[:i])


def test_arrivals_are_poisson() -> None:
    arrivals = Load(requests=4000, rate=20.0).arrivals()
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) > 0
    # The gaps of a Poisson process are exponential: mean and standard deviation are both 1 / rate.
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("fields", [{}, {"rate": 1.0, "concurrency": 1}])
def test_a_load_has_one_kind_of_loop(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="concurrency and rate"):
        Load(requests=1, **fields)


def test_a_report_by_hand() -> None:
    samples = [
        Sample(due=10.0, arrivals=[10.1, 10.2, 10.4], tokens=3, end=10.5),
        Sample(due=11.0, arrivals=[11.3, 11.35, 11.4], tokens=3, end=12.0),
        Sample(due=10.5, arrivals=[10.6], end=15.0, error="500: died"),
    ]
    report = LoadReport.of(LOAD, samples, Goal(ttft_ms=200), processor_seconds=2.0)
    assert report.busy == pytest.approx(0.4)
    assert (report.failed, report.errors, report.seconds) == (1, {"500: died": 1}, 5.0)
    assert report.output_tokens == 6
    assert report.output_tokens_per_second == pytest.approx(1.2)
    assert report.goodput == pytest.approx(1 / 3)
    _same(report.ttft_ms, Spread(mean=200, p50=200, p99=298))
    _same(report.itl_ms, Spread(mean=100, p50=75, p99=197))
    _same(report.e2e_ms, Spread(mean=750, p50=750, p99=995))


def _same(got: Spread | None, wanted: Spread) -> None:
    assert got is not None
    assert (got.mean, got.p50, got.p99) == pytest.approx((wanted.mean, wanted.p50, wanted.p99))


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal(ttft_ms=101), True),
        (Goal(ttft_ms=99), False),
        (Goal(itl_ms=151), True),
        (Goal(itl_ms=149), False),
        (Goal(ttft_ms=99, itl_ms=151), False),
    ],
)
def test_the_goal(goal: Goal, met: bool) -> None:
    assert goal.met(Sample(due=0.0, arrivals=[0.1, 0.2, 0.4], tokens=3, end=0.4)) is met
    assert not goal.met(Sample(due=0.0, arrivals=[0.1], error="x"))


def test_nothing_came_back() -> None:
    report = LoadReport.of(LOAD, [Sample(due=1.0, end=2.0, error="x")], Goal())
    assert (report.ttft_ms, report.itl_ms, report.e2e_ms, report.goodput) == (None, None, None, None)
    assert report.output_tokens_per_second == 0


@pytest.mark.parametrize("loop", [{"concurrency": 3}, {"rate": 200.0}])
async def test_every_request_of_a_load_is_sent_once(played: PlayedServer, loop: dict[str, float]) -> None:
    load = Load(requests=7, prompt_tokens=4, output_tokens=3, **loop)  # type: ignore[arg-type]
    answered = []
    async with AsyncClient(played.url, max_retries=0) as client:
        report = await run_load(client, load, Goal(ttft_ms=60_000), lambda: answered.append(1))
    assert sorted(body["prompt"] for body in played.bodies) == sorted(map(load.prompt, range(7)))
    assert {(body["max_tokens"], body["ignore_eos"]) for body in played.bodies} == {(3, True)}
    assert len(answered) == 7
    assert (report.failed, report.output_tokens, report.goodput) == (0, 21, 1.0)
    assert report.ttft_ms is not None
    assert report.e2e_ms is not None
    assert 0 < report.ttft_ms.mean <= report.e2e_ms.mean <= report.seconds * 1e3


@pytest.mark.parametrize(
    ("scene", "failure"),
    [("Once", None), ("late", None), ("error", "500: engine died"), ("short", "4 tokens in 5 chunks, not 5 tokens")],
)
async def test_what_counts_as_failed(played: PlayedServer, scene: str, failure: str | None) -> None:
    async with AsyncClient(played.url, max_retries=0) as client:
        load = Scene(requests=2, concurrency=1, output_tokens=5, scene=scene)
        report = await run_load(client, load, Goal(), lambda: None)
    assert report.errors == ({} if failure is None else {failure: 2})
    assert report.output_tokens == (10 if failure is None else 0)


async def test_a_refusal_is_a_failure(played: PlayedServer) -> None:
    played.refusals.append((429, "0"))
    async with AsyncClient(played.url, max_retries=0) as client:
        report = await run_load(client, LOAD, Goal(), lambda: None)
    assert report.errors == {"429: refused": 1}
