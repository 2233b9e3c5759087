"""`lattice chat`."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lattice_serve.clients.client import Client


def chat(
    url: Annotated[str, typer.Option(help="Address of the server, with or without /v1.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="Key to send.", show_default="LATTICE_API_KEY")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default="nothing")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that hold this probability.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answers.", show_default="drawn")
    ] = None,
) -> None:
    """Talk to a model that is served, a line at a time. Ctrl-C cuts an answer short, Ctrl-D ends the chat.

    `lattice chat --system "Answer in rhyme." --temperature 0.8`
    """
    from lattice_serve.clients.cli import failure
    from lattice_serve.clients.client import Client
    from lattice_serve.clients.errors import ClientError

    with suppress(ImportError):
        import readline  # noqa: F401  Lines can be edited, and called back.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is not text cannot be sent
    messages = [] if system is None else [{"role": "system", "content": system}]
    params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if seed is not None:
        params["seed"] = seed
    with Client(url, api_key=api_key) as client, suppress(KeyboardInterrupt):
        client.models()  # before anything is asked: whether there is a server, and the key is right
        while (said := _read()) is not None:
            if said.strip():
                question = {"role": "user", "content": said}
                try:
                    answer = _answer(client, [*messages, question], params)
                except ClientError as error:
                    if not sys.stdin.isatty():
                        raise
                    failure.show(error)
                    continue  # What was said before is not lost, and this can be said again.
                messages += [question, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    """The next line; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(client: Client, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    """What the model says, shown as it comes. Interrupted, it is what has come."""
    text = ""
    try:
        for chunk in client.chat(messages, stream=True, **params):
            text += chunk.text
            typer.echo(chunk.text, nl=False)
    except KeyboardInterrupt:
        typer.echo(" ...", nl=False)
    typer.echo()
    return text
