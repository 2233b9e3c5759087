"""The model families there are, by the `model_type` of `config.json`. Imports no torch before a model is made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lattice_serve.engine.errors import CheckpointError
from lattice_serve.engine.models.base import ModelConfig

if TYPE_CHECKING:
    from lattice_serve.engine.models.causal_lm import CausalLM

DEFAULT = "lattice"
"""The family of a `config.json` without a model_type."""
_LISTED = 100
"""Characters of a foreign model_type that a message shows."""


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family's classes are, each as `module:class`."""

    config: str
    """A `ModelConfig`; its module imports no torch."""
    model: str
    """A `CausalLM`."""


FAMILIES: dict[str, Family] = {
    "lattice": Family(
        config="lattice_serve.engine.models.lattice.config:LatticeConfig",
        model="lattice_serve.engine.models.lattice.model:LatticeForCausalLM",
    ),
}


def load_config(folder: Path) -> ModelConfig:
    """Returns the configuration of a model folder.

    Raises `CheckpointError` when `config.json` is missing, is not JSON, is of no family that there is, or has a field
    that is missing, unknown or wrong.
    """
    path = folder / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}: give a folder that holds a model") from error
    return parse_config(data, path)


def parse_config(data: bytes, path: Path) -> ModelConfig:
    """Returns the configuration in the bytes of the file `path`. Raises `CheckpointError` as `load_config`."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object: give the config.json of a model")
    model_type = fields.get("model_type", DEFAULT)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{path}: model_type is {ascii(model_type)[:_LISTED]}: give a model of one of these families: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    try:
        config: ModelConfig = _find(family.config).model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path}: {faults}") from error
    return config


def model_class(config: ModelConfig) -> type[CausalLM]:
    """Returns the class of the network that `config` describes."""
    found: type[CausalLM] = _find(FAMILIES[config.model_type].model)
    return found


def _find(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
