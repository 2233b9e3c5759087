"""Starting, overload, the death of the engine, draining."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.harness import ServerProcess, alive, events, wait_for

StartServer = Callable[..., ServerProcess]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def submitted(server: ServerProcess, count: int) -> None:
    wait_for(lambda: len(server.records("submit")) >= count)


def test_the_socket_is_in_a_private_folder(server: ServerProcess) -> None:
    assert server.records("start")[0]["mode"] == "0o700"


def test_full_queue_is_a_429_before_any_200(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server(max_rows=1, max_waiting=1)
    running = [pool.submit(server.post, prompt="!slow", max_tokens=20) for _ in range(2)]
    submitted(server, 2)
    for stream in (True, False):
        response = server.post(prompt="a", stream=stream)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    assert [future.result().status_code for future in running] == [200, 200]
    assert server.complete("a")
    assert server.metrics()['admission_rejections_total{reason="queue_full"}'] == 2


@pytest.mark.parametrize("how", ["--fail", "--fail-connected"])
def test_an_engine_that_does_not_start_ends_the_server(start_server: StartServer, how: str) -> None:
    server = start_server(ready=False, engine_options=(how,))
    assert server.process.wait(20) == 1
    log = server.log_path.read_text()
    assert "the fake engine was told not to start" in log
    assert "ConfigError: the engine did not start (exit status 1)" in log


def test_a_port_in_use_is_told(server: ServerProcess, start_server: StartServer) -> None:
    port = httpx.URL(server.url).port
    second = start_server(ready=False, port=port)
    assert second.process.wait(20) == 1
    assert f"ConfigError: cannot listen on 127.0.0.1 port {port}" in second.log_path.read_text()


def test_a_public_address_needs_a_key(start_server: StartServer) -> None:
    server = start_server(ready=False, host="0.0.0.0")
    assert server.process.wait(20) == 1
    assert "ConfigError: host is '0.0.0.0'" in server.log_path.read_text()


@pytest.mark.parametrize("how", ["kill", "exit", "garbage"])
def test_the_engine_dies_and_comes_back(start_server: StartServer, pool: ThreadPoolExecutor, how: str) -> None:
    server = start_server()
    first_pid = server.engine_pid
    streams = [pool.submit(server.post, prompt="!slow", max_tokens=400, stream=True) for _ in range(3)]
    whole = pool.submit(server.post, prompt="!stall")
    submitted(server, 4)
    time.sleep(0.2)
    died = time.monotonic()
    if how == "kill":
        os.kill(first_pid, signal.SIGKILL)
    else:
        assert server.post(prompt=f"!{how}").status_code == 500
    for future in streams:
        response = future.result(timeout=2)
        assert response.status_code == 200
        *chunks, last = events(response.text)
        assert chunks
        assert last["error"]["code"] == 500
    assert whole.result(timeout=2).status_code == 500
    assert time.monotonic() - died < 2
    wait_for(lambda: server.http.get("/ready").status_code == 200, seconds=10)
    assert server.engine_pid != first_pid
    assert server.complete("a")
    assert server.http.get("/health").json()["restarts"] == server.metrics()["engine_restarts_total"] == 1
    assert server.metrics()['request_success_total{finished_reason="error"}'] == (4 if how == "kill" else 5)


def ready(server: ServerProcess) -> bool:
    return server.http.get("/ready").status_code == 200


def hangs(server: ServerProcess) -> list[str]:
    """Why engines were killed."""
    return [line["reason"] for line in server.log_lines() if line["event"] == "engine hangs, killing it"]


def test_an_idle_engine_that_is_stopped_is_unready_then_killed_and_comes_back(start_server: StartServer) -> None:
    server = start_server(watchdog_seconds=2)
    first_pid = server.engine_pid
    os.kill(first_pid, signal.SIGSTOP)
    wait_for(lambda: not ready(server), seconds=1.8)
    assert alive(first_pid)
    wait_for(lambda: ready(server), seconds=10)
    assert not alive(first_pid)
    assert server.complete("a")
    assert server.metrics()["engine_restarts_total"] == 1
    assert hangs(server) == ["nothing came from it for 2 s, and it did not compute"]


def test_an_engine_that_goes_on_is_ready_again(start_server: StartServer) -> None:
    server = start_server(watchdog_seconds=4)
    os.kill(server.engine_pid, signal.SIGSTOP)
    wait_for(lambda: not ready(server))
    os.kill(server.engine_pid, signal.SIGCONT)
    wait_for(lambda: ready(server))
    assert (server.complete("a")["object"], hangs(server)) == ("text_completion", [])


@pytest.mark.parametrize("how", ["stopped", "!hang"])
def test_a_busy_engine_that_hangs_is_killed_and_comes_back(
    start_server: StartServer, pool: ThreadPoolExecutor, how: str
) -> None:
    server = start_server(watchdog_seconds=1)
    stream = pool.submit(server.stream, "!slow", max_tokens=1000)
    wait_for(lambda: server.metrics()["generation_tokens_total"] > 2)
    if how == "stopped":
        os.kill(server.engine_pid, signal.SIGSTOP)
    else:
        assert server.post(prompt=how).status_code == 500
    assert "send it again" in stream.result(timeout=10)[-1]["error"]["message"]
    wait_for(lambda: ready(server))
    assert server.complete("a")
    assert len(hangs(server)) == 1


def test_an_engine_that_is_slow_idle_or_computes_does_not_hang(start_server: StartServer) -> None:
    server = start_server(watchdog_seconds=1)
    assert server.stream("!slow", max_tokens=30)[-1] == "[DONE]"
    time.sleep(1.5)
    assert server.complete("!compute")  # says nothing meanwhile
    assert hangs(server) == []


def test_a_server_that_is_stopped_for_a_while_kills_no_engine(start_server: StartServer) -> None:
    server = start_server(watchdog_seconds=1)
    for _ in range(2):
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert server.complete("a")
    assert hangs(server) == []


def test_an_engine_that_worked_is_started_again_at_once_each_time(start_server: StartServer) -> None:
    server = start_server()
    delays = []
    for worked in (True, True, True, False, False):
        if worked:
            assert server.complete("a")
        server.post(prompt="!exit")
        wait_for(lambda: ready(server))
        delays = [line["delay_seconds"] for line in server.log_lines() if line["event"].startswith("engine died")]
    assert delays == [0.1, 0.1, 0.1, 0.2, 0.4]


def test_no_other_process_has_the_key(start_server: StartServer) -> None:
    server = start_server(environment={"LATTICE_API_KEY": "secret"})
    assert server.post(prompt="a").status_code == 401
    parent = server.process.pid
    assert b"LATTICE_API_KEY=secret" in Path(f"/proc/{parent}/environ").read_bytes()
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        assert b"LATTICE_" not in Path(f"/proc/{child}/environ").read_bytes()


def test_processes_that_are_stopped_end_with_a_server_that_is_killed(start_server: StartServer) -> None:
    server = start_server()
    parent = server.process.pid
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    os.kill(server.engine_pid, signal.SIGSTOP)
    server.process.kill()
    wait_for(lambda: not any(map(alive, children)), seconds=5)


def test_the_engine_comes_back_without_the_folder_of_the_one_before(start_server: StartServer) -> None:
    """Who clears up temporary files takes what is old."""
    server = start_server()
    first_pid = server.engine_pid
    shutil.rmtree(server.records("start")[-1]["folder"])
    assert server.complete("a")
    os.kill(first_pid, signal.SIGKILL)
    wait_for(lambda: server.post(prompt="a").status_code == 200)
    assert server.engine_pid != first_pid


def test_a_log_on_a_full_disk_ends_nothing(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server()
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))
    written = server.log_path.stat().st_size
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=10) as kept:
        kept.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
        wait_for(lambda: kept.recv(65536, socket.MSG_PEEK).count(b"HTTP/1.1 200 OK") == 2)
    stream = pool.submit(server.stream, "!slow", max_tokens=20)
    submitted(server, 1)
    server.process.send_signal(signal.SIGTERM)
    assert stream.result()[-1] == "[DONE]"
    assert server.process.wait(20) == 0
    assert server.log_path.stat().st_size == written


def test_without_an_engine_requests_are_503(start_server: StartServer) -> None:
    server = start_server()
    for _ in range(3):
        server.post(prompt="!exit")
        response = wait_for(lambda: (answer := server.http.get("/ready")).status_code == 503 and answer)
        assert int(response.headers["retry-after"]) >= 1
        response = server.post(prompt="a")
        if response.status_code == 503:
            break
        wait_for(lambda: server.http.get("/ready").status_code == 200)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert server.http.get("/health").json()["engine"] == "restarting"


def test_sigterm_drains(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server()
    streaming = pool.submit(server.post, prompt="!slow", max_tokens=30, stream=True)
    whole = pool.submit(server.post, prompt="!slow", max_tokens=30)
    submitted(server, 2)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.http.get("/ready").status_code == 503)
    for stream in (True, False):
        refused = server.post(prompt="a", stream=stream)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
    assert server.http.get("/health").json()["engine"] == "draining"
    *chunks, done = events(streaming.result().text)
    assert len(chunks) == 30
    assert done == "[DONE]"
    assert whole.result().json()["usage"]["completion_tokens"] == 30
    assert server.process.wait(5) == 0
    wait_for(lambda: not alive(server.engine_pid))
    assert "Traceback" not in server.log_path.read_text()


def test_streams_end_with_the_grace_period(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server(grace_period=0.5)
    streaming = pool.submit(server.post, prompt="!slow", max_tokens=10_000, stream=True)
    stalled = pool.submit(server.post, prompt="!stall")
    submitted(server, 2)
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    *_, last = events(streaming.result(timeout=5).text)
    assert last["error"]["code"] == 503
    assert stalled.result(timeout=5).status_code == 503
    assert server.process.wait(5) == 0


def test_a_terminal_that_is_closed_lets_streams_end(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server()
    stream = pool.submit(server.stream, "!slow", max_tokens=30)
    submitted(server, 1)
    for _ in range(2):  # by the terminal and by its shell
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.http.get("/ready").status_code == 503)
    assert stream.result(timeout=5)[-1] == "[DONE]"
    assert server.process.wait(5) == 0


def test_a_second_signal_ends_it_at_once(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server()
    stalled = pool.submit(server.post, prompt="!stall")
    submitted(server, 1)
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: server.http.get("/ready").status_code == 503)
    server.process.send_signal(signal.SIGINT)
    assert stalled.result(timeout=5).status_code == 503
    assert server.process.wait(5) == 0


def test_the_engine_ends_with_a_server_that_is_killed(start_server: StartServer) -> None:
    server = start_server()
    server.process.kill()
    wait_for(lambda: not alive(server.engine_pid))


def test_the_renderer_of_templates_ends_with_it_too(start_server: StartServer) -> None:
    server = start_server()
    parent = server.process.pid
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    assert len(children) == 2, "the engine and the renderer"
    server.process.kill()
    wait_for(lambda: not any(map(alive, children)), seconds=5)


def test_many_streams_a_third_of_them_cut_off(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server()
    alone = {length: server.complete("!slow", max_tokens=length, seed=1)["choices"][0]["text"] for length in (2, 5)}

    def ask(number: int) -> str | None:
        body = {"prompt": "!slow", "max_tokens": 2 + 3 * (number % 2), "seed": 1, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            if number % 3 == 0:
                next(response.iter_raw())
                return None
            *chunks, done = events(response.read().decode())
        assert done == "[DONE]"
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    for number, text in enumerate(pool.map(ask, range(48))):
        assert text == (None if number % 3 == 0 else alone[2 + 3 * (number % 2)])
    wait_for(lambda: server.metrics()["state_pool_usage_ratio"] == 0)
    metrics = server.metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    length, abort = (metrics[f'request_success_total{{finished_reason="{name}"}}'] for name in ("length", "abort"))
    assert length + abort == 2 + 48
    assert abort == len(server.records("abort")) > 0
