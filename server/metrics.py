"""Prometheus metrics, under the names that dashboards for LLM servers know, with the prefix `lattice:`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from lattice_serve.engine.messages import EngineStats, TokenOutput

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each series that says when it began, which nobody reads

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = tuple(float(2**power) for power in range(21))
_REJECTIONS = ("queue_full", "key_quota", "draining", "engine_unavailable")
_MISSES = ("new", "no_snapshot", "bypass")
_LABELS = ("model_name", "engine")


class Metrics:
    """All metrics of one engine, in a registry of their own."""

    def __init__(self, model_name: str, engine: str = "0") -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name, "engine": engine}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"lattice:{name}", text, _LABELS, registry=self.registry).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"lattice:{name}", text, _LABELS, registry=self.registry).labels(**labels)

        def histogram(name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            metric = Histogram(f"lattice:{name}", text, _LABELS, registry=self.registry, buckets=buckets)
            return metric.labels(**labels)

        self.up = gauge("engine_up", "1 while the engine takes requests, else 0.")
        self.restarts = counter("engine_restarts", "Times an engine took the place of one that had died.")
        self.running = gauge("num_requests_running", "Sequences that hold a state row.")
        self.waiting = gauge("num_requests_waiting", "Sequences that wait for a state row.")
        self.paused = gauge("num_requests_paused", "Sequences that wait until their clients take what they have.")
        self.pool_usage = gauge("state_pool_usage_ratio", "Share of the state rows in use, 0 to 1.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens the engine has run.")
        self.generation_tokens = counter("generation_tokens", "Tokens the engine has generated.")
        self.preemptions = counter("num_preemptions", "Sequences whose state was parked to free their row.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens guessed in advance.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Those of them that were right.")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens that could have been cached.")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens whose state was cached.")
        self.cache_entries = gauge("prefix_cache_entries", "States that the prefix cache holds.")
        self.cache_bytes = gauge("prefix_cache_bytes", "Memory that they take.")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "Submission to first token.")
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.")
        self.e2e_latency = histogram("e2e_request_latency_seconds", "Submission to last token.")
        self.queue_time = histogram("request_queue_time_seconds", "Submission to state row.")
        self.prefill_time = histogram("request_prefill_time_seconds", "State row to first token.")
        self.decode_time = histogram("request_decode_time_seconds", "First to last token.")
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a sequence.", _TOKENS
        )
        self.iteration_tokens = histogram("iteration_tokens_total", "Tokens of an engine step.", _TOKENS)
        self._finished = Counter(
            "lattice:request_success",
            "Sequences that ended; also those that failed (error) or whose client went away (abort).",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._cache_misses = Counter(
            "lattice:prefix_cache_misses",
            "Prompts that began with no cached state: nothing known begins like them (new), no state of that beginning "
            "is kept (no_snapshot), or every token had to be run for more than the state (bypass).",
            (*_LABELS, "reason"),
            registry=self.registry,
        )
        # A series that begins at 0 shows its first event as an increase.
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(**labels, finished_reason=reason)
        for reason in _MISSES:
            self._cache_misses.labels(**labels, reason=reason)
        self._labels = labels
        self._stats = EngineStats()

    def finished(self, reason: str) -> None:
        self._finished.labels(**self._labels, finished_reason=reason).inc()

    def engine_started(self, rows: int, again: bool = False) -> None:
        """A fresh engine process counts from zero. rows: 0 when it has ended; again: another was there before it."""
        self.up.set(rows > 0)
        self.restarts.inc(again)
        self._stats = EngineStats(rows=rows)
        self._show_gauges()

    def step(self, stats: EngineStats) -> None:
        last, self._stats = self._stats, stats
        self.prompt_tokens.inc(stats.prompt_tokens_total - last.prompt_tokens_total)
        self.generation_tokens.inc(stats.generation_tokens_total - last.generation_tokens_total)
        self.preemptions.inc(stats.preemptions_total - last.preemptions_total)
        self.draft_tokens.inc(stats.draft_tokens_total - last.draft_tokens_total)
        self.accepted_tokens.inc(stats.accepted_tokens_total - last.accepted_tokens_total)
        for reason in _MISSES:
            more = stats.cache_outcomes.get(reason, 0) - last.cache_outcomes.get(reason, 0)
            self._cache_misses.labels(**self._labels, reason=reason).inc(more)
        if stats.steps_total > last.steps_total:
            self.iteration_tokens.observe(stats.step_tokens)
        self._show_gauges()

    def _show_gauges(self) -> None:
        self.running.set(self._stats.running)
        self.waiting.set(self._stats.waiting)
        self.paused.set(self._stats.paused)
        self.cache_entries.set(self._stats.cache_entries)
        self.cache_bytes.set(self._stats.cache_bytes)
        self.pool_usage.set(self._stats.rows_used / max(1, self._stats.rows))

    def sequence(self, prompt_tokens: int) -> SequenceMeter:
        return SequenceMeter(self, prompt_tokens)


class ServerMetrics(Collector):
    """The metrics of every engine, and those of the server before them."""

    def __init__(self, model_name: str, engines: int) -> None:
        self.engines = [Metrics(model_name, str(number)) for number in range(engines)]
        self._registry = CollectorRegistry()
        rejections = Counter(
            "lattice:admission_rejections",
            "Requests refused before they were given to an engine.",
            ("model_name", "reason"),
            registry=self._registry,
        )
        self.active_keys = Gauge(
            "lattice:active_keys",
            "API keys that have sequences which run or wait; 1 for all requests where no key is asked for.",
            ("model_name",),
            registry=self._registry,
        ).labels(model_name)
        self._rejections = {reason: rejections.labels(model_name, reason) for reason in _REJECTIONS}

    def rejected(self, reason: str) -> None:
        self._rejections[reason].inc()

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """Each metric once, with the samples of all engines."""
        metrics: dict[str, Metric] = {}
        for registry in (*(engine.registry for engine in self.engines), self._registry):
            for metric in registry.collect():
                metrics.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type)).samples.extend(
                    metric.samples
                )
        return metrics.values()


class SequenceMeter:
    """Times one sequence, from its submission."""

    __slots__ = ("_first", "_generated", "_last", "_metrics", "_prompt_tokens", "_submitted")

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._generated = 0
        self._submitted = time.perf_counter()
        self._first: float | None = None
        self._last = self._submitted

    def output(self, output: TokenOutput) -> None:
        if output.token_id is None and output.finish_reason is None:
            return  # a part of its prompt's log-probabilities
        now = time.perf_counter()
        metrics = self._metrics
        if self._first is None:
            self._first = now
            metrics.time_to_first_token.observe(now - self._submitted)
            metrics.cache_queries.inc(self._prompt_tokens)
            metrics.cache_hits.inc(output.cached_tokens)
            if output.queue_seconds is not None:
                metrics.queue_time.observe(output.queue_seconds)
            if output.prefill_seconds is not None:
                metrics.prefill_time.observe(output.prefill_seconds)
        elif output.token_id is not None:
            metrics.inter_token_latency.observe(now - self._last)
        self._last = now
        self._generated += output.token_id is not None
        if output.finish_reason is not None:
            self._finish(output.finish_reason)

    def stopped(self, reason: str) -> None:
        """The sequence ended without a finish reason of its own: "abort" or "error"."""
        self._metrics.finished(reason)

    def _finish(self, reason: str) -> None:
        metrics = self._metrics
        metrics.finished(reason)
        metrics.e2e_latency.observe(self._last - self._submitted)
        if self._first is not None:
            metrics.decode_time.observe(self._last - self._first)
        metrics.request_prompt_tokens.observe(self._prompt_tokens)
        metrics.request_generation_tokens.observe(self._generated)
