"""Backends that the device alone would not choose, for engines of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lattice_serve.engine import assembly
from lattice_serve.engine.backend import Backend, TorchBackend
from lattice_serve.engine.engine import Engine
from tests.engine.harness import make_engine
from tests.triton_device import DEVICE

# isort: split
from lattice_serve.kernels.decoder.triton import TritonDecoder


def triton_backend(model: Any, pool: Any, *, max_tokens: int, quantization: Any, gather: Any, **_: Any) -> Backend:
    weights, layout = model.decoder_weights(), model.layout
    return TritonDecoder(weights, layout, pool, max_tokens=max_tokens, quantization=quantization, gather=gather)


def torch_backend(model: Any, pool: Any, *, max_tokens: int, gather: Any, **_: Any) -> Backend:
    return TorchBackend(model, pool, max_tokens, gather)


def engine_of(model: Path, backend: Any, **settings: Any) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "make_backend", backend)
        return make_engine(model, dtype="float32", device=DEVICE, **settings)
