"""JSON schemas: what answers to them may be, of those that libraries emit and of those that fuzzing finds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemas import Tally, Walker, corpus, schemas

from lattice_serve.engine.compiler import Compiler, source_of
from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.sampling import CallableFunction, Grammar
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import bundled_model

REFUSED = {
    "arktype.iso": "look-around",
    "pydantic.Sets": "#/properties/s: uniqueItems cannot be enforced",
    "typebox.regexp": "Invalid type: RegExp",
    "typebox.uint8": "Invalid type: Uint8Array",
    "zod.never": "it admits no text",
    "zod.string.duration": "look-around",
    "zod_to_json_schema_draft_7.patterns": "look-around",
    "zod_to_json_schema_draft_7.relative.shared": "#/properties/work/$ref: '1/home' leads to no schema",
    "zod_to_json_schema_draft_7.set": "#: uniqueItems cannot be enforced",
    "zod_to_json_schema_openai.never": "not can be enforced of types alone",
    "zod_to_json_schema_openai.union_undefined": "not can be enforced of types alone",
}
"""Of those that libraries emit. docs/conformance.md gives the reasons."""


class Languages:
    """Which texts grammars admit."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.load(bundled_model(), 4096)
        self._compiler = Compiler(self._tokenizer)

    def admits(self, grammar: Grammar, *texts: str) -> list[bool]:
        matcher = self._compiler.compile(source_of(grammar))
        results = []
        for text in texts:
            at, ids = matcher.deep_copy(), self._tokenizer.encode(text)
            results.append(at.try_consume_tokens(ids) == len(ids) and at.is_accepting())
        return results


@pytest.fixture(scope="module")
def languages() -> Languages:
    return Languages()


@pytest.fixture(scope="module")
def walker() -> Walker:
    return Walker()


def check(languages: Languages, schema: Any, valid: list[Any], invalid: list[Any]) -> None:
    """valid, invalid: values, or their JSON where the spelling matters."""
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in [*valid, *invalid]]
    admitted = languages.admits(Grammar.json_schema(schema), *texts)
    assert admitted == [True] * len(valid) + [False] * len(invalid), list(zip(texts, admitted, strict=True))


def refusal(languages: Languages, grammar: Grammar) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        languages.admits(grammar)
    return str(caught.value)


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


INTEGER, STRING = {"type": "integer"}, {"type": "string"}


