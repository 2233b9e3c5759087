"""Models for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_serve.engine.engine import Engine
from tests.engine.harness import assert_idle, make_engine
from tests.tiny import init_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def shared_engine(tiny_model: Path) -> Engine:
    return make_engine(tiny_model)


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """One for all tests that leave it as they found it."""
    yield shared_engine
    assert_idle(shared_engine)
