"""Schemas that no value matches both of: among such, oneOf is anyOf."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lattice_serve.engine.json_schema.annotations import Schema

if TYPE_CHECKING:
    from lattice_serve.engine.json_schema.rewriter import Place, Rewriter

TYPES = frozenset(["array", "boolean", "null", "number", "object", "string"])
_MAX_DEPTH = 4


def are_disjoint(rewriter: Rewriter, first: tuple[Schema, Place], second: tuple[Schema, Place], depth: int = 0) -> bool:
    """Whether this is easily seen: by types, constants, or a property that both require."""
    a, place_a = rewriter.resolve(*first)
    b, place_b = rewriter.resolve(*second)
    if a is False or b is False:
        return True
    if not isinstance(a, dict) or not isinstance(b, dict) or depth > _MAX_DEPTH:
        return False
    types = types_of(a) & types_of(b)
    if not types:
        return True
    constants = constants_of(a), constants_of(b)
    if None not in constants and not set(constants[0] or ()) & set(constants[1] or ()):
        return True
    for parts, place, other in (a, place_a, (b, place_b)), (b, place_b, (a, place_a)):
        if any(_all(rewriter, parts.get(key), place, other, depth) for key in ("anyOf", "oneOf")):
            return True
        if any(are_disjoint(rewriter, (part, place), other, depth + 1) for part in _list(parts.get("allOf"))):
            return True
    return types == {"object"} and any(
        are_disjoint(rewriter, (a["properties"][name], place_a), (b["properties"][name], place_b), depth + 1)
        for name in _required_properties(a) & _required_properties(b)
    )


def types_of(schema: dict[str, Any]) -> set[str]:
    """Returns the types of values that a schema's own `type` and constants admit; an integer is a number."""
    given = schema.get("type", list(TYPES))
    types = {given} if isinstance(given, str) else {name for name in _list(given) if isinstance(name, str)}
    types = {"number" if name == "integer" else name for name in types}
    constants = constants_of(schema)
    return types if constants is None else types & {_type(json.loads(constant)) for constant in constants}


def constants_of(schema: dict[str, Any]) -> list[str] | None:
    """Returns the values of `const` and `enum` as JSON, equal for equal ones; None where there are neither."""
    if "const" in schema:
        return [_json(schema["const"])]
    if "enum" in schema:
        return [_json(value) for value in _list(schema["enum"])]
    return None


def _all(rewriter: Rewriter, options: Any, place: Place, other: tuple[Schema, Place], depth: int) -> bool:
    options = _list(options)
    return bool(options) and all(are_disjoint(rewriter, (option, place), other, depth + 1) for option in options)


def _required_properties(schema: dict[str, Any]) -> set[str]:
    properties, required = schema.get("properties"), _list(schema.get("required"))
    return {name for name in required if name in properties} if isinstance(properties, dict) else set()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _json(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, dict):
        return "object"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "number"
