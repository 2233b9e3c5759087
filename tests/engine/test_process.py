"""The engine behind its socket: as a thread of this process, and as the process that the server starts."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lattice_serve.engine.config import SAVE_SECONDS, EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.llm import Completion
from lattice_serve.engine.messages import (
    FROM_ENGINE,
    Abort,
    Credit,
    FromEngine,
    Ready,
    RequestFailed,
    StepOutputs,
    Submit,
    ToEngine,
    encode,
)
from lattice_serve.engine.process import Connection, serve
from tests.engine.harness import assert_idle, complete, live, make_engine, submit, take_in
from tests.server.harness import wait_for
from tests.tiny import init_tiny_model

SECONDS = 60.0
"""A machine that is busy compiling is no failure."""
REQUESTS = [
    submit("plain", [5, 17, 4000], max_tokens=9, seed=1),
    submit("scored", range(40), max_tokens=3, seed=2, prompt_logprobs=2, logprobs=3),
    submit("greedy", [8], max_tokens=5, temperature=0, logprobs=0, stop=("zzz",)),
    submit("penalised", [9, 9, 9], max_tokens=6, seed=3, repetition_penalty=1.3, logit_bias={300: 4.0}),
    submit("only scored", [1, 2, 3], max_tokens=0, prompt_logprobs=0),
]
ENDLESS = submit("endless", [7, 7], max_tokens=10**9, ignore_eos=True)

IDS = bytes((1, 0, 0, 0))


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


class Peer:
    """The server's end of the connection."""

    def __init__(self, link: socket.socket) -> None:
        link.settimeout(SECONDS)
        self.link = link
        self._stream = link.makefile("rb")

    def close(self) -> None:
        self._stream.close()
        self.link.close()

    def send(self, *messages: ToEngine) -> None:
        self.link.sendall(b"".join(map(encode, messages)))

    def receive(self) -> FromEngine | None:
        """The next message; None when the engine has closed the connection."""
        header = self._stream.read(4)
        return FROM_ENGINE.decode(self._stream.read(int.from_bytes(header, "big"))) if header else None

    def ready(self) -> Ready:
        message = self.receive()
        assert isinstance(message, Ready)
        return message

    def step(self) -> StepOutputs:
        message = self.receive()
        assert isinstance(message, StepOutputs)
        return message

    def until(self, holds: Callable[[StepOutputs], bool]) -> list[StepOutputs]:
        """Steps up to the first for which `holds`."""
        steps = [self.step()]
        while not holds(steps[-1]):
            assert len(steps) < 5000, "waited in vain"
            steps.append(self.step())
        return steps

    def results(self, requests: Iterable[Submit]) -> dict[str, Completion | RequestFailed]:
        """How each of `requests` ends; nobody else may be heard of."""
        open_ids = {request.request_id: Completion(list(request.prompt_ids)) for request in requests}
        results: dict[str, Completion | RequestFailed] = {}
        while open_ids:
            take_in(self.step(), open_ids, results)
        return results

    def answers(self, *requests: Submit) -> dict[str, Completion | RequestFailed]:
        self.send(*requests)
        return self.results(requests)


@pytest.fixture(scope="module")
def alone(shared_engine: Engine) -> dict[str, Completion]:
    return {request.request_id: complete(shared_engine, request) for request in REQUESTS}


@contextmanager
def served(engine: Engine) -> Iterator[Peer]:
    """The peer of `engine`, which a thread serves until the peer closes."""
    ours, theirs = socket.socketpair()
    peer = Peer(ours)
    thread = threading.Thread(target=serve, args=(engine, Connection(theirs)), daemon=True)
    thread.start()
    try:
        yield peer
    finally:
        with suppress(OSError):  # Closed already.
            ours.shutdown(socket.SHUT_RDWR)
        peer.close()
        thread.join(SECONDS)
        theirs.close()
        assert not thread.is_alive(), "the engine did not see that the server had gone"


