"""The keywords of JSON Schema that values are held to, and what their own values may be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lattice_serve.engine.json_schema.numbers import BOUNDS

if TYPE_CHECKING:
    from lattice_serve.engine.json_schema.rewriter import Place

COPIED = frozenset(["const", "enum", "multipleOf", "type"])
"""What llguidance takes as it is."""
COUNTS = frozenset(["maxItems", "maxLength", "minItems", "minLength"])
REFERENCES = frozenset(["$dynamicRef", "$recursiveRef", "$ref"])
APPLICATORS = REFERENCES | {"allOf", "anyOf", "dependentSchemas", "else", "if", "not", "oneOf", "then"}
"""What applies other schemas to the same value."""
OBJECT_KEYWORDS = frozenset(
    [
        "additionalProperties",
        "maxProperties",
        "minProperties",
        "patternProperties",
        "properties",
        "propertyNames",
        "required",
        "unevaluatedProperties",
    ]
)
_ARRAY_KEYWORDS = frozenset(["additionalItems", "contains", "items", "prefixItems", "unevaluatedItems", "uniqueItems"])
ASSERTIONS = (
    APPLICATORS | COPIED | COUNTS | BOUNDS | OBJECT_KEYWORDS | _ARRAY_KEYWORDS | {"dependencies", "dependentRequired"}
) | {"pattern"}
"""All that a value may fail by."""

_MOST = 2**31 - 1
"""Longer than any answer, and what llguidance's regular expressions count to."""


def count(schema: dict[str, Any], key: str, place: Place) -> int | None:
    """Returns the value of a keyword that counts; None where it is absent."""
    value = schema.get(key)
    if value is None:
        return None
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not is_count or value != int(value):
        raise place.error(f"{key} is {str(value)[:50]!r}: give an integer from 0")
    return min(int(value), _MOST)


def as_map(schema: dict[str, Any], key: str, place: Place) -> dict[str, Any]:
    """Returns the value of a keyword that is an object, empty where it is absent."""
    value = schema.get(key, {})
    if not isinstance(value, dict):
        raise place.error(f"{key} is no object")
    return value


def as_list(value: Any) -> list[Any]:
    """Returns a list itself, another value as its only one, and none for null."""
    return value if isinstance(value, list) else [] if value is None else [value]
