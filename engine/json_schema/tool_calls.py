"""Calls of functions: a JSON list of names and arguments, the arguments by the schema of each."""

from __future__ import annotations

from typing import Any

from lattice_serve.engine.json_schema.annotations import Schema
from lattice_serve.engine.json_schema.rewriter import Rewriter


def rewrite_calls(rewriter: Rewriter, functions: list[dict[str, Any]], one: bool) -> Schema:
    """Returns the schema of a list of calls, of a single one with `one`. functions: of each `name` and `parameters`."""
    calls = []
    for function in functions:
        name = function["name"]
        try:
            parameters = rewriter.document(function["parameters"])
        except ValueError as error:
            raise ValueError(f"the parameters of {name}: {error}") from None
        if parameters is False:
            raise ValueError(f"the parameters of {name} admit no arguments")
        properties = {"name": {"const": name}, "arguments": _object(parameters)}
        required = list(properties)
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **({"maxItems": 1} if one else {})}


def _object(schema: Schema) -> dict[str, Any]:
    if isinstance(schema, bool):
        return {"type": "object"}
    return schema if schema.get("type") == "object" else {"allOf": [{"type": "object"}, schema]}
