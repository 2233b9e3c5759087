"""Regular expressions of schemas: the texts of those that match few, and look-aheads as expressions of their own."""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

MAX_TEXTS = 64
_LONGEST = 100

UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


class _Bytes:
    """The 256 bytes as a vocabulary, and one token for the end."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)

    def __init__(self) -> None:
        self.tokens = [*(bytes([i]) for i in range(256)), b"\xff[end]"]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class Patterns:
    """The patterns of one schema."""

    def __init__(self) -> None:
        self._vocabulary: LLTokenizer | None = None

    def texts(self, pattern: str) -> list[str] | None:
        """Returns the texts of at most `_LONGEST` bytes that a pattern matches; None where there are more than
        `MAX_TEXTS`, or longer ones."""
        if self._vocabulary is None:
            self._vocabulary = LLTokenizer(TokenizerWrapper(_Bytes()))
        schema = json.dumps({"type": "string", "pattern": pattern})
        source = LLMatcher.grammar_from_json_schema(schema, overrides={"json_allowed_escapes": 'nrbtf\\"'})
        matcher = LLMatcher(self._vocabulary, source, log_level=0)
        if matcher.is_error():
            return None  # compiling the schema says why
        begun, done = [b""], list[bytes]()
        for _ in range(_LONGEST):
            longer: list[bytes] = []
            for text in begun:
                if len(longer) + len(done) > MAX_TEXTS:
                    return None
                at = matcher.deep_copy()
                at.consume_tokens(list(text))
                bits = int.from_bytes(at.compute_bitmask(), "little")
                longer += [text + bytes([i]) for i in range(256) if bits >> i & 1]
                if bits >> 256:
                    done.append(text)
            begun = longer
            if not begun:
                return sorted(json.loads(text) for text in done)
        return None


def without_look_aheads(pattern: str) -> list[str]:
    """Returns patterns that together match what one does that looks ahead from its start, as in `^(?=.*[0-9])[a-z]+$`.

    A pattern that looks elsewhere is returned as it is.
    """
    found = []
    while pattern.startswith("^(?="):
        end = _end_of_group(pattern, 1)
        if end is None or _alternatives(pattern[end:]):
            break
        found.append(f"^(?:{pattern[4 : end - 1]})")
        pattern = f"^{pattern[end:]}"
    return [*found, pattern]


def _end_of_group(pattern: str, start: int) -> int | None:
    """Returns the place after the group that begins at `start`."""
    for place, depth in _depths(pattern, start):
        if depth == 0:
            return place + 1
    return None


def _alternatives(pattern: str) -> bool:
    """Whether a bar divides all of a pattern."""
    return any(depth == 0 and pattern[place] == "|" for place, depth in _depths(pattern, 0))


def _depths(pattern: str, start: int) -> list[tuple[int, int]]:
    """Returns the places of a pattern that are no escapes and not in brackets, each with the groups open after it."""
    depths, depth, in_brackets, place = [], 0, False, start
    while place < len(pattern):
        sign = pattern[place]
        if sign == "\\":
            place += 2
            continue
        if in_brackets:
            in_brackets = sign != "]"
        elif sign == "[":
            in_brackets = True
        else:
            depth += (sign == "(") - (sign == ")")
            depths.append((place, depth))
        place += 1
    return depths
