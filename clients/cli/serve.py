"""`lattice serve`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lattice_serve.clients.cli.options import DtypeOption, ModelArgument, QuantizationOption, ThreadsOption

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of `512M`, `2GiB` or `1000000`. Units are powers of 1024."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size: give bytes, or a number with K, M or G, such as 512M")
    return int(match[1]) * _UNITS[match[2].upper()]


def serve(
    model: ModelArgument = None,
    host: Annotated[
        str | None,
        typer.Option(help="Any address but loopback needs an API key.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="0 lets the system choose.", show_default="8000")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that clients must send. Better in LATTICE_API_KEY: others can read a command line."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with such keys, one a line.", show_default="none")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may send requests; can be given again.", show_default="none"),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the name of its folder")
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs.", show_default="cpu")] = None,
    threads: ThreadsOption = None,
    replicas: Annotated[
        int | None, typer.Option(help="Engines: with GPUs of their own, or sharing the processors.", show_default="1")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs an engine, each with a share of the model.", show_default="1")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Requests that run at once.", show_default="as many as --state-memory holds")
    ] = None,
    state_memory: Annotated[
        str | None, typer.Option(help="Memory for the states of requests, such as 512M.", show_default="1G")
    ] = None,
    prefix_cache_memory: Annotated[
        str | None, typer.Option(help="Memory for states that may come again; 0 keeps none.", show_default="1G")
    ] = None,
    prefix_cache_file: Annotated[
        Path | None, typer.Option(help="Where such states outlive the server.", show_default="nowhere")
    ] = None,
    prefix_cache_key_file: Annotated[
        Path | None, typer.Option(help="Key of that file, made if there is none.", show_default="beside it, .key")
    ] = None,
    prefix_cache_save_seconds: Annotated[
        float | None, typer.Option(help="Between two saves of that file; 0: at the end alone.", show_default="300")
    ] = None,
    prefix_cache_device_memory: Annotated[
        str | None, typer.Option(help="On a GPU: its memory, for those used last.", show_default="256M")
    ] = None,
    speculative_tokens: Annotated[
        int | None, typer.Option(help="Tokens to guess ahead where a text repeats itself.", show_default="0, none")
    ] = None,
    priority_scope: Annotated[
        str | None,
        typer.Option(help="Where `priority` acts: within a `key`, or the whole `server`.", show_default="key"),
    ] = None,
    max_step_tokens: Annotated[
        int | None, typer.Option(help="Tokens a step, prompts and answers together.", show_default="512; on a GPU 2048")
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(help="Seconds that a step may take while answers run: prompts are cut.", show_default="0.05"),
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Requests that may wait; more are answered 429.", show_default="1024")
    ] = None,
    grace_period: Annotated[
        float | None, typer.Option(help="Seconds that running requests have after SIGTERM.", show_default="30")
    ] = None,
    watchdog_seconds: Annotated[
        float | None,
        typer.Option(
            help="After which an engine that neither answers nor computes is started again.", show_default="12"
        ),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
) -> None:
    """Serve a model over an OpenAI-compatible API, until SIGTERM or Ctrl-C.

    Every option is also read from the environment, as `LATTICE_PORT` and so on; the command line wins.

    `lattice serve`

    `LATTICE_API_KEY=secret lattice serve ./my-model --host 0.0.0.0 --max-rows 64`
    """
    from lattice_serve.server import app
    from lattice_serve.server.settings import Settings

    app.serve(
        Settings.load(
            model=model,
            host=host,
            port=port,
            api_key=api_key,
            api_key_file=api_key_file,
            cors_origins=cors_origin or None,
            served_model_name=served_model_name,
            dtype=dtype,
            quantization=quantization,
            device=device,
            threads=threads,
            replicas=replicas,
            tensor_parallel_size=tensor_parallel_size,
            max_rows=max_rows,
            state_memory=None if state_memory is None else parse_size(state_memory),
            speculative_tokens=speculative_tokens,
            prefix_cache_memory=None if prefix_cache_memory is None else parse_size(prefix_cache_memory),
            prefix_cache_file=prefix_cache_file,
            prefix_cache_key_file=prefix_cache_key_file,
            prefix_cache_save_seconds=prefix_cache_save_seconds,
            prefix_cache_device_memory=(
                None if prefix_cache_device_memory is None else parse_size(prefix_cache_device_memory)
            ),
            priority_scope=priority_scope,
            max_step_tokens=max_step_tokens,
            step_seconds=step_seconds,
            max_waiting=max_waiting,
            grace_period=grace_period,
            watchdog_seconds=watchdog_seconds,
            log_level=log_level,
        )
    )
