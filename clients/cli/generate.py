"""`lattice generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lattice_serve.clients.cli.options import DtypeOption, ModelOption, QuantizationOption, ThreadsOption


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that hold this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among that many tokens; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: makes tokens seen before less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="drawn")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer. May be repeated.")] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a text in this process, without a server. The text comes as it is made.

    `lattice generate "Once upon a time" --max-tokens 200 --temperature 0.8 --seed 1`

    `lattice generate - --stop "THE END" < chapter.txt`
    """
    from lattice_serve.engine.sampling import SamplingParams

    # Before the model is loaded: a wrong option should not take that long to be found.
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if prompt == "-":
        prompt = sys.stdin.read()

    from lattice_serve.engine.llm import LLM

    llm = LLM(model, dtype=dtype or "auto", quantization=quantization, threads=threads, max_rows=1)
    for output in llm.stream(prompt, params):
        typer.echo(output.text, nl=False)
    typer.echo()
