"""Random answers to JSON schemas as libraries emit them, and to random ones, each validated.

    python benchmarks/schemas.py [--answers 20] [--random 2000] [--seed 0]

An answer is a random walk through the tokens that the schema's grammar allows, of the bundled model's vocabulary. It is
parsed, its names are checked to be distinct within each object, and `jsonschema` validates it. Schemas that are refused
are listed with the reason. Needs the packages of `dev`, about five minutes of one processor, and no model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from lattice_serve.engine.compiler import Compiler, source_of
from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.sampling import Grammar
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import bundled_model

CORPUS = Path(__file__).parent.parent / "tests" / "schemas"
FREE_TOKENS = 60
"""After these, a walk looks for the end of what it is in."""
MAX_TOKENS = 2000


class RepeatedName(ValueError):
    pass


class Walker:
    """Random answers to grammars."""

    def __init__(self) -> None:
        vocab_size = 4096
        self._tokenizer = Tokenizer.load(bundled_model(), vocab_size)
        self._compiler = Compiler(self._tokenizer)
        self._texts = [self._tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        closing = [text[:1] in (b'"', b"}", b"]") and len(text) == 1 for text in self._texts]
        self._closing = np.array([*closing, False])

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Raises `ValueError`."""
        return self._compiler.compile(source_of(grammar))

    def answer(self, matcher: LLMatcher, seed: int) -> str | None:
        """Returns a text of the grammar; None where the walk found no end."""
        matcher, choose, text = matcher.deep_copy(), random.Random(seed), b""
        for place in range(MAX_TOKENS):
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, count=self._compiler.end + 1, bitorder="little").view(np.bool_)
            late = place >= FREE_TOKENS
            if allowed[self._compiler.end] and (late or not allowed[:-1].any() or choose.random() < 0.3):
                return text.decode()
            closing = (allowed & self._closing).nonzero()[0]
            ids = closing if closing.size and (late or choose.random() < 0.3) else allowed[:-1].nonzero()[0]
            token_id = int(choose.choice(ids))
            matcher.consume_token(token_id)
            if matcher.is_error():
                return None
            text += self._texts[token_id]
        return None


def parse(text: str) -> Any:
    """Raises `RepeatedName` for an object that has a name twice."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise RepeatedName(text)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=distinct)


def validator(schema: dict[str, Any]) -> Any:
    """Of the draft that a schema names, or else of the newest that it is one of: some libraries name another."""
    newest = jsonschema.Draft202012Validator
    named = jsonschema.validators.validator_for(schema, default=newest)
    for draft in named, newest, jsonschema.Draft7Validator, jsonschema.Draft4Validator:
        if draft(draft.META_SCHEMA).is_valid(schema):
            return _readable(draft)(schema)
    raise ValueError("a schema of no draft")


def _readable(draft: Any) -> Any:
    """Without the patterns that Python's `re` cannot read, as `\\p{L}`."""

    def pattern(check: Any, expression: str, text: Any, schema: Any) -> Iterator[Any]:
        with contextlib.suppress(re.error):
            yield from draft.VALIDATORS["pattern"](check, expression, text, schema)

    return jsonschema.validators.extend(draft, {"pattern": pattern})


