"""Keeps the names in each object of a JSON text apart, which no grammar can: it would have to remember them."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lattice_serve.engine.tokenizer import Tokenizer

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OBJECT, _LIST = ord("{"), ord("[")
_ENDS = (ord("}"), ord("]"))
_COMMA = ord(",")


class QuoteTokens:
    """The tokens of a vocabulary with quotes in them, by how many they have: no other token ends a name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = ((token_id, tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
        self.texts = {token_id: text for token_id, text in texts if b'"' in text}
        self._ids = [
            np.array([token_id for token_id, text in self.texts.items() if text.count(b'"') >= least], np.int64)
            for least in (1, 2, 3)
        ]

    def allowed(self, allowed: NDArray[np.bool_], quotes: int) -> Iterable[int]:
        """Ids of the tokens that are allowed, a mask [V], and have at least so many quotes, from 1 to 3."""
        ids = self._ids[quotes - 1]
        found: list[int] = ids[allowed[ids]].tolist()
        return found


class DistinctNames:
    """Where a JSON text is, and the names in its open objects. The text is valid JSON as far as it goes."""

    __slots__ = ("_escaped", "_expects_name", "_in_name", "_in_string", "_name", "_open", "_tokens")

    def __init__(self, tokens: QuoteTokens) -> None:
        self._tokens = tokens
        self._open: list[set[bytes] | None] = []
        """The names of each open object, decoded; None for a list."""
        self._name = bytearray()
        """Of a name, what there is of it, as it is written."""
        self._in_string = self._in_name = self._escaped = self._expects_name = False

    def push(self, text: bytes) -> None:
        """Takes in what a token adds to the text."""
        self._read(text, trial=False)

    def repeating(self, allowed: NDArray[np.bool_]) -> list[int]:
        """Returns the tokens, of those allowed [V], that would end a name which its object has already."""
        if not any(self._open):
            return []
        if not self._in_string:
            quotes = 2
        elif not self._in_name:
            quotes = 3
        else:
            quotes = 1
            names = self._open[-1] or ()
            # Most names differ from all others long before their ends.
            if _BACKSLASH not in self._name and not any(name.startswith(self._name) for name in names):
                return []
        return [token_id for token_id in self._tokens.allowed(allowed, quotes) if self._repeats(token_id)]

    def _repeats(self, token_id: int) -> bool:
        trial = DistinctNames(self._tokens)
        trial._open, trial._name = list(self._open), bytearray(self._name)
        trial._in_string, trial._in_name = self._in_string, self._in_name
        trial._escaped, trial._expects_name = self._escaped, self._expects_name
        return trial._read(self._tokens.texts[token_id], trial=True)

    def _read(self, text: bytes, *, trial: bool) -> bool:
        """Goes through the text. Returns True where a name repeats. trial: the sets of names are others'."""
        repeats = False
        for byte in text:
            if not self._in_string:
                if byte == _QUOTE:
                    self._in_string, self._in_name = True, self._expects_name
                    self._expects_name = False
                    self._name.clear()
                elif byte in (_OBJECT, _LIST):
                    self._open.append(set() if byte == _OBJECT else None)
                    self._expects_name = byte == _OBJECT
                elif byte in _ENDS and self._open:
                    self._open.pop()
                    self._expects_name = False
                elif byte == _COMMA:
                    self._expects_name = bool(self._open) and self._open[-1] is not None
                continue
            if self._escaped:
                self._escaped = False
            elif byte == _BACKSLASH:
                self._escaped = True
            elif byte == _QUOTE:
                self._in_string = False
                if self._in_name:
                    repeats |= self._end_name(trial)
                continue
            if self._in_name:
                self._name.append(byte)
        return repeats

    def _end_name(self, trial: bool) -> bool:
        names = self._open[-1]
        assert names is not None, "a name stands in a list"
        name = _decoded(bytes(self._name))
        if name in names:
            return True
        if trial:
            self._open[-1] = names | {name}
        else:
            names.add(name)
        return False


def _decoded(name: bytes) -> bytes:
    """What a name says, whose characters may be escaped."""
    if _BACKSLASH not in name:
        return name
    try:
        return str(json.loads(b'"%b"' % name, strict=False)).encode(errors="surrogatepass")
    except ValueError:
        return name
