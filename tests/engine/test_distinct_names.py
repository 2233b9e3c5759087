"""Names in the objects of a JSON text: none is allowed to come twice, however tokens cut the text."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.engine.distinct_names import DistinctNames, QuoteTokens
from lattice_serve.engine.grammar import Grammars
from lattice_serve.engine.sampling import Grammar
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import bundled_model

EOS = 1


class Vocabulary:
    """A tokenizer of these texts alone."""

    def __init__(self, *texts: bytes) -> None:
        self.texts = texts
        self.vocab_size = len(texts)

    def token_bytes(self, token_id: int) -> bytes:
        return self.texts[token_id]


def repeating(text: bytes, *tokens: bytes) -> list[bytes]:
    """Those of the tokens that would end a name which is there."""
    vocabulary: Any = Vocabulary(*tokens)
    names = DistinctNames(QuoteTokens(vocabulary))
    names.push(text)
    return [tokens[token_id] for token_id in names.repeating(np.ones(len(tokens), np.bool_))]


@pytest.mark.parametrize(
    ("text", "token", "repeats"),
    [
        (b'{"a":1,"a', b'"', True),
        (b'{"a":1,"', b'a"', True),
        (b'{"a":1,', b'"a":', True),
        (b'{"a":1', b',"a"', True),
        (b'{"a":"x', b'","a":', True),
        (b'{"a":1,"ab', b'"', False),
        (b'{"a":1,"a', b'b"', False),
        (b'{"a":{"b":1},"b', b'"', False),
        (b'{"a":{"b":1,"b', b'"', True),
        (b'{"a":{', b'"a"', False),
        (b'{"a":["a', b'"', False),
        (b'{"a":"a', b'"', False),
        (b'[{"a":1},{"a', b'"', False),
        (b'{"a\\"b":1,"a\\"b', b'"', True),
        (b'{"a\\/b":1,"a/b', b'"', True),
        (b'{"a":1,"a\\', b'"', False),
        (b'{"a":1,', b'"b":1,"b"', True),
        ('{"é":1,"'.encode() + "é".encode()[:1], "é".encode()[1:] + b'"', True),
    ],
)
def test_a_token_that_would_repeat_a_name(text: bytes, token: bytes, repeats: bool) -> None:
    assert repeating(text, token) == ([token] if repeats else [])


@given(
    st.recursive(
        st.none() | st.integers(0, 9) | st.text('ab"\\/{}[],: ', max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\', max_size=2), inner, max_size=4),
    ),
    st.randoms(use_true_random=False),
)
def test_no_name_of_a_valid_text_repeats(value: Any, draw: random.Random) -> None:
    """However its text is cut into tokens."""
    text = json.dumps(value, ensure_ascii=False).encode()
    cuts = sorted({0, len(text), *(draw.randrange(len(text) + 1) for _ in range(4))})
    pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
    vocabulary: Any = Vocabulary(*pieces)
    names = DistinctNames(QuoteTokens(vocabulary))
    for token_id, piece in enumerate(pieces):
        allowed = np.zeros(len(pieces), np.bool_)
        allowed[token_id] = True
        assert names.repeating(allowed) == []
        names.push(piece)


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "additionalProperties": {"type": "null"}, "required": []},
    {"type": "object", "patternProperties": {"^[ab]{1,9}$": {"type": "null"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(bundled_model(), Tokenizer.load(bundled_model()))


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_a_model_that_likes_one_name_gives_it_once(grammars: Grammars, schema: dict[str, Any]) -> None:
    """Walks that take the shortest names whenever they may."""
    tokenizer = Tokenizer.load(bundled_model())
    compiled = grammars.compile(Grammar.json_schema(schema, "x")).result()
    liked = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token_bytes(token_id) in (b"a", b'"')]
    for seed in range(6):
        draw, matcher, text = random.Random(seed), grammars.matcher(compiled, [EOS], "x"), b""
        for _ in range(120):
            allowed = [token_id for token_id in matcher.allowed.nonzero().flatten().tolist() if token_id != EOS]
            if not allowed:
                break
            likely = [token_id for token_id in allowed if token_id in liked]
            token_id = draw.choice(likely if likely and draw.random() < 0.8 else allowed)
            text += tokenizer.token_bytes(token_id)
            matcher.push(token_id)
        names = [name for name, _ in _pairs(text)]
        assert len(names) == len(set(names)), text


def _pairs(text: bytes) -> list[tuple[str, Any]]:
    """The pairs of an object, as far as they are whole."""
    whole, _, _ = text.rpartition(b",") if not text.rstrip().endswith(b"}") else (text.rstrip()[:-1], b"", b"")
    if not whole.strip().startswith(b"{"):
        return []
    found: list[tuple[str, Any]] = json.loads(whole.decode(errors="replace") + "}", object_pairs_hook=list)
    return found


def test_the_bundled_vocabulary_is_looked_at_once(tmp_path: Path) -> None:
    tokens = QuoteTokens(Tokenizer.load(bundled_model()))
    assert all(b'"' in text for text in tokens.texts.values())
    assert tokens.texts
