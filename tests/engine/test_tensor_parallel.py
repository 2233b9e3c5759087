"""One model in two processes: the answers of one, states that stay whole, and no process left behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import CheckpointError, ConfigError, EngineDied
from lattice_serve.engine.llm import LLM, Completion
from lattice_serve.engine.models.registry import load_config
from lattice_serve.engine.tensor_parallel import group, workers
from lattice_serve.engine.tensor_parallel.commands import CheckScrubbed, Initialise, Start, send
from lattice_serve.engine.tensor_parallel.group import devices
from lattice_serve.engine.tensor_parallel.share import Share
from lattice_serve.engine.weights import load_model
from lattice_serve.kernels.mixers.segments import Segments
from tests.engine.backends import engine_of, torch_backend, triton_backend
from tests.engine.harness import Visit, assert_idle, complete, drive, submit
from tests.engine.test_process import ENDLESS, SECONDS, EngineProcess
from tests.server.harness import alive, wait_for
from tests.tiny import init_tiny_model

ROOT = Path(__file__).parents[2]
PROMPT = [*range(2, 13)]
REQUESTS = [
    submit("greedy", PROMPT, max_tokens=3, temperature=0, logprobs=1, ignore_eos=True),
    submit("drawn", [7, 300, 9], max_tokens=4, seed=5, logprobs=2, ignore_eos=True),
    submit("scored", range(40, 46), max_tokens=2, seed=6, top_p=0.9, prompt_logprobs=1, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_tiny_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


def logits(engine: Engine, ids: Sequence[int], prompt: int) -> Tensor:
    """[tokens, V] of all of them, the first `prompt` as a prompt, then one by one."""
    row = engine.pool.allocate()
    with torch.inference_mode():
        parts = [engine.runner.backend(ids[:prompt], Segments.of([(row, 0, prompt)]), range(prompt))[0].clone()]
        for place in range(prompt, len(ids)):
            parts.append(engine.runner.backend([ids[place]], Segments.of([(row, place, 1)], 1), [0])[0].clone())
    engine.pool.free(row)
    return torch.cat(parts)


@pytest.fixture(scope="class")
def pair(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[Engine, Engine]]:
    """An engine that is one process, and one that is two."""
    backend = {"torch": torch_backend, "triton": triton_backend}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        if backend is triton_backend:
            patch.setattr(workers, "COMMAND", (sys.executable, "-m", "tests.engine.triton_worker"))
        settings = {"max_rows": 2, "max_step_tokens": 12}
        two = engine_of(model, backend, **settings, tensor_parallel_size=2, prefix_cache_memory=1 << 20)
    yield engine_of(model, backend, **settings), two
    assert two.workers is not None
    (pid,) = two.workers.pids
    two.close()
    assert not alive(pid)


@pytest.mark.parametrize("pair", ["torch", "triton"], indirect=True, scope="class")
class TestTwoProcesses:
    """On the torch reference, and on Triton's kernels."""

    @pytest.fixture
    def one(self, pair: tuple[Engine, Engine]) -> Engine:
        return pair[0]

    @pytest.fixture
    def two(self, pair: tuple[Engine, Engine]) -> Iterator[Engine]:
        """Nothing is left in any process, and nothing of a test before it is cached."""
        engine = pair[1]
        engine.cache.clear()
        yield engine
        assert_idle(engine)
        assert engine.workers is not None
        engine.workers.send(CheckScrubbed([0, 1]))
        engine.pool.free(engine.pool.allocate())
        assert logits(engine, [1], 1).isfinite().all(), "all take part in this: who has found dirt has not"

    def test_logits_are_those_of_one_process(self, one: Engine, two: Engine) -> None:
        ids = [*range(2, 16)]
        truth, mine = logits(one, ids, 10), logits(two, ids, 10)
        assert (mine - truth).abs().max() <= 1e-5
        assert two.info.bytes_per_row == one.info.bytes_per_row

    def test_answers_are_those_of_one_process_alone_and_together(self, one: Engine, two: Engine) -> None:
        """Three for two rows: one is parked, in a state of both processes."""
        two.scheduler.quantum = 2
        parked = two.scheduler.preemptions
        together = drive(two, [Visit(request, comes=place) for place, request in enumerate(REQUESTS)])
        assert two.scheduler.preemptions > parked
        for request in REQUESTS:
            truth, mine = complete(one, request), together[request.request_id]
            assert isinstance(mine, Completion)
            assert mine.token_ids == truth.token_ids
            assert [entry.logprob for entry in mine.logprobs] == pytest.approx(
                [entry.logprob for entry in truth.logprobs], abs=1e-5
            )
            two.cache.clear()
            assert complete(two, request) == mine, "the company of others changed a bit"

    def test_what_is_cached_has_the_bits_of_what_is_not(self, two: Engine) -> None:
        first = submit("first", PROMPT, max_tokens=2, seed=1, logprobs=1, ignore_eos=True)
        prompts = {"again": PROMPT, "parts within a chunk": [*PROMPT[:9], 7, 7, 7], "parts there too": [*PROMPT[:9], 8]}
        requests = [
            msgspec.structs.replace(first, request_id=name, prompt_ids=array("i", ids)) for name, ids in prompts.items()
        ]
        cold = []
        for request in requests:
            two.cache.clear()
            cold.append(complete(two, request))
        two.cache.clear()
        complete(two, first)
        warm = [complete(two, request) for request in requests]
        assert warm == cold
        assert [completion.cached_tokens for completion in warm] == [11, 0, 8]
        assert [completion.cached_tokens for completion in cold] == [0, 0, 0]

    def test_another_model_in_this_process_is_refused(self, two: Engine, model: Path) -> None:
        with pytest.raises(ConfigError, match="a process of its own"):
            LLM(model, tensor_parallel_size=2)


