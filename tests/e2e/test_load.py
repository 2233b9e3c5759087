"""Many requests at once: none of them changes the answer of another, and the books balance."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.e2e.harness import RealServer, choices, random_ids, random_request
from tests.server.harness import wait_for

REQUESTS = 64
PATIENCE = 120
"""Seconds."""
NEVER_ENDING: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True, "stop": None}


def test_a_burst_of_which_a_third_is_cut_off(server: RealServer, pool: ThreadPoolExecutor) -> None:
    draw = random.Random(64)
    cut = {place: draw.randint(1, 5) for place in range(0, REQUESTS, 3)}
    bodies = [random_request(draw) | {"stream_options": {"include_usage": True}} for _ in range(REQUESTS)]
    for place in cut:
        bodies[place] |= NEVER_ENDING
    before = server.metrics()

    streams = list(
        pool.map(
            lambda place: server.chunks(bodies[place], cut_after=cut.get(place)), range(REQUESTS), timeout=PATIENCE
        )
    )
    wait_for(server.is_idle, seconds=2)
    metrics = _growth(before, server.metrics())

    finished = {place: chunks for place, chunks in enumerate(streams) if place not in cut}
    assert [len(streams[place]) for place in cut] == list(cut.values())
    _check_books(metrics, finished, cut, bodies, server)

    reasons = {chunks[-2]["choices"][0]["finish_reason"] for chunks in finished.values()}
    assert reasons == {"stop", "length"}
    for place, chunks in finished.items():
        assert choices(server.chunks(bodies[place])) == choices(chunks), bodies[place]


def _check_books(
    metrics: Counter[str],
    finished: dict[int, list[dict[str, Any]]],
    cut: dict[int, int],
    bodies: list[dict[str, Any]],
    server: RealServer,
) -> None:
    """`metrics` against what clients have received. Of the streams cut off, only the least is known."""
    usages = [chunks[-1]["usage"] for chunks in finished.values()]
    generated = sum(usage["completion_tokens"] for usage in usages)
    # One chunk a token, and one with the usage.
    assert generated == sum(len(chunks) - 1 for chunks in finished.values())
    reasons = Counter(chunks[-2]["choices"][0]["finish_reason"] for chunks in finished.values())
    for reason, count in {"stop": reasons["stop"], "length": reasons["length"], "abort": len(cut), "error": 0}.items():
        assert metrics[f'request_success_total{{finished_reason="{reason}"}}'] == count
    assert metrics["request_generation_tokens_sum"] == generated
    assert metrics["request_prompt_tokens_sum"] == sum(usage["prompt_tokens"] for usage in usages)
    assert metrics["e2e_request_latency_seconds_count"] == len(finished)
    assert metrics["time_to_first_token_seconds_count"] == REQUESTS

    # A stream of which a chunk has come has had its whole prompt run, but for what another had begun with.
    prompts = [body["prompt"] for body in bodies]
    ids = [server.post("/tokenize", prompt=p).json()["tokens"] if isinstance(p, str) else p for p in prompts]
    assert metrics["prompt_tokens_total"] + metrics["prefix_cache_hits_total"] == sum(map(len, ids))
    received = generated + sum(cut.values())
    assert received <= metrics["generation_tokens_total"] < received + len(cut) * 10_000
    assert metrics["inter_token_latency_seconds_count"] >= received - REQUESTS


def test_more_long_answers_than_rows_take_turns(server: RealServer, pool: ThreadPoolExecutor) -> None:
    draw = random.Random(8)
    bodies: list[dict[str, Any]] = [
        {"prompt": random_ids(draw, draw.randint(1, 300)), "max_tokens": 520, "seed": seed, "ignore_eos": True}
        for seed in range(11)
    ]
    before = server.metrics()
    together = list(pool.map(server.chunks, bodies, timeout=PATIENCE))
    metrics = _growth(before, server.metrics())
    assert metrics["num_preemptions_total"] > 0
    # Parked and resumed, no token is computed twice.
    run = metrics["prompt_tokens_total"] + metrics["prefix_cache_hits_total"]
    assert run == sum(len(body["prompt"]) for body in bodies)
    assert metrics["generation_tokens_total"] == 520 * len(bodies)
    for body, chunks in zip(bodies, together, strict=True):
        assert choices(server.chunks(body)) == choices(chunks)
    wait_for(server.is_idle, seconds=2)


def _growth(before: dict[str, float], after: dict[str, float]) -> Counter[str]:
    growth: Counter[str] = Counter()
    for name, value in after.items():
        growth[name] = int(value - before.get(name, 0))
    return growth
