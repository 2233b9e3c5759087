"""A model folder small enough to make for a test, with the bundled tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.weights import bundled_model, init_model

VOCAB_SIZE = 4096
"""Of the bundled tokenizer."""


def init_tiny_model(folder: Path, **changes: Any) -> Path:
    """Write it, with random weights and `changes` to its `config.json`."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "num_slots": 5,
        "intermediate_size": 48,
        "chunk_size": 4,
        "eos_token_id": 1,
    }
    init_model(LatticeConfig(**fields | changes), folder, seed=0, dtype=torch.bfloat16)
    shutil.copyfile(bundled_model() / "tokenizer.model", folder / "tokenizer.model")
    return folder
