"""JSON schemas, each a document of its own, as one schema that llguidance takes.

llguidance knows no unknown format, no `not` and no `propertyNames`, and refuses `uniqueItems: false`. What says nothing
about an answer is left out here, and what can be said in its terms is. An answer to the schema that results is always
one to the schema given; where the two differ, docs/conformance.md says how. The rest is refused: `ValueError`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT3, DRAFT4, DRAFT6, DRAFT7, DRAFT201909, DRAFT202012, specification_with

from lattice_serve.engine.json_schema.annotations import FORMATS, Schema, escape
from lattice_serve.engine.json_schema.disjoint import TYPES, are_disjoint, types_of
from lattice_serve.engine.json_schema.keywords import (
    APPLICATORS,
    ASSERTIONS,
    COPIED,
    COUNTS,
    OBJECT_KEYWORDS,
    REFERENCES,
    as_list,
    as_map,
    count,
)
from lattice_serve.engine.json_schema.numbers import BOUNDS, bounds
from lattice_serve.engine.json_schema.objects import rewrite_object
from lattice_serve.engine.json_schema.patterns import Patterns, without_look_aheads

_OLDEST = (DRAFT3, DRAFT4)
_OLD = (*_OLDEST, DRAFT6, DRAFT7)
"""In these a reference stands alone, whatever is beside it."""
_MAX_REFERENCES = 100


@dataclass(frozen=True, slots=True)
class Place:
    """Where a schema is: `resolver` looks references up, by the rules of the draft, and errors name `pointer`."""

    resolver: Any
    draft: Any
    pointer: str = "#"

    def at(self, *path: str | int) -> Place:
        return replace(self, pointer="/".join([self.pointer, *(escape(str(part)) for part in path)]))

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.pointer}: {message}")

    def inside(self, schema: dict[str, Any]) -> Place:
        """Returns the place within `schema`, which may change what references are relative to."""
        identifier = schema.get("id" if self.draft in _OLDEST else "$id")
        if not isinstance(identifier, str) or self.pointer == "#":
            return self
        return replace(self, resolver=self.resolver.in_subresource(self.draft.create_resource(schema)))


class Rewriter:
    """The rewritten schemas of one grammar, and the definitions that they share."""

    def __init__(self) -> None:
        self.patterns = Patterns()
        self._definitions: dict[str, Schema] = {}
        self._names: dict[int, str] = {}
        """Of definitions, by the identity of the schema that is referred to."""
        self._pending: list[tuple[str, Any, Place]] = []
        self._documents: list[Any] = []
        """Kept, for identities are of what lives."""

    def document(self, schema: Any) -> Schema:
        """Returns the root of a document, rewritten."""
        self._documents.append(schema)
        draft = _draft_of(schema)
        registry: Registry[Any] = Registry()
        root = self.schema(schema, Place(registry.resolver_with_root(draft.create_resource(schema)), draft))
        while self._pending:
            name, contents, place = self._pending.pop()
            self._definitions[name] = self.schema(contents, place)
        return root

    def with_definitions(self, root: Schema) -> dict[str, Any]:
        """Returns a schema that refers to what was rewritten, complete."""
        if root is False:
            raise ValueError("it admits no text")
        schema = {} if root is True else root
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def resolve(self, schema: Any, place: Place) -> tuple[Any, Place]:
        """Returns what a schema that is a reference and nothing else refers to, in the end."""
        for _ in range(_MAX_REFERENCES):
            if not isinstance(schema, dict) or "$ref" not in schema or not (len(schema) == 1 or place.draft in _OLD):
                return schema, place
            schema, place = _look_up(schema["$ref"], place.inside(schema))
        raise place.error("$ref leads in a circle")

    def schema(self, schema: Any, place: Place) -> Schema:
        """Returns a schema rewritten; True where it admits all, False where nothing."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise place.error("a schema is an object, true or false")
        place = place.inside(schema)
        if place.draft in _OLD and "$ref" in schema:
            schema = {"$ref": schema["$ref"]}
        result: dict[str, Any] = {key: value for key, value in schema.items() if key in COPIED}
        result |= {key: count(schema, key, place) for key in COUNTS & schema.keys()}
        if schema.get("format") in FORMATS:
            result["format"] = schema["format"]
        parts = self._applied(schema, place) + self._conditions(schema, place)
        if "pattern" in schema:
            result["pattern"], *looked_at = _patterns(schema["pattern"], place)
            parts += [{"pattern": pattern} for pattern in looked_at]
        if BOUNDS & schema.keys():
            types = as_list(schema.get("type"))
            try:
                result |= bounds(schema, integer="integer" in types and "number" not in types)
            except ValueError as error:
                raise place.error(str(error)) from None
        if "array" in types_of(schema):
            result |= self._items(schema, place)
            parts += self._contained(schema, result, place)
        if OBJECT_KEYWORDS & schema.keys():
            keywords, others = rewrite_object(self, schema, place)
            result |= keywords
            parts += others
        return _all_of(result, parts, first=_applied_first(schema))

    def _applied(self, schema: dict[str, Any], place: Place) -> list[Schema]:
        """Returns the schemas that another one applies to the same value, in their order."""
        parts: list[Schema] = []
        for key, value in schema.items():
            if key in REFERENCES:
                parts.append(self._reference("#" if key == "$recursiveRef" else value, place.at(key)))
            elif key in ("allOf", "anyOf", "oneOf"):
                if not isinstance(value, list) or not value:
                    raise place.error(f"{key} is no list of schemas")
                options = [self.schema(option, place.at(key, i)) for i, option in enumerate(value)]
                parts += options if key == "allOf" else [self._one_of(key, value, options, place)]
            elif key == "not":
                parts.append(self._negation(value, place.at(key)))
        return parts

    def _reference(self, reference: Any, place: Place) -> Schema:
        contents, target = _look_up(reference, place)
        if isinstance(contents, bool):
            return contents
        name = self._names.get(id(contents))
        if name is None:
            name = self._names[id(contents)] = str(len(self._names))
            self._pending.append((name, contents, target))
        return {"$ref": f"#/$defs/{name}"}

    def _one_of(self, key: str, schemas: list[Any], options: list[Schema], place: Place) -> Schema:
        satisfiable = [option for option in options if option is not False]
        if len(satisfiable) < 2:
            return satisfiable[0] if satisfiable else False
        if key == "anyOf":
            return True if True in satisfiable else {"anyOf": satisfiable}
        places = [(schema, place.at(key, i)) for i, schema in enumerate(schemas)]
        if all(are_disjoint(self, first, second) for first, second in combinations(places, 2)):
            return {"anyOf": satisfiable}
        return {"oneOf": satisfiable}

    def _negation(self, schema: Any, place: Place) -> Schema:
        schema, place = self.resolve(schema, place)
        if isinstance(schema, bool):
            return not schema
        asserted = (
            {key: value for key, value in schema.items() if key in ASSERTIONS} if isinstance(schema, dict) else {}
        )
        if isinstance(schema, dict) and not asserted:
            return False
        if asserted.keys() == {"not"}:
            return self.schema(asserted["not"], place)
        if asserted.keys() == {"anyOf"}:
            parts = [self._negation(part, place.at("anyOf", i)) for i, part in enumerate(as_list(asserted["anyOf"]))]
            return _all_of({}, parts)
        types = as_list(asserted.get("type"))
        if asserted.keys() == {"type"} and ("integer" not in types or "number" in types):
            return {"type": sorted(TYPES.difference(types))}
        raise place.error("not can be enforced of types alone: say what values are, instead of what they are not")

    def _conditions(self, schema: dict[str, Any], place: Place) -> list[Schema]:
        parts: list[Schema] = []
        if "if" in schema and ("then" in schema or "else" in schema):
            condition = self.schema(schema["if"], place.at("if"))
            if not isinstance(condition, bool):
                raise place.error("if cannot be enforced, for whether it holds is known too late: give anyOf")
            key = "then" if condition else "else"
            parts.append(self.schema(schema.get(key, True), place.at(key)))
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, value in as_map(schema, key, place).items():
                needed = value if isinstance(value, list) else []
                part = True if isinstance(value, list) else self.schema(value, place.at(key, name))
                then = _all_of({"required": [name, *needed]}, [part])
                parts.append({"anyOf": [{"properties": {name: False}}, then]})
        return parts

    def _items(self, schema: dict[str, Any], place: Place) -> dict[str, Any]:
        first_key, rest_key = "prefixItems", "items"
        if isinstance(schema.get("items"), list):  # before draft 2020-12
            first_key, rest_key = "items", "additionalItems"
        result: dict[str, Any] = {}
        if first := as_list(schema.get(first_key)):
            result["prefixItems"] = [self.schema(item, place.at(first_key, i)) for i, item in enumerate(first)]
        if rest_key not in schema and "unevaluatedItems" in schema:
            rest_key = "unevaluatedItems"
            if APPLICATORS & schema.keys() and schema[rest_key] is not True:
                raise place.error("unevaluatedItems cannot be enforced beside anyOf and the like: leave it out")
        if rest_key in schema:
            result["items"] = self.schema(schema[rest_key], place.at(rest_key))
        return result

    def _contained(self, schema: dict[str, Any], result: dict[str, Any], place: Place) -> list[Schema]:
        """Returns what `contains` comes to, where it can be enforced; checks that `uniqueItems` holds."""
        longest = result.get("maxItems")
        if result.get("items") is False:
            length = len(result.get("prefixItems", ()))
            longest = length if longest is None else min(longest, length)
        if schema.get("uniqueItems") and (longest is None or longest > 1):
            raise place.error("uniqueItems cannot be enforced: leave it out, and drop what comes twice")
        least = count(schema, "minContains", place)
        if "contains" not in schema or (least == 0 and "maxContains" not in schema):
            return []
        if self.schema(schema["contains"], place.at("contains")) is not True:
            raise place.error("contains cannot be enforced: leave it out, or give prefixItems")
        limits = {"minItems": 1 if least is None else least, "maxItems": count(schema, "maxContains", place)}
        return [{key: value for key, value in limits.items() if value is not None}]


