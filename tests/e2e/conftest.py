"""A tiny model of random weights, and servers of it, each with its engine process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from lattice_serve.engine.config import ModelConfig
from lattice_serve.engine.weights import bundled_model, init_model
from tests.e2e.harness import VOCAB_SIZE, RealServer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        head_dim=8,
        num_slots=5,
        intermediate_size=48,
        chunk_size=4,
        eos_token_id=1,
    )
    init_model(config, folder, seed=0, dtype=torch.bfloat16)
    shutil.copyfile(bundled_model() / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """One for all tests that leave it as they found it. Small steps, so that prompts are cut into many pieces."""
    with RealServer(tmp_path_factory.mktemp("server"), model, max_step_tokens=128) as server:
        yield server


@pytest.fixture
def start_server(model: Path, tmp_path: Path) -> Iterator[Callable[..., RealServer]]:
    """Starts one with settings of the test's own."""
    with ExitStack() as stack:

        def start(**settings: Any) -> RealServer:
            return stack.enter_context(RealServer(tmp_path, model, **settings))

        yield start


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(64)
    yield pool
    # Not waiting: after a failure, streams may go on for as long as their server does.
    pool.shutdown(wait=False, cancel_futures=True)
