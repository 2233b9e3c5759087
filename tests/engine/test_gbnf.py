"""EBNF to Lark, judged by what the compiled grammar takes."""

from __future__ import annotations

import itertools
import re

import pytest

from lattice_serve.engine.compiler import Compiler, source_of
from lattice_serve.engine.gbnf import is_gbnf, to_lark
from lattice_serve.engine.sampling import Grammar
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import bundled_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(bundled_model())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer)


@pytest.mark.parametrize(
    ("grammar", "regex", "signs"),
    [
        ('root ::= "ab" | "b"*', "ab|b*", "ab"),
        ('root ::= ("a" | "b")+ "b"', "[ab]+b", "ab"),
        ('root ::= [a-b]{2,3} x? #c\nx ::= "-"\n', "[ab]{2,3}-?", "ab-"),
        ("root ::= [^a-b] [a^-] .", r"[^ab][a\^-](?s:.)", "ab^-\n"),
        ('root ::= a-B "]" |\n  a-B\na-B ::= "[" | [\\]]', r"[\[\]]\]?", "[]a"),
        ('root ::= "é" | "\\x65" [\\u00e9]', "é|eé", "eé"),
        ('root ::= "a" ( | "b" | ) "\\n"', "ab?\\n", "ab\n"),
        # What a lexer that takes the longest match would get wrong.
        ('root ::= "aba" | [ab] [ab] "b"', "aba|[ab][ab]b", "ab"),
        ('root ::= [ab]+ "a"', "[ab]+a", "ab"),
    ],
)
def test_it_is_the_same_language(
    tokenizer: Tokenizer, compiler: Compiler, grammar: str, regex: str, signs: str
) -> None:
    start = compiler.compile(source_of(Grammar.ebnf(grammar)))
    for length in range(5):
        for parts in itertools.product(signs, repeat=length):
            text = "".join(parts)
            ids = tokenizer.encode(text)
            matcher = start.deep_copy()
            taken = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            assert taken == (re.fullmatch(regex, text) is not None), text


def test_recursion(tokenizer: Tokenizer, compiler: Compiler) -> None:
    start = compiler.compile(source_of(Grammar.ebnf('root ::= pair*\npair ::= "(" root ")"')))
    for text, balanced in [("(()())()", True), ("(()", False), ("())", False)]:
        matcher = start.deep_copy()
        ids = tokenizer.encode(text)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == balanced


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('root ::= "a" x', "there is no rule 'x'"),
        ('start ::= "a"', "there is no rule 'root'"),
        ('root ::= "a"\n\nroot ::= "b"', "line 3: rule 'root' is defined twice"),
        ('root ::= "a\n"', "line 1: cannot read '\"a\\n\"'"),
        ("root ::= []", "line 1: cannot read '[]'"),
        ("root ::= [^]", "line 1: [^] holds nothing"),
        ('root ::=\n "a" | *', "line 2: nothing that * could repeat: put what it repeats into parentheses"),
        ('root ::= "a"**', "line 1: nothing that * could repeat: put what it repeats into parentheses"),
        ('root ::= "\\q"', "line 1: there is no escape \\q"),
        ('root ::= "\\uD800"', "line 1: \\uD800 is no character"),
        ('"a"', "line 1: a grammar begins with a rule: root ::= ..."),
    ],
)
def test_what_is_wrong_is_said(grammar: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        to_lark(grammar)


def test_it_is_told_from_lark() -> None:
    assert is_gbnf('# a comment: "x"\n\n root ::= "a"')
    assert not is_gbnf('start: "a::=b"')
