"""`GET /metrics` against what clients saw."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from lattice_serve.engine.messages import EngineStats, TokenOutput
from lattice_serve.server.metrics import Metrics
from tests.server.harness import ServerProcess, wait_for


def test_metrics_add_up(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    answers = [
        server.complete(["one", "two"], n=2, max_tokens=3),
        server.complete("!eos", max_tokens=9),
        server.complete("score", max_tokens=0, echo=True),
    ]
    chunks = server.stream("three", max_tokens=4, stream_options={"include_usage": True})
    usages = [answer["usage"] for answer in answers] + [chunks[-2]["usage"]]
    assert server.post(prompt="!fail NumericalError").status_code == 500
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json={"prompt": "!stall"}, timeout=0.3)
    wait_for(lambda: server.metrics()['request_success_total{finished_reason="abort"}'])
    # The engine speaks of what it ran for the last one only when it has dropped it.
    prompt_tokens = sum(len(record["ids"]) for record in server.records("submit"))
    wait_for(lambda: server.metrics()["prompt_tokens_total"] == prompt_tokens)

    metrics = server.metrics()
    ended = {name.split('"')[1]: n for name, n in metrics.items() if name.startswith("request_success_total")}
    assert ended == {"length": 6, "stop": 1, "error": 1, "abort": 1}
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert metrics["generation_tokens_total"] == metrics["request_generation_tokens_sum"] == generated == 20
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert metrics[f"{name}_count"] == 7
    for name in ("request_prompt_tokens", "request_generation_tokens", "request_queue_time_seconds"):
        assert metrics[f"{name}_count"] == 7
    assert metrics["request_queue_time_seconds_sum"] == 7 * 0.25
    assert metrics["request_prefill_time_seconds_sum"] == 7 * 0.5
    assert metrics["inter_token_latency_seconds_count"] == generated - 6
    assert metrics["iteration_tokens_total_sum"] == generated
    assert metrics["prefix_cache_hits_total"] == metrics["num_preemptions_total"] == 0
    wait_for(lambda: server.metrics()["state_pool_usage_ratio"] == 0)


def test_labels_and_type(server: ServerProcess) -> None:
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'lattice:num_requests_running{engine="0",model_name="lattice"} ' in response.text


def test_a_new_engine_counts_on() -> None:
    metrics = Metrics("m")
    for _ in range(2):
        metrics.engine_started(rows=4)
        metrics.step(
            EngineStats(
                rows=4,
                rows_used=1,
                running=1,
                steps_total=1,
                step_tokens=5,
                prompt_tokens_total=5,
                cache_entries=3,
                cache_bytes=300,
                cache_outcomes={"hit": 4, "new": 2},
            )
        )
    labels = {"model_name": "m", "engine": "0"}
    assert metrics.registry.get_sample_value("lattice:prompt_tokens_total", labels) == 10
    assert metrics.registry.get_sample_value("lattice:iteration_tokens_total_sum", labels) == 10
    assert metrics.registry.get_sample_value("lattice:prefix_cache_misses_total", labels | {"reason": "new"}) == 4
    assert metrics.registry.get_sample_value("lattice:prefix_cache_misses_total", labels | {"reason": "bypass"}) == 0
    assert metrics.registry.get_sample_value("lattice:prefix_cache_bytes", labels) == 300
    assert metrics.registry.get_sample_value("lattice:state_pool_usage_ratio", labels) == 0.25
    metrics.engine_started(rows=0)
    assert metrics.registry.get_sample_value("lattice:state_pool_usage_ratio", labels) == 0


def test_cached_tokens_are_hits() -> None:
    metrics = Metrics("m")
    metrics.sequence(10).output(TokenOutput("id", 1, "a", cached_tokens=4))
    labels = {"model_name": "m", "engine": "0"}
    assert metrics.registry.get_sample_value("lattice:prefix_cache_queries_total", labels) == 10
    assert metrics.registry.get_sample_value("lattice:prefix_cache_hits_total", labels) == 4