def _draft_of(schema: Any) -> Any:
    """Returns the draft that a document names, or the newest one that it can be of."""
    dialect = schema.get("$schema") if isinstance(schema, dict) else None
    draft = specification_with(dialect, default=DRAFT202012) if isinstance(dialect, str) else DRAFT202012
    return DRAFT201909 if draft is DRAFT202012 and _lists_items(schema) else draft


def _lists_items(value: Any) -> bool:
    """Whether `items` is a list somewhere, as it was before draft 2020-12."""
    if isinstance(value, dict):
        return isinstance(value.get("items"), list) or any(map(_lists_items, value.values()))
    return isinstance(value, list) and any(map(_lists_items, value))


def _look_up(reference: Any, place: Place) -> tuple[Any, Place]:
    try:
        resolved = place.resolver.lookup(reference)
    except (Unresolvable, AttributeError, LookupError, TypeError, ValueError):
        raise place.error(f"{str(reference)[:100]!r} leads to no schema in the same document") from None
    pointer = reference if reference.startswith("#") else place.pointer
    return resolved.contents, Place(resolved.resolver, place.draft, pointer)


def _patterns(pattern: Any, place: Place) -> list[str]:
    if not isinstance(pattern, str):
        raise place.error("pattern is no text")
    return without_look_aheads(pattern)


def _applied_first(schema: dict[str, Any]) -> bool:
    """Whether properties of the schemas that are applied come before its own."""
    applied = [i for i, key in enumerate(schema) if key in APPLICATORS]
    own = [i for i, key in enumerate(schema) if key in ("properties", "required")]
    return bool(applied and own) and applied[0] < own[0]


def _all_of(keywords: dict[str, Any], parts: list[Schema], *, first: bool = False) -> Schema:
    """Returns a schema of keywords and of others that apply, too."""
    parts = [part for part in parts if part is not True]
    if False in parts:
        return False
    if not parts:
        return keywords or True
    if not keywords and len(parts) == 1:
        return parts[0]
    return {"allOf": parts, **keywords} if first else {**keywords, "allOf": parts}
