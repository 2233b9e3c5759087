"""`lattice init`."""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lattice_serve.engine.models.base import ModelConfig


class StoredDtype(str, Enum):
    """`ModelConfig.torch_dtype`, as typer takes choices."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def init(
    config: Annotated[Path, typer.Argument(help="A config.json, or a folder that holds one.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write; new or empty.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[StoredDtype | None, typer.Option(help="Of the weights.", show_default="the config's")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder whose tokenizer.model is copied.", show_default="the bundled one, if it fits"),
    ] = None,
) -> None:
    """Write a model with random weights: to measure with, or to train from.

    `lattice init config.json ./random-117m --tokenizer ./my-model`
    """
    from lattice_serve.engine.errors import ConfigError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists: name a folder that is new or empty", param="out")
    settings = _read_config(config)

    import torch

    from lattice_serve.engine.weights import bundled_model, init_model

    source = tokenizer or bundled_model()
    settings.tokenizer.load(source, settings.vocab_size)
    if dtype is not None:
        settings = settings.model_copy(update={"torch_dtype": dtype.value})
    init_model(settings, out, seed=seed, dtype=getattr(torch, settings.torch_dtype))
    shutil.copyfile(source / "tokenizer.model", out / "tokenizer.model")
    typer.echo(f"wrote {out}")


def _read_config(path: Path) -> ModelConfig:
    """Raises `CheckpointError`, or `ConfigError`, naming `path` and what is wrong with it."""
    from lattice_serve.engine.errors import ConfigError
    from lattice_serve.engine.models.registry import load_config, parse_config

    if path.is_dir():
        return load_config(path)
    try:
        return parse_config(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="config") from error
