"""Model folders that are damaged: each loads, or is a clear error, soon and in little memory.

`benchmarks/mutants.py` tries them by the thousand.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mutants import load, mutants, outcome

from tests.tiny import init_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_tiny_model(tmp_path_factory.mktemp("whole") / "model", num_hidden_layers=1)


@pytest.mark.parametrize("seed", range(10))
def test_each_mutant_loads_or_is_a_clear_error(model: Path, tmp_path: Path, seed: int) -> None:
    said = {what: outcome(partial(load, mutant)) for what, mutant in mutants(model, tmp_path, 25, seed)}
    assert {what: text for what, text in said.items() if text.startswith("WRONG")} == {}
    assert sum(text.startswith("CheckpointError: ") for text in said.values()) > 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 2**63),
        ("vocab_size", 10**9),
        ("hidden_size", 2**63 - 1),
        ("num_hidden_layers", 2**31 - 1),
        ("chunk_size", 2**31 - 1),
        ("norm_eps", float("inf")),
        ("eos_token_id", 4096),
        ("bos_token_id", -1),
    ],
)
def test_a_number_that_cannot_be_is_named(model: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    said = outcome(lambda: load(folder))
    assert said.startswith("CheckpointError: ")
    assert name in said
