"""A tiny model of random weights, and servers of it, each with its engine process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import RealServer
from tests.tiny import init_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


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
            return stack.enter_context(RealServer(tmp_path, settings.pop("model", model), **settings))

        yield start


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(64)
    yield pool
    # Not waiting: after a failure, streams may go on for as long as their server does.
    pool.shutdown(wait=False, cancel_futures=True)
