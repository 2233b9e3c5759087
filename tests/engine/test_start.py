"""What an engine makes sure of before it takes requests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import ConfigError, NumericalError
from lattice_serve.engine.llm import LLM
from lattice_serve.engine.models.lattice import model as network
from lattice_serve.engine.weights import load_model
from lattice_serve.kernels.decoder.cpu import CpuDecoder
from tests.tiny import init_tiny_model


def test_other_bits_in_a_batch_are_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = CpuDecoder.__call__

    def otherwise(self: CpuDecoder, ids: Any, segments: Any, *places: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, hidden = exact(self, ids, segments, *places)
        return logits + 1e-6 * (len(segments.rows) - 1), hidden

    model = init_tiny_model(tmp_path)
    monkeypatch.setattr(CpuDecoder, "__call__", otherwise)
    with pytest.raises(NumericalError, match="other bits in a batch"):
        Engine(EngineConfig(model=model, max_rows=2))


def test_int8_answers_and_says_so(tmp_path: Path) -> None:
    model = init_tiny_model(tmp_path)
    exact, near = LLM(model, max_rows=2), LLM(model, max_rows=2, quantization="int8")
    assert (exact.info.dtype, near.info.dtype) == ("bfloat16", "int8")
    ids = list(range(2, 30))
    truth, scores = exact.score(ids), near.score(ids)
    assert truth != scores
    assert scores == pytest.approx(truth, abs=0.1)


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization"):
        LLM(init_tiny_model(tmp_path), quantization="int3")


def test_a_gpu_without_triton_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(init_tiny_model(tmp_path), dtype=torch.bfloat16)
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    pool: Any = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ConfigError, match=r"'cuda:0', which needs triton: install lattice-serve\[gpu\]") as caught:
        model.compile_step(pool, max_tokens=1, threads=1, parallel_from=1, quantization=None, gather=None)
    assert caught.value.param == "device"