class TestToolsAreDocuments:
    """Each tool's references are its own, whatever is around it."""

    def calls(self, languages: Languages, functions: dict[str, Any], *texts: str, one: bool = False) -> list[bool]:
        callables = [CallableFunction(name, parameters) for name, parameters in functions.items()]
        return languages.admits(Grammar.tool_calls(callables, one=one), *texts)

    @pytest.mark.parametrize(
        ("parameters", "valid", "invalid"),
        [
            (
                object_of(v=STRING, kids={"type": "array", "items": {"$ref": "#"}, "maxItems": 1}),
                [{"v": "a", "kids": [{"v": "b", "kids": []}]}],
                [{"kids": [{"name": "f", "arguments": {}}]}, {"kids": [1]}],
            ),
            (object_of(start=INTEGER, end={"$ref": "#/properties/start"}), [{"end": 1}], [{"end": "1"}]),
            (
                object_of(**{"a/b~c d": INTEGER, "x": {"$ref": "#/properties/a~1b~0c%20d"}}),
                [{"x": 1}],
                [{"x": "1"}],
            ),
            (object_of(x={"$ref": "#/%24defs/n"}) | {"$defs": {"n": INTEGER}}, [{"x": 1}], [{"x": "1"}]),
            (object_of(a={"anyOf": [STRING, INTEGER]}, x={"$ref": "#/properties/a/anyOf/1"}), [{"x": 1}], [{"x": "1"}]),
            (
                object_of(
                    a={"type": "array", "prefixItems": [STRING, INTEGER]}, x={"$ref": "#/properties/a/prefixItems/1"}
                ),
                [{"x": 1}],
                [{"x": "1"}],
            ),
            (
                {**object_of(x={"$ref": "#/properties/a/items/1"}, a={"type": "array", "items": [STRING, INTEGER]})},
                [{"x": 1}],
                [{"x": "1"}],
            ),
            (object_of(x={"$ref": "#/definitions/n"}) | {"definitions": {"n": INTEGER}}, [{"x": 1}], [{"x": "1"}]),
            (object_of(x={"$ref": "#n"}) | {"$defs": {"m": {"$anchor": "n", **INTEGER}}}, [{"x": 1}], [{"x": "1"}]),
            (object_of(x={"$ref": "n"}) | {"$defs": {"m": {"$id": "n", **INTEGER}}}, [{"x": 1}], [{"x": "1"}]),
            (
                object_of(x={"$ref": "https://example.com/t#/$defs/n"})
                | {"$id": "https://example.com/t", "$defs": {"n": INTEGER}},
                [{"x": 1}],
                [{"x": "1"}],
            ),
            (
                object_of(x={"$ref": "#/$defs/m"})
                | {
                    "$defs": {
                        "m": {
                            "$id": "https://example.com/m",
                            **object_of(y={"$ref": "#/$defs/n"}),
                            "$defs": {"n": STRING},
                        },
                        "n": INTEGER,
                    }
                },
                [{"x": {"y": "a"}}],
                [{"x": {"y": 1}}],
            ),
            (
                object_of(x={"$ref": "#n"})
                | {
                    "$schema": "http://json-schema.org/draft-07/schema#",
                    "definitions": {"m": {"$id": "#n", **INTEGER}},
                },
                [{"x": 1}],
                [{"x": "1"}],
            ),
            (
                object_of(x={"$dynamicRef": "#n"}) | {"$defs": {"m": {"$dynamicAnchor": "n", **INTEGER}}},
                [{"x": 1}],
                [{"x": "1"}],
            ),
            ({"$ref": "#/$defs/a", "$defs": {"a": object_of(x=INTEGER)}}, [{"x": 1}], [{"x": "1"}, 1]),
            (
                {"$ref": "#/components/schemas/a", "components": {"schemas": {"a": object_of(x=INTEGER)}}},
                [{"x": 1}],
                [{"x": "1"}],
            ),
        ],
        ids=lambda value: json.dumps(value)[:60],
    )
    def test_references(self, languages: Languages, parameters: Any, valid: list[Any], invalid: list[Any]) -> None:
        """Beside tools with other schemas at the same places."""
        other = {
            "type": "object",
            "properties": {"start": {"type": "null"}, "a": {"anyOf": [{"type": "null"}] * 2}},
            "$defs": {name: {"type": "null"} for name in ("n", "m", "a")},
            "definitions": {"n": {"$anchor": "n", "type": "null"}},
            "$id": "https://example.com/t",
        }
        for functions in ({"f": parameters}, {"g": other, "f": parameters, "h": other}):
            for one in (True, False):
                texts = [json.dumps([{"name": "f", "arguments": value}]) for value in [*valid, *invalid]]
                admitted = self.calls(languages, functions, *texts, one=one)
                assert admitted == [True] * len(valid) + [False] * len(invalid)

    def test_definitions_of_one_name(self, languages: Languages) -> None:
        functions = {
            name: object_of(x={"$ref": "#/$defs/Item"}) | {"$defs": {"Item": item}}
            for name, item in (("f", INTEGER), ("g", STRING))
        }
        texts = [json.dumps([{"name": name, "arguments": {"x": value}}]) for name in "fg" for value in (1, "a")]
        assert self.calls(languages, functions, *texts) == [True, False, False, True]
        both = json.dumps([{"name": "g", "arguments": {"x": "a"}}, {"name": "f", "arguments": {"x": 1}}])
        assert self.calls(languages, functions, both, "[]") == [True, False]
        assert self.calls(languages, functions, both, one=True) == [False]

    def test_arguments_are_objects(self, languages: Languages) -> None:
        texts = ['[{"name": "f", "arguments": {"a": 1}}]', '[{"name": "f", "arguments": 1}]']
        several: list[dict[str, Any]] = [{}, {"properties": {"a": {}}}, {"anyOf": [INTEGER, {"required": ["a"]}]}]
        for parameters in several:
            assert self.calls(languages, {"f": parameters}, *texts) == [True, False]

    @pytest.mark.parametrize("reference", ["#/$defs/n", "#n", "n", "https://example.com/", "#/required/0", "#/a/b", 1])
    def test_what_leads_nowhere_is_named(self, languages: Languages, reference: Any) -> None:
        parameters: dict[str, Any] = {"type": "object", "properties": {"x": {"$ref": reference}}, "required": ["x"]}
        error = refusal(languages, Grammar.tool_calls([CallableFunction("f", parameters)], one=True))
        assert error.startswith("the parameters of f: #/")

    def test_a_hundred_and_twenty_eight_tools(self, languages: Languages) -> None:
        functions = {
            f"tool_{i}": object_of(
                **{f"p{j}": {"type": "string", "description": "x" * 600} for j in range(8)}, r={"$ref": "#/$defs/d"}
            )
            | {"$defs": {"d": {"const": i}}}
            for i in range(128)
        }
        texts = [json.dumps([{"name": "tool_9", "arguments": {"p1": "a", "r": r}}]) for r in (9, 8)]
        assert self.calls(languages, functions, *texts) == [True, False]


