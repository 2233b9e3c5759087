"""`lattice bench`: the benchmarks of `bench_http` and `bench_offline` with a table, and JSON for machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lattice_serve.clients.cli.options import DtypeOption, ModelArgument, QuantizationOption, ThreadsOption

if TYPE_CHECKING:
    from lattice_serve.clients.bench_http import Goal, Load, LoadReport

_BUSY = 0.7
"""Of a processor, from which on a client's latencies are in doubt."""

bench = typer.Typer(name="bench", help="Measure the engine, or a running server.", no_args_is_help=True)

JsonOption = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Also write the last line, which is JSON, to a file.")
]

PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", dir_okay=False, help="Also draw the figures into a PNG file; needs lattice-serve[plot]."),
]


@bench.command()
def offline(
    model: ModelArgument = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences decoded together. May be repeated.", show_default="1, 8, 32 and 64"),
    ] = None,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded, each sequence.")] = 64,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt that is prefilled.")] = 512,
    position: Annotated[
        int | None, typer.Option(min=1, help="Also decode after a prompt of that many tokens.", show_default="not done")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="The median of that many runs is shown.")] = 3,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Decode and prefill in this process, without a server, and the share of what the machine allows.

    `lattice bench offline --batch 1 --batch 64`
    """
    from lattice_serve.clients import plot as plots
    from lattice_serve.clients.bench_offline import GATE_PROMPTS, OfflineBench, check_far
    from lattice_serve.clients.ceilings import BITS, Ceilings
    from lattice_serve.clients.cli import report
    from lattice_serve.engine.config import EngineConfig
    from lattice_serve.engine.llm import LLM
    from lattice_serve.engine.models.registry import load_config
    from lattice_serve.engine.processors import available_cpus
    from lattice_serve.engine.weights import resolve_model
    from lattice_serve.kernels.numba.features import available_products

    if plot is not None:
        plots.check()
    if position is not None:
        check_far(decode_tokens)
    batches = batch or [1, 8, 32, 64]
    rows = max(*batches, GATE_PROMPTS)
    step_tokens = max(rows, EngineConfig.model_fields["max_step_tokens"].default)
    settings = {"dtype": dtype or "auto", "quantization": quantization, "threads": threads}
    with report.progress() as progress:
        task = progress.add_task("load", total=len(batches) + 4 + (position is not None))
        llm = LLM(model, max_rows=rows, max_step_tokens=step_tokens, prefix_cache_memory=0, **settings)
        progress.update(task, advance=1, description="the machine's limits")
        work = load_config(resolve_model(model)).work(BITS[llm.info.dtype])
        products = available_products(llm.info.dtype)[0]
        ceilings = Ceilings.measure(threads or available_cpus(), products, work.weight_bytes)
        runner = OfflineBench(llm, repeats=repeats, work=work, ceilings=ceilings)
        progress.update(task, advance=1, description="check")
        runner.check()
        progress.update(task, advance=1, description="prefill")
        results = [runner.prefill(prefill_tokens)]
        for size in batches:
            progress.update(task, advance=1, description=f"decode, batch {size}")
            results.append(runner.decode(size, decode_tokens))
        far = None
        if position is not None:
            progress.update(task, advance=1, description=f"decode at {position:,}")
            far = OfflineBench(LLM(model, max_rows=1, **settings), repeats=repeats).far(position, decode_tokens)

    table = report.table("phase", "batch", "tokens", "tokens/s", "slowest", "fastest", "of the limit")
    for run in results:
        rates = (run.tokens_per_second, run.slowest, run.fastest)
        share = "" if run.share is None else f"{run.share:.0%}"
        table.add_row(run.phase, str(run.batch), str(run.tokens), *(f"{rate:,.0f}" for rate in rates), share)
    table.caption = (
        f"limit: {ceilings.bytes_per_second / 1e9:.1f} GB/s, {ceilings.flops_per_second / 1e9:.0f} GFLOP/s "
        f"in products and {ceilings.float32_flops_per_second / 1e9:.0f} in float32; "
        f"a step reads {work.weight_bytes / 1e6:.1f} MB of weights, a token {work.state_bytes / 1e6:.2f} MB of state"
    )
    if far is not None:
        table.caption += (
            f"\nat token {far.position:,}: {far.far_tokens_per_second:,.0f} tokens/s, at the first ones "
            f"{far.near_tokens_per_second:,.0f}; memory grew by {far.grown_bytes / 1e6:.1f} MB"
        )
    measured = {"engine": llm.info, "repeats": repeats, "ceilings": ceilings, "work": work, "runs": results, "far": far}
    report.finish(table, {"benchmark": "offline", **measured}, json)
    if plot is not None:
        plots.offline(results, plot)


@bench.command()
def http(
    url: Annotated[str, typer.Option(help="Any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name of the model.", show_default="the first one served")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key to send.", show_default="LATTICE_API_KEY")] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Closed loop: clients at once. May be repeated.", show_default="1, 8 and 32"),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=1e-6, help="Open loop instead: requests a second, at random moments. May be repeated."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests a load.", show_default="three a client, at least 8; 32 in an open loop"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 64,
    vocab_size: Annotated[int, typer.Option(min=4, help="Prompts are random token ids below it.")] = 1000,
    ttft_ms: Annotated[float | None, typer.Option(help="Goal for the time to the first token.")] = None,
    itl_ms: Annotated[float | None, typer.Option(help="Goal for a request's mean inter-token latency.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed sends the same prompts at the same moments.")] = 0,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Send load to a running server and report what its clients see.

    `lattice bench http --concurrency 1 --concurrency 32`

    `lattice bench http --rate 20 --requests 200 --ttft-ms 200 --itl-ms 20`
    """
    from importlib import import_module
    from importlib.util import find_spec

    from rich.markup import escape

    from lattice_serve.clients import plot as plots
    from lattice_serve.clients.bench_http import Goal, Load
    from lattice_serve.clients.cli import report

    if plot is not None:
        plots.check()
    shape = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "vocab_size": vocab_size, "seed": seed}
    closed = concurrency or ([] if rate else [1, 8, 32])
    loads = [Load(concurrency=clients, requests=requests or max(8, 3 * clients), **shape) for clients in closed]
    loads += [Load(rate=each, requests=requests or 32, **shape) for each in rate or []]
    goal = Goal(ttft_ms=ttft_ms, itl_ms=itl_ms)
    # Asyncio's own loop takes longer for a token than the servers that are measured. Windows has no other.
    loop = import_module("uvloop" if find_spec("uvloop") else "asyncio")
    model, reports = loop.run(_run_loads(url, model, api_key, loads, goal))

    table = report.table("load", "failed", "tokens/s", "TTFT ms", "inter-token ms", "end to end ms", "goodput")
    for run in reports:
        table.add_row(
            run.load.label,
            f"{run.failed} of {run.load.requests}",
            f"{run.output_tokens_per_second:,.0f}",
            *map(report.spread, (run.ttft_ms, run.itl_ms, run.e2e_ms)),
            "" if run.goodput is None else f"{run.goodput:.0%}",
        )
    table.caption = "latencies: mean / median / 99th percentile"
    failures = [f"{count} x {error}" for run in reports for error, count in run.errors.items()]
    table.caption += "".join(f"\nfailed: {escape(failure)}" for failure in failures)
    table.caption += "".join(
        f"\n{run.load.label}: this client was busy {run.busy:.0%} of the time, which its latencies show"
        for run in reports
        if run.busy > _BUSY
    )
    report.finish(table, {"benchmark": "http", "url": url, "model": model, "goal": goal, "runs": reports}, json)
    if plot is not None:
        plots.http(reports, plot)


async def _run_loads(
    url: str, model: str | None, api_key: str | None, loads: Sequence[Load], goal: Goal
) -> tuple[str, list[LoadReport]]:
    import msgspec

    from lattice_serve.clients.bench_http import run_load
    from lattice_serve.clients.cli import report
    from lattice_serve.clients.client import AsyncClient
    from lattice_serve.clients.errors import ClientError
    from lattice_serve.clients.transport import LeanTransport

    async with AsyncClient(url, api_key=api_key, model=model, max_retries=0, transport=LeanTransport()) as client:
        name = client.model = client.model or (await client.models())[0].id
        with report.progress() as progress:
            task = progress.add_task("warm-up", total=sum(load.requests for load in loads))
            warm_up = msgspec.structs.replace(loads[0], requests=1, concurrency=1, rate=None, seed=~loads[0].seed)
            tried = await run_load(client, warm_up, goal, lambda: None)
            if tried.failed:
                raise ClientError(f"the first request failed, nothing was measured: {next(iter(tried.errors))}")
            reports = []
            for load in loads:
                progress.update(task, description=load.label)
                reports.append(await run_load(client, load, goal, lambda: progress.advance(task)))
        return name, reports
