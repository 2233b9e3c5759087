"""A run's checkpoint as a model folder that can be served.

python -m lattice_serve.training.export CHECKPOINT CONFIG.json TOKENIZER.model OUT
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lattice_serve.engine.errors import CheckpointError, LatticeError
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.engine.weights import save_model


def export_model(model: LatticeForCausalLM, tokenizer: Path, out: Path) -> None:
    """Write `model` with bfloat16 matrices, its tokenizer and what ends its answers, to the folder `out`."""
    save_model(model, out, torch.bfloat16)
    (out / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    generation = {"eos_token_id": model.config.eos_token_id}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def load_parameters(checkpoint: Path, config: Path) -> LatticeForCausalLM:
    """The model of a checkpoint folder of a run. Raises `CheckpointError` when they do not fit."""
    model = LatticeForCausalLM(LatticeConfig.model_validate_json(config.read_text(encoding="utf-8")))
    try:
        model.load_state_dict(load_file(checkpoint / "parameters.safetensors"))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint}: {error}: give a step-* folder and the config of its run") from error
    return model


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lattice_serve.training.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="step-* folder of a run")
    parser.add_argument("config", type=Path, help="config.json that the run was started with")
    parser.add_argument("tokenizer", type=Path, help="sentencepiece model")
    parser.add_argument("out", type=Path, help="model folder to write")
    options = parser.parse_args(arguments)
    try:
        export_model(load_parameters(options.checkpoint, options.config), options.tokenizer, options.out)
    except LatticeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