def corpus() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and schemas."""
    for path in sorted(CORPUS.glob("*.json")):
        for name, schema in json.loads(path.read_text()).items():
            yield f"{path.stem}.{name}", schema


_NAMES = ["a", "b", "k1", "xy", "\u00e9/~"]
_NUMBERS = [-(2**63), 2**63 - 1, 2**64, -(2**53), 1e19, -1e19, 3.4028234663852886e38, 0, 1, -3, 2.5, 7, 10**18]


def _some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Small schemas of every keyword. Many admit little or nothing, or are refused."""
    names, counts = st.sampled_from(_NAMES), st.integers(0, 3)
    pattern = st.sampled_from(["^[ab]$", "^x", "^k[0-9]$", "b$", "^(?=.*1)[a-z0-9]+$", ".", "^[a-c]{1,2}$"])
    scalars = st.one_of(
        st.sampled_from([{"type": kind} for kind in ("string", "integer", "boolean", "null", "number")]),
        st.sampled_from(
            [{}, True, False, {"not": {}}, {"not": {"type": "null"}}, {"$ref": "#"}, {"$ref": "#/$defs/d"}]
        ),
        _some(
            minimum=st.sampled_from(_NUMBERS),
            exclusiveMinimum=st.sampled_from(_NUMBERS),
            maximum=st.sampled_from(_NUMBERS),
            exclusiveMaximum=st.sampled_from(_NUMBERS),
            multipleOf=st.sampled_from([1, 3, 0.5]),
        ).flatmap(lambda bounds: st.sampled_from(["integer", "number"]).map(lambda kind: {"type": kind, **bounds})),
        _some(
            minLength=counts, maxLength=counts, pattern=pattern, format=st.sampled_from(["date", "int64", "", "uuid"])
        ).map(lambda limits: {"type": "string", **limits}),
        st.lists(st.sampled_from(["a", "b", 1, 2.0, None, {"a": 1}, [1]]), min_size=1, max_size=3).map(
            lambda values: {"enum": values}
        ),
        st.sampled_from(["a", 1, None]).map(lambda value: {"const": value}),
    )

    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        objects = _some(
            properties=st.dictionaries(names, inner, max_size=3),
            required=st.lists(names, unique=True, max_size=2),
            additionalProperties=inner,
            patternProperties=st.dictionaries(pattern, inner, max_size=2),
            propertyNames=st.one_of(
                st.lists(names, min_size=1, unique=True).map(lambda values: {"enum": values}),
                pattern.map(lambda text: {"pattern": text}),
                st.sampled_from([{"type": "string"}, {"minLength": 1, "maxLength": 2}, {"format": "uuid"}, {}, False]),
            ),
            minProperties=counts,
            maxProperties=counts,
            dependentRequired=st.dictionaries(names, st.lists(names, unique=True, max_size=2), max_size=1),
            unevaluatedProperties=st.booleans(),
        )
        arrays = _some(
            items=inner,
            prefixItems=st.lists(inner, min_size=1, max_size=2),
            minItems=counts,
            maxItems=counts,
            uniqueItems=st.booleans(),
            contains=st.sampled_from([{}, True, {"type": "null"}]),
        )
        options = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            objects.map(lambda keywords: {"type": "object", **keywords}),
            objects,
            arrays.map(lambda keywords: {"type": "array", **keywords}),
            _some(allOf=options, anyOf=options, oneOf=options, **{"not": inner, "if": inner, "then": inner}),
        )

    return st.builds(
        lambda schema, definition: {"$defs": {"d": definition}, **(schema if isinstance(schema, dict) else {})},
        larger(st.recursive(scalars, larger, max_leaves=5)),
        scalars,
    )


@dataclass
class Tally:
    schemas: int = 0
    answers: int = 0
    unfinished: int = 0
    repeated: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    invalid: list[tuple[str, str, str]] = field(default_factory=list)

    def try_schema(self, walker: Walker, name: str, schema: dict[str, Any], answers: int, first_seed: int) -> None:
        self.schemas += 1
        try:
            matcher = walker.compile(Grammar.json_schema(schema))
        except (InvalidParameter, ValueError) as error:
            self.refused[name] = str(error)
            return
        check = validator(schema)
        for i in range(answers):
            text = walker.answer(matcher, first_seed + i)
            if text is None:
                self.unfinished += 1
                continue
            self.answers += 1
            try:
                value = parse(text)
            except RepeatedName:
                self.repeated += 1
                value = json.loads(text)
            fault = next(check.iter_errors(value), None)
            if fault is not None:
                self.invalid.append((name, text, fault.message))

    def report(self, title: str) -> None:
        print(
            f"{title}: {self.schemas} schemas, {len(self.refused)} refused; {self.answers} answers, "
            f"{len(self.invalid)} invalid, {self.repeated} with a name twice, {self.unfinished} walks without an end"
        )
        for name, text, message in self.invalid[:20]:
            print(f"  invalid: {name}: {text[:300]!r}: {message[:200]}")


def _kind(reason: str) -> str:
    """A reason without the place and the values in it."""
    return re.sub(r"'.*?'|\".*?\"|-?[0-9][0-9.e+]*", "...", re.sub(r"^#\S*: ", "", reason))[:110]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=20, help="to each schema")
    parser.add_argument("--random", type=int, default=2000, help="schemas to generate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    walker, began = Walker(), time.monotonic()
    emitted = Tally()
    for name, schema in corpus():
        emitted.try_schema(walker, name, schema, args.answers, args.seed)
    emitted.report("emitted by libraries")
    for name, reason in emitted.refused.items():
        print(f"  refused: {name}: {reason[:200]}")
    generated = Tally()

    @settings(max_examples=args.random, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @seed(args.seed)
    @given(schemas())
    def try_generated(schema: dict[str, Any]) -> None:
        generated.try_schema(walker, json.dumps(schema), schema, args.answers, args.seed)

    try_generated()
    generated.report("generated")
    for reason, schemas_refused in Counter(map(_kind, generated.refused.values())).most_common(30):
        print(f"  refused: {schemas_refused} for {reason}")
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(bool(emitted.invalid or generated.invalid))


if __name__ == "__main__":
    main()
