"""Processes that are killed or told to stop, and clients that go away."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from tests.e2e.harness import RealServer, choices
from tests.server.harness import alive, events, wait_for

StartServer = Callable[..., RealServer]

NEVER_ENDING: dict[str, Any] = {"prompt": "Once", "max_tokens": 10_000_000, "ignore_eos": True}
QUESTION: dict[str, Any] = {"prompt": "It was a dark and stormy night", "max_tokens": 40, "seed": 3}


def test_the_engine_is_killed_under_load(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server(max_rows=4)
    answer = choices(server.chunks(QUESTION))
    first_pid, load_seconds = server.engine_pid, server.load_seconds()
    running = [pool.submit(server.post, **NEVER_ENDING, stream=True) for _ in range(4)]
    wait_for(lambda: server.metrics()["generation_tokens_total"] > 400)
    waiting = [pool.submit(server.post, **NEVER_ENDING, stream=stream) for stream in (True, False)]
    wait_for(lambda: server.metrics()["num_requests_waiting"] == 2)

    os.kill(first_pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: server.http.get("/ready").status_code == 503, seconds=2)
    assert server.post(**QUESTION).status_code == 503
    for future in running:
        *chunks, last = events(future.result(timeout=5).text)
        assert len(chunks) > 10
        assert last["error"]["code"] == 500
    for future in waiting:
        response = future.result(timeout=5)
        # Where nothing has been sent, the status can still tell.
        last = events(response.text)[-1] if response.status_code == 200 else response.json()
        assert last["error"]["code"] == 500
    assert time.monotonic() - killed < 2
    wait_for(lambda: server.http.get("/ready").status_code == 200, load_seconds + 10)
    assert time.monotonic() - killed < load_seconds + 10

    assert choices(server.chunks(QUESTION)) == answer
    assert server.engine_pid != first_pid
    assert server.http.get("/health").json()["restarts"] == 1
    assert server.metrics()['request_success_total{finished_reason="error"}'] == 6
    assert server.is_idle()


def test_the_engine_ends_with_a_server_that_is_killed(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server()
    stream = pool.submit(server.post, **NEVER_ENDING, stream=True)
    wait_for(lambda: server.metrics()["num_requests_running"])
    server.process.kill()
    wait_for(lambda: not alive(server.engine_pid), seconds=2)
    with pytest.raises(httpx.TransportError):
        stream.result(timeout=20)


def test_sigterm_lets_streams_finish(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server()
    body = QUESTION | {"max_tokens": 2000, "ignore_eos": True}
    stream: Future[list[Any]] = pool.submit(server.chunks, body)
    wait_for(lambda: server.metrics()["generation_tokens_total"] > 10)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.http.get("/ready").status_code == 503)
    refused = server.post(**QUESTION)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert not stream.done()
    chunks = stream.result(timeout=20)
    assert len(chunks) == 2000
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(5) == 0
    assert not alive(server.engine_pid)
    assert "Traceback" not in server.log_path.read_text()


@pytest.mark.parametrize(
    "fields",
    [{}, {"n": 4}, {"prompt": [5] * 500_000}, {"prompt": [5] * 500_000, "echo": True, "logprobs": 1}],
    ids=["answering", "with four answers", "reading its prompt", "scoring its prompt"],
)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_goes_away_frees_its_rows(server: RealServer, fields: dict[str, Any], stream: bool) -> None:
    with _going_away(server, NEVER_ENDING | fields | {"stream": stream}):
        wait_for(lambda: server.metrics()["num_requests_running"] == fields.get("n", 1))
    wait_for(server.is_idle, seconds=1)


def test_a_client_that_goes_away_while_it_waits_for_a_row(server: RealServer) -> None:
    with ExitStack() as rows:
        for _ in range(8):
            rows.enter_context(_going_away(server, NEVER_ENDING))
        wait_for(lambda: server.metrics()["num_requests_running"] == 8)
        with _going_away(server, NEVER_ENDING):
            wait_for(lambda: server.metrics()["num_requests_waiting"] == 1)
        wait_for(lambda: server.metrics()["num_requests_waiting"] == 0, seconds=1)
        assert server.metrics()["num_requests_running"] == 8
    wait_for(server.is_idle, seconds=1)


@contextmanager
def _going_away(server: RealServer, body: dict[str, Any]) -> Iterator[None]:
    """A request whose connection is closed at the end of the block, whatever has been answered."""
    url = httpx.URL(server.url)
    request = server.http.build_request("POST", "/v1/completions", json=body)
    request.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    assert url.port is not None
    with socket.create_connection((url.host, url.port), timeout=20) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        yield
