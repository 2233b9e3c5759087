"""What an engine works with, by its configuration: the model, state rows, and what runs it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lattice_serve.engine.backend import Backend, make_backend
from lattice_serve.engine.bits import check_bits
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.models.base import ModelConfig
from lattice_serve.engine.models.causal_lm import CausalLM
from lattice_serve.engine.state_pool import StatePool, row_count
from lattice_serve.engine.tensor_parallel.commands import Reserve
from lattice_serve.engine.tensor_parallel.group import devices
from lattice_serve.engine.tensor_parallel.sharded import ShardedBackend, ShardedPool
from lattice_serve.engine.tensor_parallel.share import Share
from lattice_serve.engine.tensor_parallel.workers import Workers
from lattice_serve.engine.weights import load_model


class Assembly(NamedTuple):
    model: CausalLM
    """All of it, or this process's share."""
    pool: StatePool
    workers: Workers | None
    """The processes that have the other shares of the model, if it is shared out."""
    backend: Backend


def assemble(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, threads: int, *, progress: bool, beside: bool
) -> Assembly:
    """Load the model, reserve its state rows and check that all is as it should be.

    Raises `CheckpointError` for a bad model folder, `ConfigError` for settings that do not fit it.
    """
    share = Share(0, config.tensor_parallel_size)
    share.config(model_config)  # whether it can be shared out, before others are started
    workers = Workers(config) if share.size > 1 else None
    try:
        device = devices(config.device, share.size)[0]
        model = load_model(config.model, device=device, dtype=dtype, progress=progress, share=share)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # kernels and graphs run on the current one, wherever their tensors are
        initial = model.initial_row()
        # Off the CPU's own kernels prompts are cut at chunks.
        multiple = 1 if config.device == "cpu" and workers is None else model_config.chunk_alignment
        rows = row_count(config, initial.nbytes * share.size, multiple)
        gather = None
        if workers is None:
            pool = StatePool(initial, rows, device)
        else:
            group = workers.meet(device)
            workers.send(Reserve(rows))
            pool = ShardedPool(initial, rows, device, workers, group)
            gather = group.gather
        backend = make_backend(
            model,
            pool.memory,
            max_tokens=config.max_step_tokens,
            threads=threads,
            beside=beside,
            quantization=config.quantization,
            gather=gather,
        )
        if workers is not None:
            backend = ShardedBackend(backend, workers, share.size)
        _check_fit(config, rows, backend)
        check_bits(backend, pool, model_config.vocab_size, config.max_step_tokens)
    except BaseException:
        if workers is not None:
            workers.close()
        raise
    return Assembly(model, pool, workers, backend)


def _check_fit(config: EngineConfig, rows: int, backend: Backend) -> None:
    """Raises `ConfigError` where a prompt could not move on beside all the other rows, or for drafts where only one
    token at a time is decoded."""
    if config.speculative_tokens and backend.multiple > 1:
        raise ConfigError("speculative_tokens are for the CPU: leave them out", param="speculative_tokens")
    need = rows - 1 + backend.multiple
    if config.max_step_tokens < need:
        raise ConfigError(
            f"max_step_tokens is {config.max_step_tokens}: give {need} or more, for {rows} rows and "
            f"chunks of {backend.multiple} tokens, or lower max_rows",
            param="max_step_tokens",
        )
