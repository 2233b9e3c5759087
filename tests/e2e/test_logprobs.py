"""A log-probability for each token, on every route, whole and streamed, whatever of its text is held back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.harness import RealServer

TOOL: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
FIELDS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "stop": ["e", "at"]},
    {"seed": 3, "stop": ["<0x"], "include_stop_str_in_output": True},
    {"seed": 4, "stop_token_ids": list(range(100, 1000))},
    {"seed": 5, "logit_bias": {str(token_id): 20 for token_id in range(3, 259)}},
    {"seed": 6, "logit_bias": {"1": 100}},
]
"""Whose texts are held back at their ends, end soon, or are halves of characters."""


def streamed(server: RealServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = server.post(path, **body, stream=True).raise_for_status().text
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: str(fields["seed"]))
def test_completions(server: RealServer, fields: dict[str, Any]) -> None:
    body = {"prompt": ["It was", "She"], "n": 2, "logprobs": 1, "max_tokens": 12, **fields}
    answer = server.complete(**body)
    whole = [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]]
    assert sum(whole) == answer["usage"]["completion_tokens"] > 0
    counts = [0] * 4
    for chunk in streamed(server, "/v1/completions", body):
        [choice] = chunk["choices"]
        counts[choice["index"]] += len(choice["logprobs"]["tokens"])
    assert counts == whole


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: str(fields["seed"]))
def test_chats(server: RealServer, fields: dict[str, Any], tools: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "logprobs": True, "max_tokens": 12, **fields}
    if tools:
        body["tools"] = [{"type": "function", "function": TOOL}]
    answer = server.post("/v1/chat/completions", **body).raise_for_status().json()
    whole = [len(choice["logprobs"]["content"]) for choice in answer["choices"]]
    assert sum(whole) == answer["usage"]["completion_tokens"] > 0
    counts = [0] * 2
    for chunk in streamed(server, "/v1/chat/completions", body):
        [choice] = chunk["choices"]
        counts[choice["index"]] += len((choice["logprobs"] or {"content": []})["content"])
    assert counts == whole


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_responses(server: RealServer, seed: int, tools: bool) -> None:
    # Some of the texts end in half a character, or in a beginning of the next question, which is held back.
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "max_output_tokens": 12, "seed": seed}
    if tools:
        body["tools"] = [{"type": "function", **TOOL}]
    answer = server.post("/v1/responses", **body).raise_for_status().json()
    [message] = answer["output"]
    assert len(message["content"][0]["logprobs"]) == answer["usage"]["output_tokens"] > 0
    events = streamed(server, "/v1/responses", body)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert sum(len(event["logprobs"]) for event in deltas) == answer["usage"]["output_tokens"]
    assert "".join(event["delta"] for event in deltas) == message["content"][0]["text"]
    assert events[-1]["response"]["output"][0]["content"] == message["content"]