class TestServe:
    """The loop itself, on a thread."""

    @pytest.fixture
    def peer(self, engine: Engine) -> Iterator[Peer]:
        with served(engine) as peer:
            assert peer.ready() == engine.info
            yield peer

    def test_answers_cross_the_socket_unchanged(self, peer: Peer, alone: dict[str, Completion]) -> None:
        assert peer.answers(*REQUESTS) == alone

    def test_tokens_come_one_at_a_time_with_the_state_of_the_engine(self, peer: Peer) -> None:
        peer.send(submit("r", [5, 17], max_tokens=4, ignore_eos=True))
        steps = peer.until(lambda step: any(output.finish_reason for output in step.outputs))
        assert [len(step.outputs) for step in steps] == [1, 1, 1, 1]
        assert [step.stats.running for step in steps] == [1, 1, 1, 0]
        assert [step.stats.rows_used for step in steps] == [1, 1, 1, 0]

    def test_a_refused_request_fails_alone_naming_its_field(
        self, peer: Peer, alone: dict[str, Completion], engine: Engine
    ) -> None:
        bad = [submit("empty", []), submit("unknown token", [4096]), submit("none", [3], max_tokens=0)]
        results = peer.answers(bad[0], REQUESTS[0], bad[1], REQUESTS[1], bad[2])
        assert {name: results.pop(name) for name in ("plain", "scored")} == {n: alone[n] for n in ("plain", "scored")}
        failures = [results[request.request_id] for request in bad]
        assert all(isinstance(failed, RequestFailed) and failed.error == "InvalidParameter" for failed in failures)
        assert [getattr(failed, "param", None) for failed in failures] == ["prompt", "prompt", "max_tokens"]
        # And when there is nothing else to do.
        assert peer.answers(bad[0]).keys() == {"empty"}

    def test_an_aborted_request_is_heard_of_no_more(self, peer: Peer, alone: dict[str, Completion]) -> None:
        peer.send(ENDLESS)
        peer.until(lambda step: bool(step.outputs))
        peer.send(Abort("endless"), Abort("nobody"))
        *_, last = peer.until(lambda step: step.stats.running == 0)
        assert (last.outputs, last.failures, last.stats.rows_used) == ([], [], 0)
        assert peer.answers(*REQUESTS) == alone

    def test_the_server_goes_away_in_the_middle_of_a_stream(self, tiny_model: Path) -> None:
        engine = make_engine(tiny_model)
        with served(engine) as peer:
            peer.ready()
            peer.send(ENDLESS)
            peer.until(lambda step: bool(step.outputs))
        engine.abort("endless")
        assert_idle(engine)

    def test_more_than_may_wait_is_overload(self, tiny_model: Path) -> None:
        with served(make_engine(tiny_model, max_rows=1, max_waiting=1)) as peer:
            peer.ready()
            peer.send(ENDLESS)
            peer.until(lambda step: bool(step.outputs))
            peer.send(REQUESTS[0], REQUESTS[1])
            *_, last = peer.until(lambda step: bool(step.failures))
            assert [(failed.request_id, failed.error) for failed in last.failures] == [("scored", "Overloaded")]

    def test_a_request_that_goes_wrong_fails_alone(self, tiny_model: Path, alone: dict[str, Completion]) -> None:
        engine = make_engine(tiny_model)
        poisoned = threading.Event()
        launch = engine.launch

        def poison() -> None:
            launch()
            if not poisoned.is_set():
                row = live(engine, "endless").row
                assert row is not None
                engine.pool.memory[row].fill_(float("nan"))
                poisoned.set()

        engine.launch = poison  # type: ignore[method-assign]
        with served(engine) as peer:
            peer.ready()
            results = peer.answers(ENDLESS, *REQUESTS)
        failed = results.pop("endless")
        assert isinstance(failed, RequestFailed)
        assert failed.error == "NumericalError"
        assert results == alone

    @pytest.mark.parametrize(
        "data",
        [
            frame(b"\xc1"),
            frame(b""),
            frame(b"\xff" * 100),
            frame(msgspec.msgpack.encode({"type": "Unknown", "request_id": "r"})),
            frame(msgspec.msgpack.encode({"type": "Submit", "request_id": "r"})),
            frame(msgspec.msgpack.encode({"type": "Submit", "request_id": 1, "prompt_ids": IDS, "params": {}})),
            frame(msgspec.msgpack.encode({"type": "Submit", "request_id": "r", "prompt_ids": [1], "params": {}})),
            frame(msgspec.msgpack.encode({"type": "Submit", "request_id": "r", "prompt_ids": IDS[1:], "params": {}})),
            frame(
                msgspec.msgpack.encode(
                    {"type": "Submit", "request_id": "r", "prompt_ids": IDS, "params": {"temperature": -1.0}}
                )
            ),
            encode(REQUESTS[0])[:-1],
            b"\0\0",
        ],
        ids=[
            "no msgpack",
            "empty",
            "noise",
            "no such type",
            "fields missing",
            "wrong type",
            "a list",
            "part of an id",
            "range",
            "cut",
            "header",
        ],
    )
    def test_what_is_no_message_ends_the_connection_with_a_word(
        self, engine: Engine, data: bytes, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with served(engine) as peer:
            peer.ready()
            peer.link.sendall(data)
            peer.link.shutdown(socket.SHUT_WR)
        assert "engine: connection lost: " in capfd.readouterr().err


class EngineProcess:
    """`python -m lattice_serve.engine.process`, as `server.supervisor` starts it."""

    def __init__(self, folder: Path, model: Path, cache_file: Path | None = None, **settings: Any) -> None:
        self._socket = folder / "engine.sock"
        self.log = folder / "engine.log"
        config = EngineConfig(model=model, max_rows=4, max_step_tokens=16, **settings)
        command = [sys.executable, "-m", "lattice_serve.engine.process", "--socket", str(self._socket)]
        command += [] if cache_file is None else ["--cache-file", str(cache_file)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--config", config.model_dump_json()], stdin=subprocess.PIPE, stderr=log
            )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    @contextmanager
    def connect(self) -> Iterator[Peer]:
        def listening() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(FileNotFoundError, ConnectionRefusedError):
                link.connect(str(self._socket))
                return True
            return False

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            wait_for(listening, SECONDS)
            peer = Peer(link)
            try:
                yield peer
            finally:
                peer.close()

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path], EngineProcess]]:
    with ExitStack() as stack:
        yield lambda model: stack.enter_context(EngineProcess(tmp_path, model))


