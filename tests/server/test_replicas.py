"""Several engines behind one server: who gets what, and that the death of one is not felt by the others."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from tests.server.harness import ServerProcess, wait_for


@pytest.fixture
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    server = start_server(replicas=2, max_rows=4, max_waiting=2)
    wait_for(lambda: server.http.get("/ready").json().get("rows") == 8)
    return server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def work(server: ServerProcess) -> Counter[int]:
    """Sequences that each engine was given, by its process."""
    return Counter(record["pid"] for record in server.records("submit"))


def test_the_least_loaded_engine_is_next(server: ServerProcess, pool: ThreadPoolExecutor) -> None:
    running = [pool.submit(server.post, prompt="!slow", max_tokens=20) for _ in range(6)]
    wait_for(lambda: sum(work(server).values()) == 6)
    assert sorted(work(server).values()) == [3, 3]
    assert {future.result().status_code for future in running} == {200}


def test_answers_to_one_prompt_are_one_engines(server: ServerProcess) -> None:
    assert len(server.complete(["a", "b"], n=2)["choices"]) == 4
    assert sorted(work(server).values()) == [2, 2]
    # What does not fit there goes to the other one.
    assert len(server.complete("c", n=8)["choices"]) == 8
    assert sum(work(server).values()) == 12
    assert max(work(server).values()) == 8


def test_a_conversation_stays_where_it_was_read(
    start_server: Callable[..., ServerProcess], pool: ThreadPoolExecutor
) -> None:
    server = start_server(replicas=2, max_rows=16)
    wait_for(lambda: server.http.get("/ready").json().get("rows") == 32)
    running: list[Future[httpx.Response]] = []

    def given(prompt: str) -> int:
        """Who works on it."""
        count = len(server.records("submit")) + 1
        running.append(pool.submit(server.post, prompt=prompt, max_tokens=30))
        wait_for(lambda: len(server.records("submit")) == count)
        return int(server.records("submit")[-1]["pid"])

    told = "It was a dark and stormy night, and nobody knew what was to come of it. " * 3
    # Two more than the other one has, an eighth of its rows, are no reason to read it again; three are.
    first, *turns = [given(f"{told}User: !slow {turn}") for turn in range(6)]
    (second,) = set(work(server)) - {first}
    assert turns == [first, first, second, second, second]
    assert given(told) == second, "not the first of equals, which has read it before"
    assert given("!slow, of another conversation") == first
    assert {future.result().status_code for future in running} == {200}


def test_the_capacity_is_that_of_all(server: ServerProcess, pool: ThreadPoolExecutor) -> None:
    running = [pool.submit(server.post, prompt="!slow", max_tokens=20) for _ in range(12)]
    wait_for(lambda: sum(work(server).values()) == 12)
    assert server.post(prompt="a").status_code == 429
    assert {future.result().status_code for future in running} == {200}


def test_one_dies_and_the_other_goes_on(server: ServerProcess, pool: ThreadPoolExecutor) -> None:
    running = [pool.submit(server.post, prompt="!slow", max_tokens=30) for _ in range(4)]
    wait_for(lambda: sum(work(server).values()) == 4)
    first = server.records("submit")[0]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(server.http.get("/ready").json()["engines"]) == 1)
    health = server.http.get("/health").json()
    assert health["engine"] == "ready"
    assert sorted(engine["state"] for engine in health["engines"]) == ["ready", "restarting"]
    assert server.complete("while one is away")
    assert sorted(future.result().status_code for future in running) == [200, 200, 500, 500]
    wait_for(lambda: len(server.http.get("/ready").json()["engines"]) == 2)
    assert server.http.get("/health").json()["restarts"] == 1
    for _ in range(2):
        assert server.complete("both are back")
    assert first not in {record["pid"] for record in server.records("start")[-1:]}


def test_metrics_tell_them_apart(server: ServerProcess, pool: ThreadPoolExecutor) -> None:
    for future in [pool.submit(server.post, prompt="!slow", max_tokens=5) for _ in range(4)]:
        assert future.result().status_code == 200
    text = server.http.get("/metrics").text
    generated = re.findall(r'^lattice:generation_tokens_total\{engine="(\d)",.*\} (\S+)$', text, re.MULTILINE)
    assert sorted((engine, float(value)) for engine, value in generated) == [("0", 10), ("1", 10)]
    assert text.count("# TYPE lattice:generation_tokens_total ") == 1
    assert re.findall(r'^lattice:engine_up\{engine="\d",.*\} (\S+)$', text, re.MULTILINE) == ["1.0", "1.0"]
