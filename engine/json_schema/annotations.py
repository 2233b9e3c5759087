"""JSON schemas as documents: which of their values are schemas, and which say nothing about an answer."""

from __future__ import annotations

from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any] | bool

MAX_SCHEMAS = 25_000
"""Schemas within one. OpenAI's limit is 5,000 properties."""
MAX_DEPTH = 100
"""Schemas that one lies in. OpenAI's limit is 10 objects."""

FORMATS = frozenset(
    ["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"],
)
"""The formats that answers keep to."""

_ANNOTATIONS = frozenset(
    [
        "$comment",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "default",
        "deprecated",
        "description",
        "example",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    ]
)
_SCHEMA = frozenset(
    [
        "additionalItems",
        "additionalProperties",
        "contains",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    ]
)
_LIST = frozenset(["allOf", "anyOf", "items", "oneOf", "prefixItems"])
_MAP = frozenset(["$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"])


def without_annotations(schema: Any, *, strict: bool = False) -> Any:
    """Returns a copy that admits the same answers, without titles, descriptions, examples and their like.

    Raises `ValueError` for a schema that is too large; with `strict`, for a format that cannot be enforced, too.
    """
    return _Copy(strict).schema(schema, "#", 0)


class _Copy:
    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._schemas = 0

    def schema(self, schema: Any, pointer: str, depth: int) -> Any:
        if not isinstance(schema, dict):
            return schema
        self._schemas += 1
        if self._schemas > MAX_SCHEMAS:
            raise ValueError(f"it has more than {MAX_SCHEMAS} schemas: give fewer")
        if depth > MAX_DEPTH:
            raise ValueError(f"its schemas nest more than {MAX_DEPTH} deep: give $defs and references to them")
        if self._strict and schema.get("format", "date") not in FORMATS:
            raise ValueError(
                f"{pointer} has the format {str(schema['format'])[:50]!r}, which cannot be enforced: leave it out, or "
                f"strict, or give one of {', '.join(sorted(FORMATS))}"
            )
        copy = {}
        for key, value in schema.items():
            if key in _ANNOTATIONS:
                continue
            place = f"{pointer}/{key}"
            if key in _SCHEMA and isinstance(value, dict):
                copy[key] = self.schema(value, place, depth + 1)
            elif key in _MAP and isinstance(value, dict):
                copy[key] = {
                    name: self.schema(part, f"{place}/{escape(name)}", depth + 1) for name, part in value.items()
                }
            elif key in _LIST and isinstance(value, list):
                copy[key] = [self.schema(part, f"{place}/{i}", depth + 1) for i, part in enumerate(value)]
            else:
                copy[key] = value
        return copy


def escape(name: str) -> str:
    """Returns a name as a JSON pointer holds it."""
    return name.replace("~", "~0").replace("/", "~1")
