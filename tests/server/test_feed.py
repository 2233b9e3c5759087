"""Requests of more sequences than may run at once: fed to the engines in parts."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.harness import ServerProcess, wait_for

ROWS = 2
WINDOW = 4


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """As many may run or wait as three requests with all that they may have at once, and one place."""
    folder = tmp_path_factory.mktemp("small")
    with ServerProcess(folder, max_rows=ROWS, max_waiting=3 * WINDOW + 1 - ROWS) as server:
        yield server


@pytest.fixture
def small(started: ServerProcess) -> ServerProcess:
    """The same for each test, of which the engine has written nothing down."""
    wait_for(lambda: live(started) == 0)
    started.record_path.write_text("")
    return started


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def live(server: ServerProcess) -> int:
    metrics = server.metrics()
    return int(metrics["num_requests_running"] + metrics["num_requests_waiting"])


@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_of_a_long_list_is_answered_in_its_place(small: ServerProcess, stream: bool) -> None:
    prompts = [f"prompt {index}" for index in range(50)]
    alone = [small.complete(prompt, seed=1, max_tokens=3)["choices"][0]["text"] for prompt in prompts[::10]]
    if stream:
        *chunks, done = small.stream(prompts, seed=1, max_tokens=3)
        assert done == "[DONE]"
        texts = ["" for _ in prompts]
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        choices = small.complete(prompts, seed=1, max_tokens=3)["choices"]
        assert [choice["index"] for choice in choices] == list(range(50))
        texts = [choice["text"] for choice in choices]
    assert texts[::10] == alone
    assert all(texts)


def test_it_never_has_more_places_than_its_own_and_others_come_in(
    small: ServerProcess, pool: ThreadPoolExecutor
) -> None:
    lists = [pool.submit(small.post, prompt=["!slow"] * 12, n=2, max_tokens=2) for _ in range(3)]
    wait_for(lambda: len(small.records("submit")) == 3 * WINDOW)
    # All places but one are taken, though fewer sequences may be live for a moment.
    most = 0
    answered = 0
    while not all(future.done() for future in lists):
        response = small.post(prompt="a", max_tokens=1)
        assert response.status_code == 200, response.text
        answered += 1
        most = max(most, live(small))
    assert answered > 1
    assert most <= 3 * WINDOW
    for future in lists:
        assert len(future.result().json()["choices"]) == 24


def test_a_queue_that_is_full_takes_no_list(small: ServerProcess, pool: ThreadPoolExecutor) -> None:
    lists = [pool.submit(small.post, prompt=["!slow"] * 12, max_tokens=2) for _ in range(3)]
    wait_for(lambda: len(small.records("submit")) == 3 * WINDOW)
    for _ in range(5):
        response = small.post(prompt=["a"] * 100)
        assert response.status_code == 429
        assert response.headers["retry-after"]
    assert {future.result().status_code for future in lists} == {200}
    assert small.post(prompt=["a"] * 100, max_tokens=1).status_code == 200


def test_a_client_that_leaves_takes_all_of_its_list_along(small: ServerProcess) -> None:
    body = json.dumps({"prompt": ["!stall"] * 100})
    with socket.create_connection(("127.0.0.1", httpx.URL(small.url).port or 0)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        wait_for(lambda: len(small.records("submit")) == WINDOW)
    wait_for(lambda: len(small.records("abort")) == WINDOW)
    assert small.complete("a")
    assert len(small.records("submit")) == WINDOW + 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_is_that_of_the_whole_list(small: ServerProcess, stream: bool) -> None:
    # Each of them takes some 0.1 s, all of them 5.
    response = small.post(prompt=["!slow"] * 100, max_tokens=2, timeout=0.4, stream=stream)
    if stream:
        assert json.loads(response.text.split("data: ")[-1])["error"]["code"] == 408
    else:
        assert response.status_code == 408
    wait_for(lambda: live(small) == 0)
    submitted = len(small.records("submit"))
    assert WINDOW <= submitted < 50
    assert small.complete("a")
    assert len(small.records("submit")) == submitted + 1


def test_a_failure_late_in_a_list_ends_it(small: ServerProcess) -> None:
    response = small.post(prompt=[*["a"] * 30, "!fail NumericalError", *["a"] * 200], max_tokens=1)
    assert response.status_code == 500
    wait_for(lambda: live(small) == 0)
    assert len(small.records("submit")) < 150, "what follows it is not begun"


def test_an_engine_that_dies_ends_a_list(small: ServerProcess) -> None:
    response = small.post(prompt=[*["a"] * 10, "!exit", *["a"] * 30], max_tokens=1)
    assert response.status_code in (500, 503)
    wait_for(lambda: small.http.get("/ready").status_code == 200)
    assert len(small.complete(["a"] * 30, max_tokens=1)["choices"]) == 30


def test_lists_of_texts_too(small: ServerProcess) -> None:
    texts = [[5] * (1 + index % 3) for index in range(40)]
    data = small.post("/v1/embeddings", input=texts).json()["data"]
    assert [vector["index"] for vector in data] == list(range(40))
