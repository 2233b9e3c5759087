"""The fields that ask for structured output, as the grammar that the engine is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.sampling import MAX_GRAMMAR_BYTES, Grammar
from lattice_serve.server.schemas.completions import CompletionRequest

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


def grammar(**fields: Any) -> Grammar | None:
    request = CompletionRequest.parse(json.dumps({"prompt": "a", **fields}).encode())
    assert request.sampling(0).grammar == request.grammar
    return request.grammar


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": None, "guided_json": None, "guided_regex": None},
    ],
    ids=str,
)
def test_free_text(fields: dict[str, Any]) -> None:
    assert grammar(**fields) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar.json("response_format")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            Grammar.json_schema(SCHEMA, "response_format"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar.json_schema(SCHEMA, "structured_outputs")),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            Grammar.json_schema(json.dumps(SCHEMA), "structured_outputs"),
        ),
        ({"structured_outputs": {"json_object": True}}, Grammar.json("structured_outputs")),
        ({"structured_outputs": {"regex": "a+"}}, Grammar.regex("a+", "structured_outputs")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar.choice(["a", "b"], "structured_outputs")),
        ({"structured_outputs": {"grammar": "root ::= x"}}, Grammar.ebnf("root ::= x", "structured_outputs")),
        ({"guided_json": SCHEMA}, Grammar.json_schema(SCHEMA, "guided_json")),
        ({"guided_regex": "a+"}, Grammar.regex("a+", "guided_regex")),
        ({"guided_choice": ["a"]}, Grammar.choice(["a"], "guided_choice")),
        ({"guided_grammar": "start: x"}, Grammar.ebnf("start: x", "guided_grammar")),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, Grammar.regex("a", "guided_regex")),
    ],
    ids=str,
)
def test_each_field(fields: dict[str, Any], expected: Grammar) -> None:
    assert grammar(**fields) == expected


def test_properties_keep_their_order() -> None:
    given = grammar(guided_json=SCHEMA)
    assert given is not None
    assert list(json.loads(given.text)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x", "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "guided_regex"),
    ],
    ids=str,
)
def test_what_is_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameter, match=param) as caught:
        grammar(**fields)
    assert caught.value.param == param
