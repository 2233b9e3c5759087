"""What a request asks of the sampler, validated once and shared by every layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.json_schema.annotations import without_annotations

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_BYTES = 1 << 16
MAX_SCHEMA_BYTES = 2 << 20
"""Of JSON schemas without their annotations. OpenAI's limit of 120,000 characters of names and values is lower."""

GrammarKind: TypeAlias = Literal["json_schema", "tool_calls", "regex", "choice", "ebnf"]


class CallableFunction(NamedTuple):
    """A function that an answer may call."""

    name: str
    parameters: dict[str, Any]
    """A JSON schema, a document of its own."""
    strict: bool = False
    """See `Grammar.json_schema`."""


JSON_KINDS = ("json_schema", "tool_calls")
"""Kinds of grammars whose texts are JSON."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A language that an answer is a text of; `engine.grammar` compiles it. Use the constructors below.

    All raise `InvalidParameter`, naming `param`, for what is empty, too long or no text.
    """

    kind: GrammarKind
    text: str
    """As JSON: a JSON schema; for tool calls, `functions` and `one`; a list of choices. Else what was given."""
    param: str = "grammar"
    """What errors call it: the request's field."""

    def __post_init__(self) -> None:
        if not self.text:
            raise InvalidParameter(f"{self.param} is empty: leave it out, or say what to generate", param=self.param)
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise InvalidParameter(
                f"{self.param} holds a lone surrogate: give text that is valid Unicode", param=self.param
            ) from error
        most = MAX_SCHEMA_BYTES if self.kind in JSON_KINDS else MAX_GRAMMAR_BYTES
        if size > most:
            raise InvalidParameter(f"{self.param} has {size} bytes: give at most {most}", param=self.param)

    @classmethod
    def json(cls, param: str = "grammar") -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, param)

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | str, param: str = "grammar", *, strict: bool = False) -> Grammar:
        """What a JSON schema describes, properties in its order. A string is the schema as JSON.

        `strict` refuses formats that answers cannot be kept to, which are ignored else.
        """
        try:
            document = json.loads(schema) if isinstance(schema, str) else schema
            text = _json(without_annotations(document, strict=strict))
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(f"{param} is no JSON schema: {error}", param=param) from error
        return cls(kind="json_schema", text=text, param=param)

    @classmethod
    def tool_calls(cls, functions: Sequence[CallableFunction], *, one: bool, param: str = "grammar") -> Grammar:
        """A JSON list of calls of functions, of a single one with `one`: `{"name": ..., "arguments": {...}}`."""
        described = []
        for function in functions:
            try:
                parameters = without_annotations(function.parameters, strict=function.strict)
            except ValueError as error:
                raise InvalidParameter(f"{param}: the parameters of {function.name}: {error}", param=param) from error
            described.append({"name": function.name, "parameters": parameters})
        return cls(kind="tool_calls", text=_json({"functions": described, "one": one}), param=param)

    @classmethod
    def regex(cls, pattern: str, param: str = "grammar") -> Grammar:
        """What matches all of a regular expression, in the syntax of Rust's: no look-around, no back-references."""
        return cls(kind="regex", text=pattern, param=param)

    @classmethod
    def choice(cls, choices: Sequence[str], param: str = "grammar") -> Grammar:
        """One of some strings."""
        if not choices or not all(choices):
            raise InvalidParameter(f"{param} holds no string, or an empty one: give some to choose from", param=param)
        return cls(kind="choice", text=_json(choices), param=param)

    @classmethod
    def ebnf(cls, text: str, param: str = "grammar") -> Grammar:
        """A context-free grammar: EBNF with a rule `root ::= ...` as llama.cpp's GBNF, or Lark with `start: ...`."""
        return cls(kind="ebnf", text=text, param=param)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one sequence are chosen and when it ends.

    Raises `InvalidParameter`, naming the field, when a value is out of its range; this holds for
    keyword construction and for decoding from a message alike.
    """

    max_tokens: int = 16
    """Tokens to generate at most. 0 only scores the prompt."""
    temperature: float = 1.0
    """0 is greedy: the most likely token, the lowest id on a tie."""
    top_p: float = 1.0
    """0 is greedy, too."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """Tokens less likely than `min_p` times the most likely one are dropped."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or answer."""
    logit_bias: dict[int, float] = {}
    """Token id -> amount added to its logit, -100 to 100."""
    seed: int | None = None
    """None draws one; any integer gives the same tokens for the same prompt, whatever the batch."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; the text stops before the first of them."""
    include_stop: bool = False
    """Keep the stop string in the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    """Until that many tokens are out, neither end-of-text nor stop tokens can be chosen."""
    logprobs: int | None = None
    """None: none. k: the chosen token's log-probability and the k most likely ones'."""
    prompt_logprobs: int | None = None
    """The same for every prompt token (the first has none)."""
    grammar: Grammar | None = None
    """The answer is one of its texts, unless a limit or a stop string cuts it short: it can end only where the
    text is complete, and does where nothing could follow."""

    def __post_init__(self) -> None:
        _convert(self)
        check = _Checker(self)
        check("max_tokens", lambda x: x >= 0, "at least 0")
        check("temperature", lambda x: 0 <= x <= 100, "between 0 and 100")
        check("top_p", lambda x: 0 <= x <= 1, "between 0 and 1")
        check("top_k", lambda x: x >= 0, "at least 0 (0 is off)")
        check("min_p", lambda x: 0 <= x <= 1, "between 0 and 1")
        check("presence_penalty", lambda x: -2 <= x <= 2, "between -2 and 2")
        check("frequency_penalty", lambda x: -2 <= x <= 2, "between -2 and 2")
        check("repetition_penalty", lambda x: 0 < x <= 100, "above 0 and at most 100")
        check("min_tokens", lambda x: 0 <= x <= self.max_tokens, "between 0 and max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check(name, lambda x: 0 <= x <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        if self.seed is not None:
            check("seed", lambda x: -(2**63) <= x < 2**63, "a 64-bit integer")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidParameter(
                f"logit_bias has {len(self.logit_bias)} entries: give at most {MAX_LOGIT_BIAS}",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            if not (0 <= token_id < 2**63 and -100 <= bias <= 100):
                raise InvalidParameter(
                    f"logit_bias[{token_id}] is {bias}: give token ids from 0 and amounts from -100 to 100",
                    param="logit_bias",
                )
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise InvalidParameter(
                f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters",
                param="stop",
            )
        if any(not 0 <= token_id < 2**63 for token_id in self.stop_token_ids):
            raise InvalidParameter("stop_token_ids holds what is no token id: give ids from 0", param="stop_token_ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0


_TYPES: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}


def _convert(params: SamplingParams) -> None:
    """Make each field the type that it says: integers where numbers are asked for, lists for tuples. Raises
    `InvalidParameter` for what is neither."""
    for name, kind in _TYPES.items():
        value = getattr(params, name)
        try:
            converted = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise InvalidParameter(f"{name}: {error}", param=name) from error
        except OverflowError as error:
            raise InvalidParameter(f"{name} is {value}: give a smaller number", param=name) from error
        if converted is not value:
            msgspec.structs.force_setattr(params, name, converted)


class _Checker:
    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    def __call__(self, name: str, holds: Callable[[float], bool], remedy: str) -> None:
        value = getattr(self.params, name)
        # The bounds of a message's integers; NaN and the infinities are outside, too.
        if not (-(2**63) <= value < 2**63 and holds(value)):
            raise InvalidParameter(f"{name} is {value}: give {remedy}", param=name)
