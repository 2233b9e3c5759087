"""What benchmarks measured, drawn: PNG files for people who would rather look than read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattice_serve.clients.errors import ClientError

if TYPE_CHECKING:
    from lattice_serve.clients.bench_http import LoadReport
    from lattice_serve.clients.bench_offline import Measured


def check() -> None:
    """Raises `ClientError` where nothing could be drawn: to be called before hours of measuring."""
    _pyplot()


def offline(runs: Sequence[Measured], path: Path) -> None:
    """Tokens a second of each run, and what the machine allows."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = [run.phase if run.phase == "prefill" else f"decode\nbatch {run.batch}" for run in runs]
    rates = [run.tokens_per_second for run in runs]
    bars = axes.bar(names, rates, color="tab:blue", label="measured")
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates])
    for place, run in enumerate(runs):
        if run.share:
            limit = run.tokens_per_second / run.share
            axes.plot((place - 0.4, place + 0.4), (limit, limit), color="tab:red", label="" if place else "limit")
    axes.set_ylabel("tokens a second")
    axes.legend()
    _save(figure, path)


def http(reports: Sequence[LoadReport], path: Path) -> None:
    """Throughput, and the latencies that clients saw: median and 99th percentile."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    names = [report.load.label.replace(" ", "\n", 1) for report in reports]
    bars = panels[0].bar(names, [report.output_tokens_per_second for report in reports], color="tab:blue")
    panels[0].bar_label(bars, fmt="{:,.0f}")
    panels[0].set_ylabel("output tokens a second")
    titles = (("ttft_ms", "time to first token, ms"), ("itl_ms", "inter-token latency, ms"))
    for axes, (field, title) in zip(panels[1:], titles, strict=True):
        spreads = [getattr(report, field) for report in reports]
        for percentile, shift in (("p50", -0.2), ("p99", 0.2)):
            heights = [0.0 if spread is None else getattr(spread, percentile) for spread in spreads]
            places = [place + shift for place in range(len(names))]
            axes.bar_label(axes.bar(places, heights, 0.4, label=percentile), fmt="{:,.0f}")
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(title)
        axes.legend()
    _save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ClientError("--plot needs matplotlib: pip install 'lattice-serve[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}: name a file that can be written") from error
