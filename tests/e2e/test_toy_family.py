"""A second model family, served as the first one is: nothing but its own module and a line of the registry knows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_serve.engine.engine import Engine
from lattice_serve.engine.llm import LLM
from lattice_serve.engine.models import registry
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.weights import bundled_model
from lattice_serve.kernels.mixers.segments import Segments
from tests.e2e.harness import LATTICE, RealServer, choices
from tests.engine.harness import Visit, complete, drive, make_engine, submit
from tests.server.harness import ServerProcess
from tests.toy import TOY

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.toy_command"]
SIZES = {"vocab_size": 4096, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 20}
CONFIG = {"model_type": "toy", **SIZES}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "toy", TOY)
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by `lattice init`."""
    folder = tmp_path_factory.mktemp("toy")
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG | {"architectures": ["ToyForCausalLM"], "eos_token_id": 1}))
    made = folder / "model"
    subprocess.run([*COMMAND, "init", str(config), str(made)], check=True, timeout=60, env=os.environ)
    assert (made / "model.safetensors").is_file()
    return made


class ToyServer(RealServer):
    def __init__(self, folder: Path, model: Path, **settings: Any) -> None:
        super().__init__(folder, model, **settings)
        self._command = [*COMMAND, *self._command[1:]]


@pytest.fixture(scope="module")
def toy_server(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ToyServer(tmp_path_factory.mktemp("server"), toy_model, max_step_tokens=64) as server:
        yield server


def test_it_streams_over_http(toy_server: RealServer) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "seed": 3, "temperature": 0.9, "logprobs": 2}
    first, again = toy_server.chunks(body), toy_server.chunks(body)
    assert choices(first) == choices(again)
    assert len(first) == 12
    whole = toy_server.complete(**body)["choices"][0]
    assert whole["text"] == "".join(chunk["choices"][0]["text"] for chunk in first)


def test_its_states_are_cached(toy_server: RealServer) -> None:
    """The next turn of a conversation runs the new tokens alone, with the same answer as without the cache."""
    prompt = list(range(600, 640))
    first = toy_server.complete(prompt, max_tokens=6, temperature=0, ignore_eos=True, return_token_ids=True)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    longer = [*prompt, 7, 8, 9]
    cached = toy_server.complete(longer, max_tokens=6, temperature=0, ignore_eos=True)
    assert cached["usage"]["prompt_tokens_details"]["cached_tokens"] == 40
    fresh = toy_server.complete(longer, max_tokens=6, temperature=0, ignore_eos=True, cache_salt="other")
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert fresh["choices"] == cached["choices"]


def test_preempted_answers_are_those_of_each_alone(toy_model: Path) -> None:
    """Two rows for five requests: states are parked in host memory and come back, bit for bit."""
    requests = [submit(str(i), range(50 * i, 50 * i + 9), max_tokens=30, seed=i, ignore_eos=True) for i in range(5)]
    alone = [complete(_engine(toy_model), request) for request in requests]
    engine = _engine(toy_model, quantum=4)
    together = drive(engine, [Visit(request, comes=place) for place, request in enumerate(requests)])
    assert engine.scheduler.preemptions > 0
    assert [together[request.request_id] for request in requests] == alone


def _engine(model: Path, **settings: Any) -> Engine:
    return make_engine(model, max_rows=2, **settings)


def test_a_copy_of_a_state_goes_on_as_the_state_does(toy_model: Path) -> None:
    engine = _engine(toy_model)
    pool, backend = engine.pool, engine.runner.backend
    row = pool.allocate()
    backend([5, 6, 7], Segments.of([(row, 0, 3)]), [2])
    copy = pool.copy(row)
    parked = pool.park(row)
    logits = backend([8], Segments.of([(copy, 3, 1)]), [0])[0].clone()
    pool.free(copy)
    restored = pool.restore(parked)
    assert backend([8], Segments.of([(restored, 3, 1)]), [0])[0].equal(logits)
    pool.free(restored)


def test_it_runs_in_process(toy_model: Path) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0)
    llm = LLM(toy_model, max_rows=2)
    assert llm.generate(["It was"], params, progress=False) == llm.generate(["It was"], params, progress=False)
    assert llm.info.bytes_per_row == 4 * SIZES["num_hidden_layers"] * SIZES["state_size"]


def test_a_family_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    """By the command as it is installed, which does not know the toy."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.model").write_bytes((bundled_model() / "tokenizer.model").read_bytes())
    shown = subprocess.run([LATTICE, "serve", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 2
    assert "model_type is 'toy': give a model of one of these families: lattice" in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr
