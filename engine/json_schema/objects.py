"""Objects of a schema: names that it lists, patterns of names and numbers of properties.

llguidance keeps the names that a schema lists distinct, and of others only those apart from the listed ones. So names
that are few are listed here, and a number of properties to reach is asked of listed names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

from lattice_serve.engine.json_schema.annotations import Schema
from lattice_serve.engine.json_schema.disjoint import TYPES, types_of
from lattice_serve.engine.json_schema.keywords import APPLICATORS, as_map, count
from lattice_serve.engine.json_schema.patterns import UUID

if TYPE_CHECKING:
    from lattice_serve.engine.json_schema.rewriter import Place, Rewriter

_NO_OBJECT: Schema = {"type": sorted(TYPES - {"object"})}
_MAX_CASES = 256
"""Choices of optional properties among which a number of them is kept."""


def rewrite_object(rewriter: Rewriter, schema: dict[str, Any], place: Place) -> tuple[dict[str, Any], list[Schema]]:
    """Returns the keywords of an object's properties, rewritten, and schemas that apply beside them."""
    written = _Object(rewriter, schema, place)
    written.list_names()
    cases = written.cases()
    return written.keywords(), [] if cases is None else [{"anyOf": cases} if cases else _NO_OBJECT]


class _Object:
    def __init__(self, rewriter: Rewriter, schema: dict[str, Any], place: Place) -> None:
        self._rewriter, self._place = rewriter, place
        self._properties = {
            name: rewriter.schema(part, place.at("properties", name))
            for name, part in as_map(schema, "properties", place).items()
        }
        self._patterns = {
            pattern: rewriter.schema(part, place.at("patternProperties", pattern))
            for pattern, part in as_map(schema, "patternProperties", place).items()
        }
        self._others: Schema = True
        if "additionalProperties" in schema:
            self._others = rewriter.schema(schema["additionalProperties"], place.at("additionalProperties"))
        elif "unevaluatedProperties" in schema:
            self._others = self._unevaluated(schema)
        self._names = schema.get("propertyNames", True)
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise place.error("required is no list of names")
        self._required = list(dict.fromkeys(required))
        self._least = count(schema, "minProperties", place) or 0
        self._most = count(schema, "maxProperties", place)

    def keywords(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, parts in ("properties", self._properties), ("patternProperties", self._patterns):
            if parts:
                result[key] = parts
        if self._others is not True:
            result["additionalProperties"] = self._others
        if self._required:
            result["required"] = self._required
        return result

    def list_names(self) -> None:
        """Put names into `properties` that patterns or `propertyNames` admit a few of."""
        for pattern, part in list(self._patterns.items()):
            names = self._rewriter.patterns.texts(pattern)
            if names is not None:
                del self._patterns[pattern]
                for name in names:
                    self._properties[name] = _both(self._properties.get(name, True), part)
        admitted = self._admitted(self._names, self._place.at("propertyNames"))
        if admitted is None:
            return
        if self._patterns:
            raise self._place.error("propertyNames and patternProperties cannot be enforced together: give one of them")
        names = self._rewriter.patterns.texts(admitted) if isinstance(admitted, str) else admitted
        if names is None:
            self._keep_to(str(admitted))
            return
        self._properties = {name: part if name in names else False for name, part in self._properties.items()} | {
            name: self._others for name in names if name not in self._properties
        }
        self._others = False

    def _keep_to(self, pattern: str) -> None:
        """Keep names to a pattern that matches many."""
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise self._place.error(f"propertyNames has a pattern that cannot be read: {error}") from None
        matching = [name for name in self._properties if expression.search(name)]
        if matching and self._others is not True:
            raise self._place.error(
                "propertyNames cannot be enforced beside properties and additionalProperties: leave it out"
            )
        self._properties = {name: part if name in matching else False for name, part in self._properties.items()}
        self._patterns, self._others = {pattern: self._others}, False

    def _admitted(self, schema: Any, place: Place) -> list[str] | str | None:
        """Returns the names that match a schema, or their pattern; None for all."""
        schema, place = self._rewriter.resolve(schema, place)
        if schema is True or schema == {}:
            return None
        if schema is False or "string" not in types_of(schema):
            return []
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return list(dict.fromkeys(value for value in values if isinstance(value, str)))
        limits = schema.keys() & {"pattern", "minLength", "maxLength"}
        if schema.keys() & APPLICATORS or ("pattern" in limits and len(limits) > 1):
            raise place.error("names can be kept to an enum, to a pattern or to lengths alone: give one of these")
        if "pattern" in limits:
            return str(schema["pattern"])
        if limits:
            longest = count(schema, "maxLength", place)
            return rf"^[\s\S]{{{count(schema, 'minLength', place) or 0},{'' if longest is None else longest}}}$"
        return UUID if schema.get("format") == "uuid" else None

    def _unevaluated(self, schema: dict[str, Any]) -> Schema:
        """Returns the schema of the properties that no other keyword has looked at."""
        part = self._rewriter.schema(schema["unevaluatedProperties"], self._place.at("unevaluatedProperties"))
        if part is True or not APPLICATORS & schema.keys():
            return part
        names = self._evaluated(schema, self._place)
        if part is not False or names is None:
            raise self._place.error("unevaluatedProperties cannot be enforced beside anyOf and the like: leave it out")
        for name in names:
            self._properties.setdefault(name, True)
        return False

    def _evaluated(self, schema: Any, place: Place) -> list[str] | None:
        """Returns the names of properties in a schema and all of its allOf; None where it is not as simple as that."""
        schema, place = self._rewriter.resolve(schema, place)
        if isinstance(schema, bool):
            return []
        if (APPLICATORS - {"allOf"}) & schema.keys() or {"additionalProperties", "patternProperties"} & schema.keys():
            return None
        names = list(as_map(schema, "properties", place))
        for part in schema.get("allOf", []):
            more = self._evaluated(part, place)
            if more is None:
                return None
            names += more
        return names

    def cases(self) -> list[Schema] | None:
        """Returns schemas one of which holds where the number of properties is as asked; None where it always is."""
        if self._least <= len(self._required) and self._most is None:
            return None
        optional = [name for name, part in self._properties.items() if part is not False and name not in self._required]
        is_open = self._others is not False or any(part is not False for part in self._patterns.values())
        missing = max(0, self._least - len(self._required))
        room = None if self._most is None else self._most - len(self._required)
        if not is_open and room is not None and room >= len(optional):
            room = None
        if missing == 0 and room is None:
            return None
        if room is not None and missing > room:
            return []
        if not is_open:
            return self._choices(optional, missing, room)
        limits = {"minProperties": self._least or None, "maxProperties": self._most}
        counted = {key: value for key, value in limits.items() if value is not None}
        most = len(optional) if room is None else min(room, len(optional))
        cases: list[Schema] = []
        for size in range(max(0, missing - 1), most + 1):
            # Of the names that are left open, one at most has to come: a second one could be the same.
            self._check(len(cases) + comb(len(optional), size))
            if room is None and size >= missing:
                cases += self._choices(optional, missing, None)
                break
            cases += [_case(chosen, optional, chosen) | counted for chosen in combinations(optional, size)]
        if not cases:
            raise self._place.error(
                f"minProperties asks for {missing} names that the schema leaves open, which could be the same: list "
                "names in properties, or ask for one at most"
            )
        return cases

    def _choices(self, optional: list[str], missing: int, room: int | None) -> list[Schema]:
        """Returns the ways to require `missing` of the optional properties, and to allow `room` of them."""
        size = len(optional) if room is None else room
        self._check(comb(len(optional), size) * comb(size, missing))
        return [
            _case(chosen, optional, allowed)
            for allowed in combinations(optional, size)
            for chosen in combinations(allowed, missing)
        ]

    def _check(self, cases: int) -> None:
        if cases > _MAX_CASES:
            raise self._place.error(
                "minProperties and maxProperties leave too many choices of optional properties: require more of them"
            )


def _case(required: Sequence[str], optional: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    case: dict[str, Any] = {}
    if required:
        case["required"] = list(required)
    if left_out := {name: False for name in optional if name not in allowed}:
        case["properties"] = left_out
    return case


def _both(first: Schema, second: Schema) -> Schema:
    if first is True or second is False:
        return second
    return first if second is True or first is False else {"allOf": [first, second]}
