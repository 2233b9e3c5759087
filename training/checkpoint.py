"""Checkpoints of a run: everything that the next step depends on, written whole or not at all.

A checkpoint is a folder `step-00001234`: `parameters.safetensors`, `optimizer.safetensors`, `memory.safetensors` (the
memory that the lanes carry) and `run.json` (step, watch, options). It is written beside its place, then renamed into
it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lattice_serve.engine.errors import CheckpointError
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM, ModelState
from lattice_serve.kernels.mixers.lattice import MixerState

_KEPT = 2


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".part")


def save_checkpoint(
    folder: Path,
    step: int,
    model: LatticeForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    memory: ModelState,
    run: dict[str, Any],
) -> Path:
    """Write the checkpoint of `step` (steps done) and remove all but the last two. Returns its folder."""
    place = folder / f"step-{step:08d}"
    part = place.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write(part / "parameters.safetensors", {name: p.detach() for name, p in model.named_parameters()})
    _write(part / "optimizer.safetensors", _optimizer_tensors(optimizers))
    _write(part / "memory.safetensors", _memory_tensors(memory))
    with (part / "run.json").open("w", encoding="utf-8") as file:
        json.dump(run | {"step": step}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)
    for old in checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old)
    return place


def load_checkpoint(
    place: Path, model: LatticeForCausalLM, optimizers: list[torch.optim.Optimizer], batch: int
) -> tuple[dict[str, Any], ModelState]:
    """Fill `model` and `optimizers` from a checkpoint; returns its `run.json` and the lanes' memory.

    Raises `CheckpointError` when something is missing or does not fit the model or the optimizers.
    """
    try:
        run: dict[str, Any] = json.loads((place / "run.json").read_text(encoding="utf-8"))
        parameters = load_file(place / "parameters.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters.pop(name))
        _fill_optimizers(optimizers, load_file(place / "optimizer.safetensors"))
        memory = _fill_memory(model, batch, load_file(place / "memory.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{place}: {error}: resume with the options that it was made with") from error
    if parameters:
        raise CheckpointError(f"{place}: parameters that the model lacks: {', '.join(sorted(parameters))}")
    return run, memory


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of every parameter's state, as `optimizer.parameter.name`."""
    return {
        f"{i}.{index}.{name}": value
        for i, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _fill_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Learning rates and the like are the new run's, so that it may choose others."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in tensors.items():
        i, index, name = key.split(".", 2)
        if int(i) >= len(optimizers):
            raise ValueError("it was made with another --optimizer")
        states[int(i)].setdefault(int(index), {})[name] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _memory_tensors(memory: ModelState) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": torch.as_tensor(value)
        for i, layer in enumerate(memory.layers)
        for name, value in _parts(layer).items()
    }


def _parts(layer: MixerState) -> dict[str, Any]:
    return {f.name: getattr(layer.lattice, f.name) for f in fields(layer.lattice)} | {"tail": layer.tail}


def _fill_memory(model: LatticeForCausalLM, batch: int, tensors: dict[str, Tensor]) -> ModelState:
    layers = []
    for i, layer in enumerate(model.initial_state(batch).detach().layers):
        parts = {name: tensors[f"{i}.{name}"] for name in _parts(layer)}
        tail = parts.pop("tail")
        position = int(parts.pop("position"))
        if parts["anchor"].shape != layer.lattice.anchor.shape:
            raise ValueError(f"memory of {len(tail)} lanes, not of {batch}")
        layers.append(replace(layer, lattice=replace(layer.lattice, position=position, **parts), tail=tail))
    return ModelState(layers)
