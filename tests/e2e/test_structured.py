"""Structured output from the real server: answers that parse, and grammars that mean harm."""

from __future__ import annotations

import json
import re
import threading
import time
from itertools import pairwise
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.harness import RealServer

SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "word": {"enum": ["left", "right"]}},
    "required": ["sure", "word"],
    "additionalProperties": False,
}
HOSTILE: list[dict[str, Any]] = [
    {"guided_regex": "(a{1,1000}){1,1000}"},
    {"guided_regex": "a?" * 5000 + "a" * 5000},
    {"structured_outputs": {"regex": "(" * 30_000}},
    {"guided_json": {"type": "integer", "multipleOf": 1_000_003, "minimum": 1}},
    {"guided_grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(3000)) + 'a3000: "a"\n'},
    {"guided_grammar": "root ::= s\ns ::= s s s s | s s s | s s | [a-z] | [a-z] [a-z] |"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#"}}}},
]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_a_schema_by_the_openai_client(server: RealServer, fields: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.completions.create(model="lattice", prompt="a", max_tokens=400, n=4, seed=1, extra_body=fields)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.text)
        assert value.keys() == {"sure", "word"}
        assert isinstance(value["sure"], bool)
        assert value["word"] in ("left", "right")


def arguments(server: RealServer, *schemas: dict[str, Any], seed: int) -> list[tuple[str, Any]]:
    """The calls, of which one at least is made, of functions f0, f1, ... that have these schemas."""
    functions = [{"name": f"f{i}", "parameters": schema} for i, schema in enumerate(schemas)]
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 400,
        "seed": seed,
    }
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


KIDS = {
    "type": "object",
    "properties": {
        "v": {"type": "string", "maxLength": 3},
        "kids": {"type": "array", "items": {"$ref": "#"}, "minItems": 1, "maxItems": 1},
    },
    "required": ["v"],
    "additionalProperties": False,
}
SPAN = {
    "type": "object",
    "properties": {"start": {"type": "integer", "minimum": 0, "maximum": 9}, "end": {"$ref": "#/properties/start"}},
    "required": ["start", "end"],
    "additionalProperties": False,
}


def item(definition: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"item": {"$ref": "#/$defs/Item"}},
        "required": ["item"],
        "additionalProperties": False,
        "$defs": {"Item": definition},
    }


@pytest.mark.parametrize(
    "schemas",
    [(KIDS,), (SPAN,), (item({"type": "boolean"}), item({"enum": ["a", "b"]})), (KIDS, SPAN, item({"type": "null"}))],
    ids=["the root", "a pointer", "definitions of one name", "several"],
)
def test_a_tools_schema_is_a_document_of_its_own(server: RealServer, schemas: tuple[dict[str, Any], ...]) -> None:
    for seed in range(3):
        for name, value in arguments(server, *schemas, seed=seed):
            jsonschema.validate(value, schemas[int(name[1:])])


def test_annotations_do_not_count(server: RealServer) -> None:
    described = {**SPAN, "description": "x" * 66_000}
    assert arguments(server, described, seed=0)
    assert arguments(server, *[{**SPAN, "title": "x" * 600}] * 128, seed=0)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_grammar": 'root ::= "<" [a-c]{1,3} ">"'}, "<[a-c]{1,3}>"),
    ],
    ids=str,
)
def test_streams(server: RealServer, fields: dict[str, Any], pattern: str) -> None:
    chunks = server.chunks({"prompt": "a", "max_tokens": 50, "seed": 3, **fields})
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert re.fullmatch(pattern, text)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_hostile_grammars_are_refused_while_a_stream_goes_on(server: RealServer) -> None:
    server.complete("a", max_tokens=3, guided_regex="a")  # The process that tries grammars has started.
    times: list[float] = []
    done = threading.Event()

    def read() -> None:
        body = {"prompt": "a", "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    times.append(time.monotonic())
                if done.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    pid = server.engine_pid
    try:
        for fields in HOSTILE:
            began = time.monotonic()
            response = server.post(prompt="a", max_tokens=20, stream=True, **fields)
            # A second of processor time at most, on a machine that may be busy.
            assert time.monotonic() - began < 5, fields
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == next(iter(fields))
    finally:
        done.set()
        reader.join()
    # Were the engine to wait for a grammar, nearly all of the time would be gaps. Some are the machine's own.
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert sum(gap for gap in gaps if gap > 0.1) < sum(gaps) / 2
    assert len(times) > 50
    assert server.engine_pid == pid