def test_dirt_in_another_process_is_found(model: Path) -> None:
    engine = engine_of(model, torch_backend, tensor_parallel_size=2)
    assert engine.workers is not None
    engine.workers.send(Initialise(0))
    engine.workers.send(CheckScrubbed([0]))
    (pid,) = engine.workers.pids
    wait_for(lambda: not alive(pid), SECONDS)
    engine.close()


def test_a_killed_worker_ends_an_llm_with_an_error(model: Path) -> None:
    llm = LLM(model, tensor_parallel_size=2, max_rows=2)
    assert llm._engine.workers is not None
    (pid,) = llm._engine.workers.pids
    stream = llm.stream([1, 2, 3], ENDLESS.params)
    next(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDied):
        list(islice(stream, 1000))
    llm._engine.close()


def test_a_dropped_llm_ends_its_workers(model: Path) -> None:
    llm = LLM(model, tensor_parallel_size=2, max_rows=2)
    assert llm._engine.workers is not None
    (pid,) = llm._engine.workers.pids
    del llm
    assert not alive(pid)


def test_a_killed_worker_ends_the_engine_process(model: Path, tmp_path: Path) -> None:
    with EngineProcess(tmp_path, model, tensor_parallel_size=2) as child, child.connect() as peer:
        peer.ready()
        peer.send(ENDLESS)
        peer.until(lambda step: bool(step.outputs))
        (pid,) = children(child.process.pid)
        os.kill(pid, signal.SIGKILL)
        assert child.process.wait(SECONDS) == 1
        log = child.log.read_text()
        assert "of this model has ended" in log
        assert "Traceback" not in log


def test_workers_end_with_an_engine_process_that_is_killed(model: Path, tmp_path: Path) -> None:
    with EngineProcess(tmp_path, model, tensor_parallel_size=2) as child, child.connect() as peer:
        peer.ready()
        peer.send(ENDLESS)
        peer.until(lambda step: bool(step.outputs))
        (pid,) = children(child.process.pid)
        child.process.kill()
        wait_for(lambda: not alive(pid), SECONDS)


def test_a_stopped_worker_ends_with_its_engine_process(model: Path, tmp_path: Path) -> None:
    with EngineProcess(tmp_path, model, tensor_parallel_size=2) as child, child.connect() as peer:
        peer.ready()
        (pid,) = children(child.process.pid)
        assert b"LATTICE_" not in Path(f"/proc/{pid}/environ").read_bytes()
        os.kill(pid, signal.SIGSTOP)
        child.process.kill()
        wait_for(lambda: not alive(pid), SECONDS)


