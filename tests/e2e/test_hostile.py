"""Bodies that mean harm, or no good: each is refused by its own fault, and nothing else notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.harness import RealServer, choices

QUESTION: dict[str, Any] = {"prompt": "Call me Ishmael.", "max_tokens": 30, "seed": 5, "logprobs": 2}


@pytest.fixture
def unharmed(server: RealServer) -> Iterator[None]:
    """The same engine gives the same answer before and after."""
    before, pid = choices(server.chunks(QUESTION)), server.engine_pid
    yield
    assert choices(server.chunks(QUESTION)) == before
    assert server.engine_pid == pid
    assert server.http.get("/health").json()["restarts"] == 0
    assert server.is_idle()


def _hundred_megabytes() -> Iterator[bytes]:
    yield b'{"prompt": "'
    for _ in range(100):
        yield b"a" * 1_000_000


@pytest.mark.usefixtures("unharmed")
def test_bodies_that_are_refused(server: RealServer) -> None:
    bodies: list[tuple[bytes | Callable[[], Iterator[bytes]], int]] = [
        (b"", 400),
        (b'{"prompt": "a"', 400),
        (b'{"prompt": ' + b"[" * 200_000, 400),
        (b'{"prompt": "a", "max_tokens": "8"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e400}', 400),
        (b'{"prompt": "a", "repetition_penalty": 0}', 400),
        (b'{"prompt": "a", "logit_bias": {"4096": 1}}', 400),
        (b'{"prompt": "a", "n": 1e9}', 400),
        (b'{"prompt": [4096]}', 400),
        (b'{"prompt": [[1], [-1]]}', 400),
        (b'{"prompt": ""}', 400),
        (b'{"prompt": []}', 400),
        (b'{"prompt": [[]]}', 400),
        (b'{"prompt": "a", "max_tokens": 0}', 400),
        (b'{"prompt": "a", "model": "gpt-4"}', 404),
        (b'{"prompt": "' + b"a" * 100_000_000 + b'"}', 413),
        (_hundred_megabytes, 413),
    ]
    for body, status in bodies:
        content = body if isinstance(body, bytes) else body()
        response = server.http.post("/v1/completions", content=content)
        name = body[:60] if isinstance(body, bytes) else body
        assert response.status_code == status, name
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, name
        assert error["code"] == status, name


@pytest.mark.usefixtures("unharmed")
def test_chats_that_are_refused(server: RealServer) -> None:
    hello = {"role": "user", "content": "a"}
    deep: Any = "a"
    for _ in range(100):
        deep = {"allOf": [deep]}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    bodies: list[dict[str, Any]] = [
        {"messages": []},
        {"messages": [hello] * 20_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, 5]}]},
        {"messages": [hello], "max_tokens": 0},
        {"messages": [hello], "tools": [tool] * 200},
        {"messages": [hello], "tools": [tool], "tool_choice": "required"},
        {"messages": [hello], "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        {"messages": [hello], "chat_template": "{% for a in range(9999999) %}{% endfor %}"},
    ]
    for body in bodies:
        response = server.post("/v1/chat/completions", **body)
        assert response.status_code == 400, str(body)[:200]
        assert response.json()["error"]["code"] == 400


@pytest.mark.usefixtures("unharmed")
def test_chats_of_any_text_are_answered(server: RealServer) -> None:
    for content in ("", "\0\ufdd0<|endoftext|>{{ 1 }}{% x %}", "\nAssistant: Yes\nUser:", "a" * 1_000_000):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
        answer = server.post("/v1/chat/completions", **body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] > 5


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 5e-324},
        {"temperature": 100, "min_p": 1},
        {"top_p": 5e-324, "top_k": 2**31 - 1},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": 2},
        {"logit_bias": {str(token_id): -100 for token_id in range(1024)}},
        {"stop_token_ids": list(range(1024)), "min_tokens": 8, "logprobs": 20},
        {"stop": ["e" * 256] * 16},
        {"seed": 2**63 - 1, "n": 3},
        {"priority": -(2**31) + 1},
        {"max_tokens": 2**31 - 1, "stop": ["e", "a", "o"]},
        {"prompt": "\x00\ufffd\U0001f600", "echo": True, "logprobs": 1},
        {"prompt": [0, 1, 2, 3, 4095]},
        {"max_tokens": 0, "echo": True},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_extremes_that_are_answered(server: RealServer, fields: dict[str, Any]) -> None:
    answer = server.complete(**({"prompt": "a", "max_tokens": 8, "ignore_eos": True} | fields))
    assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"])