class TestWhatLibrariesEmit:
    @pytest.mark.parametrize(
        ("schema", "valid", "invalid"),
        [
            *(
                ({"type": "string", "format": name}, ['"no such thing"'], [1])
                for name in ("path", "password", "binary", "base64", "uri-reference", "int64", "", "regex", "x")
            ),
            ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-13-01"']),
            ({"type": "integer", "format": "int32"}, [1], ["1.5"]),
            ({"type": "array", "items": INTEGER, "uniqueItems": False}, [[1, 1]], [["a"]]),
            ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[1]], [[1, 1]]),
            ({"type": "string", "uniqueItems": True}, ['"a"'], []),
            ({"type": "object", "properties": {"a": {"not": {}}}}, [{}, {"b": 1}], [{"a": 1}]),
            (
                {"type": "object", "additionalProperties": {"not": {}}, "properties": {"a": INTEGER}},
                [{"a": 1}],
                [{"b": 1}],
            ),
            ({"type": "array", "items": {"not": {}}}, [[]], [[1]]),
            ({"anyOf": [{"not": {}}, INTEGER]}, [1], ['"a"']),
            ({"not": {"not": {"type": "integer"}}}, [1], ['"a"']),
            ({"not": {"type": ["null", "object"]}}, [1, "[]"], ["null", {}]),
            ({"not": {"anyOf": [{"type": "null"}, {"type": "string"}]}}, [1], ["null", '"a"']),
            ({"not": False, "type": "null"}, ["null"], [1]),
            (
                {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
                [{"a": 1}],
                [{"a": "x"}],
            ),
            (
                {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": INTEGER},
                [{"x": 1}, {}],
                [{"z": 1}, {"y": "a"}],
            ),
            (
                {
                    "type": "object",
                    "propertyNames": {"$ref": "#/$defs/c"},
                    "$defs": {"c": {"enum": ["x"], "type": "string"}},
                },
                [{"x": 1}],
                [{"z": 1}],
            ),
            (
                {"type": "object", "propertyNames": {"pattern": "^k[0-9]+$"}, "additionalProperties": INTEGER},
                [{"k12": 1}],
                [{"a": 1}, {"k1": "a"}],
            ),
            (
                {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}},
                [{"ab": 1, "\u00e9\u00e9\u00e9": 1}],
                [{"a": 1}, {"abcd": 1}],
            ),
            (
                {"type": "object", "propertyNames": {"format": "uuid"}},
                [{"0" * 8 + "-0000" * 3 + "-" + "0" * 12: 1}],
                [{"a": 1}],
            ),
            (
                {"type": "object", "propertyNames": {"enum": ["a"]}, "properties": {"a": INTEGER, "b": {}}},
                [{"a": 1}],
                [{"b": 1}, {"a": "x"}],
            ),
            (
                {
                    "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
                    "$defs": {name: {**object_of(k={"const": name}), "required": ["k"]} for name in "ab"},
                },
                [{"k": "a"}, {"k": "b"}],
                [{"k": "c"}],
            ),
            (
                {"type": "string", "pattern": "^(?=.*[0-9])(?=.*[a-z]).{2,4}$"},
                ['"a1"', '"1bcd"'],
                ['"ab"', '"12"', '"a1234"'],
            ),
            (
                {"type": "array", "items": [INTEGER, STRING], "additionalItems": False},
                [[1, "a"], [1]],
                [["a"], [1, "a", 1]],
            ),
            ({"type": "string", "minLength": 2.0, "maxLength": 3.0}, ['"ab"'], ['"a"']),
            (
                {
                    "$schema": "http://json-schema.org/draft-07/schema#",
                    "$ref": "#/definitions/a",
                    "type": "null",
                    "definitions": {"a": INTEGER},
                },
                [1],
                ["null"],
            ),
            ({"type": "object", "dependentRequired": {"a": ["b"]}}, [{"b": 1}, {"a": 1, "b": 1}], [{"a": 1}]),
            (
                {"type": "object", "dependentSchemas": {"a": object_of(a={}, c={})}},
                [{"b": 1}, {"a": 1, "c": 1}],
                [{"a": 1, "b": 1}],
            ),
            ({"if": {"type": "string"}, "type": "integer"}, [1], ['"a"']),
            ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, [{"a": 1}], [{"b": 1}]),
            (
                {
                    "allOf": [{"type": "object", "properties": {n: INTEGER}} for n in "ab"],
                    "unevaluatedProperties": False,
                },
                [{"a": 1, "b": 1}],
                [{"c": 1}],
            ),
            ({"type": "array", "contains": {}}, [[1]], [[]]),
            (
                {"type": "string", "nullable": True, "x-order": 1, "discriminator": {"propertyName": "a"}},
                ['"a"'],
                ["null"],
            ),
            (True, [1, "null"], []),
            ({"const": "a\u0001"}, ['"a\\u0001"'], ['"a"']),
        ],
        ids=lambda value: json.dumps(value)[:60],
    )
    def test_keywords(self, languages: Languages, schema: Any, valid: list[Any], invalid: list[Any]) -> None:
        check(languages, schema, valid, invalid)

    @pytest.mark.parametrize(
        ("schema", "valid", "invalid"),
        [
            ({"minimum": -(2**63)}, [-(2**62), 0, 2**62], [-(2**63) - 1, "1.5"]),
            ({"minimum": -(2**63), "maximum": 2**63 - 1}, [2**63 - 1, -(2**63) + 1024], [2**63, -(2**63) - 1]),
            ({"minimum": 0, "maximum": 2**64 - 1}, [0, 2**63 - 1], [-1, 2**64]),
            ({"maximum": 2**53 + 3}, [2**53 + 1], [2**53 + 4]),
            ({"exclusiveMinimum": 2**53 + 1}, [2**53 + 4], [2**53 + 1]),
            ({"minimum": 10**18}, [10**18, 2 * 10**18], [10**18 - 1, 0]),
            ({"maximum": -(10**18)}, [-(10**18), -2 * (10**18)], [-(10**18) + 1, 0]),
            ({"minimum": 3, "exclusiveMinimum": True}, [4], [3]),
            ({"minimum": 1.5, "exclusiveMaximum": 4}, [2, 3], [1, 4]),
            ({"minimum": -1e400, "maximum": 1e400}, [0], []),
        ],
        ids=str,
    )
    def test_bounds_of_integers(self, languages: Languages, schema: Any, valid: list[Any], invalid: list[Any]) -> None:
        check(languages, {"type": "integer", **schema}, valid, invalid)

    @pytest.mark.parametrize(
        ("schema", "valid", "invalid"),
        [
            ({"maximum": 1e19}, ["-1.5", "9.0", 2**62], [2 * 10**19]),
            ({"minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38}, ["-1.5", 2**62], ["1e39", 10**40]),
            ({"minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}, ["0.25"], ["1e999"]),
            ({"exclusiveMinimum": 0, "maximum": 1e19}, ["0.5"], [0, "0.0"]),
            ({"minimum": 10**18}, ["1000000000000000000.5"], [1]),
            ({"minimum": 0.5, "exclusiveMinimum": 0.5}, ["0.51"], ["0.5"]),
        ],
        ids=str,
    )
    def test_bounds_of_numbers(self, languages: Languages, schema: Any, valid: list[Any], invalid: list[Any]) -> None:
        check(languages, {"type": "number", **schema}, valid, invalid)

    @pytest.mark.parametrize(
        ("schema", "reason"),
        [
            ({"type": "array", "uniqueItems": True}, "#: uniqueItems cannot be enforced"),
            ({"properties": {"a": {"not": {"const": 1}}}}, "#/properties/a/not: not can be enforced of types alone"),
            ({"if": STRING, "then": {"minLength": 1}}, "#: if cannot be enforced"),
            ({"type": "array", "contains": INTEGER}, "#: contains cannot be enforced"),
            ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf can be enforced where no value matches two"),
            ({"type": "object", "anyOf": [{}], "unevaluatedProperties": False}, "#: unevaluatedProperties cannot"),
            ({"type": "array", "anyOf": [{}], "unevaluatedItems": False}, "#: unevaluatedItems cannot"),
            ({"minimum": 1e19}, "#: minimum 1e+19 admits only numbers beyond 64 bits"),
            ({"minimum": "1"}, "#: minimum is '1': give a number"),
            ({"minLength": -1}, "#: minLength is '-1': give an integer"),
            ({"type": "number", "multipleOf": 0.07}, "multipleOf"),
            ({"type": "string", "pattern": "^(?!a)b"}, "look-around"),
            ({"properties": [1]}, "#: properties is no object"),
            ({"properties": {"a": 1}}, "#/properties/a: a schema is an object, true or false"),
            ({"properties": {"a": {"required": True}}}, "#/properties/a: required is no list of names"),
            ({"anyOf": []}, "#: anyOf is no list of schemas"),
            ({"not": {}}, "it admits no text"),
        ],
        ids=str,
    )
    def test_what_cannot_be_enforced_is_refused_with_a_reason(
        self, languages: Languages, schema: Any, reason: str
    ) -> None:
        assert reason in refusal(languages, Grammar.json_schema(schema))

    def test_the_order_of_properties_is_the_schemas(self, languages: Languages) -> None:
        base = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
        own: dict[str, Any] = {"properties": {"b": INTEGER}, "required": ["b"]}
        check(languages, {"allOf": [base], **own}, ['{"a":1,"b":1}'], ['{"b":1,"a":1}'])
        check(languages, {**own, "allOf": [base]}, ['{"b":1,"a":1}'], ['{"a":1,"b":1}'])

    def test_strict_refuses_formats_that_would_be_ignored(self) -> None:
        schema = {"type": "object", "properties": {"a/b": {"type": "string", "format": "path"}}}
        Grammar.json_schema(schema)
        with pytest.raises(InvalidParameter, match="#/properties/a~1b has the format 'path'"):
            Grammar.json_schema(schema, strict=True)
        with pytest.raises(InvalidParameter, match=r"tools: the parameters of f: .*'path'") as caught:
            Grammar.tool_calls([CallableFunction("f", schema, True)], one=True, param="tools")
        assert caught.value.param == "tools"
        Grammar.json_schema(
            {"properties": {"a": {"format": "date"}, "format": {"const": {"format": "x"}}}}, strict=True
        )

    def test_the_corpus(self, walker: Walker) -> None:
        tally = Tally()
        for name, schema in corpus():
            tally.try_schema(walker, name, schema, 1, 3)
        assert tally.schemas > 400
        assert tally.answers > 350
        assert tally.invalid == []
        assert tally.refused.keys() == REFUSED.keys()
        for name, reason in REFUSED.items():
            assert reason in tally.refused[name]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema=schemas(), seed=st.integers(0, 999))
    def test_answers_to_any_small_schema_are_valid(self, walker: Walker, schema: dict[str, Any], seed: int) -> None:
        tally = Tally()
        tally.try_schema(walker, "generated", schema, 3, seed)
        assert tally.invalid == []


class TestNames:
    """Of an object, each once."""

    @pytest.mark.parametrize(
        ("schema", "valid", "invalid"),
        [
            (
                {
                    "patternProperties": {"^[ab]$": {"type": "boolean"}},
                    "additionalProperties": False,
                    "minProperties": 2,
                    "maxProperties": 3,
                },
                ['{"a":true,"b":false}'],
                ['{"a":true,"a":true}', '{"a":true}', '{"a":true,"b":true,"a":true}'],
            ),
            (
                {"patternProperties": {"^[ab]$": INTEGER}},
                ['{"a":1,"b":1}', '{"c":"x"}'],
                ['{"a":1,"a":1}', '{"a":"x"}'],
            ),
            (
                {"patternProperties": {"^[ab]$": INTEGER}, "properties": {"a": {"minimum": 3}}},
                ['{"a":3}'],
                ['{"a":2}', '{"a":"x"}'],
            ),
            (
                {"propertyNames": {"enum": ["a", "b"]}, "minProperties": 1},
                ['{"b":1}', '{"a":1,"b":1}'],
                ["{}", '{"a":1,"a":1}'],
            ),
            (
                {"propertyNames": {"pattern": "^[ab]$"}, "minProperties": 2},
                ['{"a":1,"b":1}'],
                ['{"a":1}', '{"a":1,"a":1}'],
            ),
            (
                {"properties": {"a": INTEGER}, "additionalProperties": STRING},
                ['{"a":1,"b":"x"}'],
                ['{"a":1,"a":"x"}', r'{"a":1,"\u0061":"x"}', r'{"\u0061":"x"}'],
            ),
            (
                {**object_of(a={}, b={}, c={}), "minProperties": 2},
                ['{"a":1,"c":1}', '{"a":1,"b":1,"c":1}'],
                ['{"a":1}', "{}"],
            ),
            ({**object_of(a={}, b={}, c={}), "maxProperties": 1}, ['{"b":1}', "{}"], ['{"a":1,"b":1}']),
            (
                {**object_of(a={}, b={}, c={}), "minProperties": 1, "maxProperties": 2, "required": ["b"]},
                ['{"b":1}', '{"a":1,"b":1}'],
                ['{"a":1,"b":1,"c":1}', '{"a":1}'],
            ),
            ({**object_of(a={}, b={}), "maxProperties": 0}, ["{}"], ['{"a":1}']),
            ({"properties": {"a": {}}, "minProperties": 1}, ['{"a":1}', '{"x":1}'], ["{}"]),
            ({"properties": {"a": {}}, "minProperties": 2}, ['{"a":1,"x":1}'], ['{"a":1}', '{"x":1}', '{"x":1,"x":1}']),
            (
                {"properties": {"a": {}}, "minProperties": 1, "maxProperties": 2},
                ['{"a":1,"x":1}', '{"x":1,"y":1}'],
                ["{}", '{"a":1,"x":1,"y":1}'],
            ),
            ({"properties": {"a": {}}, "maxProperties": 1}, ['{"a":1}', '{"x":1}', "{}"], ['{"a":1,"x":1}']),
            ({"additionalProperties": INTEGER, "minProperties": 1}, ['{"x":1}'], ["{}"]),
            (
                {"properties": {"a": {}}, "required": ["a"], "minProperties": 2},
                ['{"a":1,"x":1}'],
                ['{"a":1}', '{"a":1,"a":1}'],
            ),
        ],
        ids=lambda value: json.dumps(value)[:60],
    )
    def test_numbers_of_properties(
        self, languages: Languages, schema: Any, valid: list[str], invalid: list[str]
    ) -> None:
        check(languages, {"type": "object", **schema}, valid, invalid)

    @pytest.mark.parametrize(
        ("schema", "reason"),
        [
            ({"minProperties": 2}, "minProperties asks for 2 names that the schema leaves open"),
            ({"patternProperties": {"^x": {}}, "minProperties": 2, "additionalProperties": False}, "leaves open"),
            ({**object_of(**{f"p{i}": {} for i in range(40)}), "minProperties": 20}, "too many choices"),
            ({"propertyNames": {"pattern": "^a", "minLength": 3}}, "#/propertyNames: names can be kept to an enum"),
            (
                {"propertyNames": {"pattern": "^a"}, "patternProperties": {"b": {}}},
                "propertyNames and patternProperties",
            ),
            ({**object_of(a={}), "minProperties": 2}, "incompatible types"),
        ],
        ids=lambda value: json.dumps(value)[:60],
    )
    def test_what_could_repeat_a_name_is_refused(self, languages: Languages, schema: Any, reason: str) -> None:
        assert reason in refusal(languages, Grammar.json_schema({"type": "object", **schema}))


class TestSize:
    def test_annotations_do_not_count(self) -> None:
        long = "x" * 3_000_000
        schema = {
            "title": long,
            "properties": {
                "description": {"type": "integer", "description": long, "default": long, "examples": [long]},
                "title": {"const": {"title": "kept"}, "$comment": long},
                "default": {"enum": [{"default": 1}], "deprecated": True},
            },
            "items": [{"description": long}],
            "$defs": {"examples": {"not": {"description": long}}},
            "anyOf": [{"description": long}, True],
        }
        assert json.loads(Grammar.json_schema(schema).text) == {
            "properties": {
                "description": {"type": "integer"},
                "title": {"const": {"title": "kept"}},
                "default": {"enum": [{"default": 1}]},
            },
            "items": [{}],
            "$defs": {"examples": {"not": {}}},
            "anyOf": [{}, True],
        }
        assert Grammar.json_schema(json.dumps(schema)) == Grammar.json_schema(schema)

    @pytest.mark.parametrize(
        "schema",
        [
            {"enum": ["x" * 3_000_000]},
            {"properties": {str(i): {} for i in range(30_000)}},
            {"anyOf": [{}] * 30_000},
        ],
        ids=["characters", "properties", "alternatives"],
    )
    def test_it_is_bounded(self, schema: Any) -> None:
        with pytest.raises(InvalidParameter, match="guided_json") as caught:
            Grammar.json_schema(schema, "guided_json")
        assert caught.value.param == "guided_json"

    @pytest.mark.parametrize("text", ['{"items":' * 5000 + "{}" + "}" * 5000, '{"not":' * 150 + "{}" + "}" * 150, "{"])
    def test_a_text_that_is_no_schema(self, text: str) -> None:
        with pytest.raises(InvalidParameter, match="guided_json is no JSON schema"):
            Grammar.json_schema(text, "guided_json")
