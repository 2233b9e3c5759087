"""What requests may hold in the server, and what is told to those that would hold more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lattice_serve.engine.errors import InvalidParameter, Overloaded
from lattice_serve.server.joined import AnswerSize, JsonList, JsonText
from lattice_serve.server.memory import MemoryBudget, current
from tests.server.harness import ServerProcess


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("small"), request_memory=1 << 20) as process:
        yield process


def test_requests_share_a_budget_and_give_back_what_they_hold() -> None:
    budget = MemoryBudget(100)
    with budget.request() as first:
        first.hold(150)  # alone: nothing that fits another limit is refused
        with pytest.raises(Overloaded, match="150 bytes of the 100"), budget.request() as second:
            second.hold(1)
        with budget.request() as second:
            assert current() is second
        assert current() is first
    assert budget.used == 0
    with budget.request() as first, budget.request() as second:
        first.hold(60)
        second.hold(40)
        with pytest.raises(Overloaded):
            second.hold(1)
    assert budget.used == 0


def test_an_answer_has_a_longest() -> None:
    with MemoryBudget(800).request():
        size = AnswerSize("n")
        size.add(60)
        size.add(40)
        with pytest.raises(InvalidParameter, match="n: the answer has more than 100 bytes: ask for less"):
            size.add(1)


def test_json_that_is_held_is_what_would_be_made_at_once() -> None:
    text, items = JsonText(), JsonList()
    for part in ('a"\\', "", "é\n\0"):
        assert text.add(part) >= len(part)
    assert bytes(text.json) == b'"a\\"\\\\\xc3\xa9\\n\\u0000"'
    assert not items
    assert bytes(items.json) == b"[]"
    for each in ([], [1, None], [], ["x"]):
        items.add(each)
    assert items
    assert bytes(items.json) == b'[1,null,"x"]'


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [9] * 20_000, "prompt_logprobs": 20, "max_tokens": 0}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": [9] * 20_000, "echo": True, "logprobs": 20, "max_tokens": 0}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 100_000, "n": 2, "logprobs": 20}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 100_000, "n": 2}, "n"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 100_000}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100_000}, "max_tokens"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 100_000}, "max_output_tokens"),
    ],
)
def test_an_answer_that_would_be_too_long_is_a_400(
    small: ServerProcess, path: str, body: dict[str, object], param: str
) -> None:
    response = small.post(path, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "the answer has more than 131072 bytes" in error["message"]
    assert small.complete("b", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_long_prompt_that_cannot_be_answered_is_refused_before_it_is_run(small: ServerProcess) -> None:
    before = len(small.records("submit"))
    assert small.post(prompt=[9] * 20_000, prompt_logprobs=20, max_tokens=0).status_code == 400
    assert len(small.records("submit")) == before


def test_bodies_fill_the_budget(small: ServerProcess) -> None:
    with small.http.stream("POST", "/v1/completions", json={"prompt": "!slow" + " a" * 500_000, "stream": True}):
        response = small.post(prompt="a" * 100_000)
        assert response.status_code == 429
        assert "together" in response.json()["error"]["message"]
    assert small.complete("b", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_many_answers_to_a_long_prompt_send_it_once(server: ServerProcess) -> None:
    ids = list(range(300, 400))
    before = len(server.records("submit"))
    server.complete([ids, ids[:50]], n=3, max_tokens=1)
    assert [len(each["ids"]) for each in server.records("submit")[before:]] == [100] * 3 + [50] * 3
