"""A server whose engine is two processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.e2e.harness import RealServer, choices
from tests.e2e.test_lifecycle import QUESTION
from tests.server.harness import alive, wait_for


def worker(server: RealServer) -> int:
    pid = server.engine_pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_it_answers_comes_back_and_goes(start_server: Callable[..., RealServer]) -> None:
    server = start_server(tensor_parallel_size=2, dtype="float32", watchdog_seconds=4)
    answer = choices(server.chunks(QUESTION))
    killed = worker(server)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: server.http.get("/health").json()["restarts"] == 1, seconds=10)
    wait_for(lambda: server.http.get("/ready").status_code == 200, seconds=60)
    assert choices(server.chunks(QUESTION)) == answer
    stopped = worker(server)
    assert stopped != killed
    os.kill(stopped, signal.SIGSTOP)
    server.post(**QUESTION)
    wait_for(lambda: server.http.get("/health").json()["restarts"] == 2, seconds=10)
    wait_for(lambda: not alive(stopped), seconds=5)
    wait_for(lambda: server.http.get("/ready").status_code == 200, seconds=60)
    last = worker(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert not alive(last)
    assert "Traceback" not in server.log_path.read_text()