def test_a_worker_ends_with_a_leader_that_has_not_listened_to_it(model: Path, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        worker = subprocess.Popen([*workers.COMMAND, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    with ours:
        send(ours, Start(EngineConfig(model=model, tensor_parallel_size=2).model_dump_json(), 1, str(tmp_path)))
        assert select.select([ours], [], [], SECONDS)[0], "its share is not loaded"
    assert worker.wait(SECONDS) in (0, -signal.SIGALRM)


def test_a_worker_that_does_not_listen_is_said_of(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", "import time; time.sleep(1)"))
    with pytest.raises(ConfigError, match="process 1 of 2 did not start"):
        LLM(model, tensor_parallel_size=2)


def test_a_worker_that_dies_before_it_joins_is_said_of(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says_ready = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'R')"
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", says_ready))
    monkeypatch.setattr(group, "_JOIN_SECONDS", 1)
    with pytest.raises(EngineDied):
        LLM(model, tensor_parallel_size=2)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_what_cannot_be_shared_out_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide the model's num_heads, 2") as caught:
        LLM(model, tensor_parallel_size=4)
    assert caught.value.param == "tensor_parallel_size"
    odd = init_tiny_model(tmp_path / "odd", intermediate_size=47)
    with pytest.raises(ConfigError, match="intermediate_size, 47"):
        LLM(odd, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="speculative_tokens do not go with tensor_parallel_size"):
        LLM(model, tensor_parallel_size=2, speculative_tokens=3)
    with pytest.raises(ConfigError, match="quantization does not go with tensor_parallel_size on a CPU"):
        LLM(model, tensor_parallel_size=2, quantization="int8")


def test_a_bad_folder_is_said_of_and_leaves_nothing(tmp_path: Path) -> None:
    folder = init_tiny_model(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = children(os.getpid())  # those that other tests have left to end by themselves
    with pytest.raises(CheckpointError, match="cut short"):
        LLM(folder, tensor_parallel_size=2)
    assert set(children(os.getpid())) <= set(before)


def test_gpus_from_the_first_on_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices("cuda", 2) == ["cuda:0", "cuda:1"]
    assert devices("cuda:2", 2) == ["cuda:2", "cuda:3"]
    # With its number: torch.cuda.set_device takes no "cuda" alone.
    assert (devices("cuda", 1), devices("cuda:3", 1)) == (["cuda:0"], ["cuda:3"])
    assert devices("cpu", 3) == ["cpu"] * 3
    for device, size in (("cuda:3", 2), ("cuda", 5), ("cuda:4", 1)):
        with pytest.raises(ConfigError, match="GPUs, and there are 4: lower replicas or tensor_parallel_size"):
            devices(device, size)
    with pytest.raises(ConfigError, match="give cuda or cpu"):
        devices("mps", 2)


@pytest.mark.parametrize("size", [2, 4])
def test_shares_are_all_of_a_model_once(tmp_path: Path, size: int) -> None:
    """Each number of the model is in the shares as often as it should be, and each share loads as a model."""
    folder = init_tiny_model(tmp_path / "m", num_heads=4, num_hidden_layers=1)
    config = load_config(folder)
    whole = load_model(folder, dtype=torch.float32).state_dict()
    shares = [load_model(folder, dtype=torch.float32, share=Share(rank, size)).state_dict() for rank in range(size)]
    for name, tensor in whole.items():
        parts = [share[name] for share in shares]
        if "norm" in name or name == "embedding":
            assert all(torch.equal(part, tensor) for part in parts), name
        else:
            joined = torch.cat([part.flatten() for part in parts])
            assert torch.equal(joined.sort().values, tensor.flatten().sort().values), name
    assert EngineConfig(model=folder, tensor_parallel_size=size).tensor_parallel_size == size
    assert Share(0, size).config(config).model_dump()["num_heads"] == 4 // size