def test_a_process_of_its_own(
    start: Callable[[Path], EngineProcess], tiny_model: Path, engine: Engine, alone: dict[str, Completion]
) -> None:
    """Ready, answers, a SIGTERM that is not for it, and the end with the connection."""
    child = start(tiny_model)
    with child.connect() as peer:
        expected = msgspec.structs.replace(engine.info, pid=child.process.pid, load_seconds=0.0)
        assert msgspec.structs.replace(peer.ready(), load_seconds=0.0) == expected
        assert peer.answers(*REQUESTS) == alone
        child.process.send_signal(signal.SIGTERM)
        assert peer.answers(*REQUESTS) == alone
        peer.send(ENDLESS)
        peer.until(lambda step: bool(step.outputs))
    assert child.process.wait(SECONDS) == 0


def test_the_end_of_its_input_ends_the_process_even_at_work(
    start: Callable[[Path], EngineProcess], tiny_model: Path
) -> None:
    child = start(tiny_model)
    with child.connect() as peer:
        peer.ready()
        peer.send(ENDLESS)
        peer.until(lambda step: bool(step.outputs))
        child.end_input()
        assert child.process.wait(SECONDS) == 0


def test_an_engine_outlives_want_of_memory(tmp_path: Path) -> None:
    """Below what a cache and parked states would have: those that find none fail, others are answered, and when there
    is memory again, all is as before."""

    def limit(spare: int) -> None:
        size = int(Path(f"/proc/{child.process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        most = resource.RLIM_INFINITY if spare < 0 else size + spare
        resource.prlimit(child.process.pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def unread(name: str) -> Submit:
        """A state that is parked, for its first output is not taken."""
        return msgspec.structs.replace(submit(name, [9, 9], max_tokens=2, ignore_eos=True), window=1)

    model = init_tiny_model(tmp_path / "model", head_dim=128, num_slots=128)  # 120 states fill a block of the cache
    prompts = [submit(f"{i}", [i, 5], max_tokens=1) for i in range(150)]
    with EngineProcess(tmp_path, model, prefix_cache_memory=1 << 30) as child, child.connect() as peer:
        peer.ready()
        alone = peer.answers(*REQUESTS)
        limit(80 << 20)
        assert peer.answers(*prompts, *REQUESTS).items() >= alone.items()
        limit(2 << 20)
        many = {str(i): unread(str(i)) for i in range(500)}
        peer.send(*many.values())
        failed: dict[str, str] = {}

        def settled(step: StepOutputs) -> bool:
            failed.update({failure.request_id: failure.error for failure in step.failures})
            return step.stats.paused + len(failed) == len(many)

        peer.until(settled)
        assert set(failed.values()) == {"OutOfMemory"}
        paused = [many[name] for name in many if name not in failed]
        assert paused
        peer.send(*(Credit(request.request_id, 1 << 20) for request in paused))
        results = {**peer.results(paused), **peer.answers(*REQUESTS)}
        assert all(results[name] == alone[name] for name in alone if isinstance(results[name], Completion))
        limit(-1)
        assert peer.answers(*REQUESTS) == alone
    log = child.log.read_text()
    assert log.count("the prefix cache on cpu does not grow") == 1
    assert "Traceback" not in log


def test_who_has_served_nobody_has_nothing_to_save(tiny_model: Path, tmp_path: Path) -> None:
    """A server that is told to stop while the engine starts does not wait for it."""
    with EngineProcess(tmp_path, tiny_model, tmp_path / "states") as child:
        child.end_input()
        assert child.process.wait(SAVE_SECONDS / 2) == 0
    assert not (tmp_path / "states").exists()


def test_a_bad_model_folder_is_reported(start: Callable[[Path], EngineProcess], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    child = start(folder)
    assert child.process.wait(SECONDS) == 1
    log = child.log.read_text()
    assert log.startswith(f"error: {folder}")
    assert "Traceback" not in log


def test_a_socket_that_cannot_be_is_reported(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / ("a" * 100)  # too long for the address of a socket
    folder.mkdir()
    with EngineProcess(folder, tiny_model) as child:
        assert child.process.wait(SECONDS) == 1
        log = child.log.read_text()
    assert log.startswith("error: no socket at ")
    assert log.endswith(": set TMPDIR to another folder\n")
