"""EBNF as llama.cpp writes it (GBNF), put into the Lark dialect of llguidance.

Every character becomes a lexeme of its own, so that nothing is lost to a lexer that takes the longest match: the
language is exactly that of the context-free grammar. Takes time linear in the length of the text.
"""

from __future__ import annotations

import json
import re

_GBNF = re.compile(r"(?:\s|#[^\n]*\n)*[\w-]+\s*::=")
_TOKEN = re.compile(
    r"""(?P<space> \s+ | \#[^\n]*)
    | (?P<define> [\w-]+ \s* ::=)
    | (?P<name> [\w-]+)
    | (?P<string> " (?:[^"\\\n]|\\.)* ")
    | (?P<set> \[ (?:[^\]\\\n]|\\.)+ \])
    | (?P<repeat> [*+?] | \{ \s* \d+ \s* (?:, \s* \d* \s*)? \})
    | (?P<mark> [|().])""",
    re.VERBOSE | re.ASCII,
)
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL)
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}


def is_gbnf(text: str) -> bool:
    """Whether its first rule is written `name ::= ...`."""
    return _GBNF.match(text) is not None


def to_lark(text: str) -> str:
    """The same grammar with the rule `root` as `start`. Raises `ValueError` that names the line at fault."""
    writer, place = _Writer(), 0
    try:
        while place < len(text):
            token = _TOKEN.match(text, place)
            if token is None:
                raise ValueError(f"cannot read {text[place : place + 20]!r}")
            writer.write(str(token.lastgroup), token[0])
            place = token.end()
    except ValueError as error:
        raise ValueError(f"line {text.count(chr(10), 0, place) + 1}: {error}") from None
    return writer.lark()


class _Writer:
    def __init__(self) -> None:
        self._names: dict[str, str] = {"root": "start"}
        """Lark's lower case is its own: rules are numbered."""
        self._rules: dict[str, list[str]] = {}
        self._rule: list[str] | None = None

    def write(self, kind: str, token: str) -> None:
        if kind == "space":
            return
        if kind == "define":
            self._define(token.removesuffix("::=").rstrip())
            return
        rule = self._rule
        if rule is None:
            raise ValueError("a grammar begins with a rule: root ::= ...")
        if kind == "repeat":
            if not rule or rule[-1][-1] in "|(*+?}":
                raise ValueError(f"nothing that {token} could repeat: put what it repeats into parentheses")
            rule[-1] += "".join(token.split())
        elif kind == "name":
            rule.append(self._name(token))
        elif kind == "string":
            rule.append(_lark_string(_characters(token[1:-1])))
        elif kind == "set":
            rule.append(_lark_set(token))
        elif token == ".":
            rule.append("/(?s:.)/")
        else:
            if token != "(":
                _fill(rule)
            rule.append(token)

    def lark(self) -> str:
        missing = next((name for name in self._names if name not in self._rules), None)
        if missing is not None:
            raise ValueError(f"there is no rule {missing!r}")
        for rule in self._rules.values():
            _fill(rule)
        return "\n".join(f"{self._names[name]}: {' '.join(rule)}" for name, rule in self._rules.items())

    def _define(self, name: str) -> None:
        if name in self._rules:
            raise ValueError(f"rule {name!r} is defined twice")
        self._name(name)
        self._rule = self._rules[name] = []

    def _name(self, name: str) -> str:
        return self._names.setdefault(name, f"r{len(self._names)}")


def _fill(rule: list[str]) -> None:
    """Lark has to be told that an alternative is empty."""
    if not rule or rule[-1] in ("|", "("):
        rule.append('""')


def _characters(text: str) -> list[tuple[str, bool]]:
    """Each character of what stands in quotes or brackets, and whether it was escaped."""
    characters = []
    for match in _CHARACTER.finditer(text):
        code = match[1] or match[2] or match[3]
        if code:
            if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
                raise ValueError(f"{match[0]} is no character")
            characters.append((chr(int(code, 16)), True))
        elif match[4]:
            if match[4] not in _CONTROLS and match[4].isalnum():
                raise ValueError(f"there is no escape {match[0]}")
            characters.append((_CONTROLS.get(match[4], match[4]), True))
        else:
            characters.append((match[5], False))
    return characters


def _lark_string(characters: list[tuple[str, bool]]) -> str:
    signs = " ".join(json.dumps(sign, ensure_ascii=False) for sign, _ in characters)
    return f"({signs})" if signs else '""'


def _lark_set(token: str) -> str:
    characters = _characters(token[1:-1])
    negated = characters[0] == ("^", False)
    if negated:
        del characters[0]
    if not characters:
        raise ValueError(f"{token} holds nothing")
    parts = []
    last = len(characters) - 1
    for i, (sign, escaped) in enumerate(characters):
        between = 0 < i < last and sign == "-" and not escaped
        parts.append("-" if between else f"\\x{{{ord(sign):X}}}")
    return f"/[{'^' if negated else ''}{''.join(parts)}]/"
