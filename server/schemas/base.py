"""What all request bodies share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, TypeVar, cast

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lattice_serve.engine.errors import InvalidParameter

R = TypeVar("R", bound="RequestModel")

Count = Annotated[int, Field(ge=0, lt=2**31)]
# Without fail_fast a list of a million wrong elements makes a million error objects.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
Texts = str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]


def _boolean(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):  # 0 equals False, in a Literal, too
        raise ValueError("Input should be a valid boolean")
    return value


Off = Annotated[Literal[False], BeforeValidator(_boolean)]
"""Of a field that is known and not served: `false` alone."""
MAX_INTEGER = 2.0**63
TEXTS = "give a string, a list of strings, a list of token ids or a list of lists of token ids"


def each(texts: Texts, name: str, most: int) -> Sequence[str | list[int]]:
    """One after another.

    Raises `InvalidParameter`, naming the field, when there is none, one is empty, or more than `most` are there.
    """
    single = isinstance(texts, str) or (bool(texts) and isinstance(texts[0], int))
    listed = cast("Sequence[str | list[int]]", [texts] if single else texts)
    if not listed or not all(listed):
        raise InvalidParameter(f"{name} is empty: give at least one token", param=name)
    if len(listed) > most:
        raise InvalidParameter(f"{name} holds {len(listed)} texts: give at most {most} in one request", param=name)
    return listed


def _with_integers(body: bytes) -> bytes:
    """`body` with each integer that is written with a fraction or an exponent (16.0, 1e2) written without."""
    try:
        return msgspec.json.encode(_DECODER.decode(body))
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return body


def _number(text: str) -> int | float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("JSON could not hold it again")
    return int(number) if number.is_integer() and abs(number) < MAX_INTEGER else number


_DECODER = msgspec.json.Decoder(float_hook=_number)


class RequestModel(BaseModel):
    """A JSON body. Types are exact (no `true` for 1, no "1"; but 1.0 is an integer, as JSON has it) and numbers finite.

    Unknown fields are ignored, for clients send many.
    """

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )

    remedies: ClassVar[dict[str, str]] = {}
    """Field -> what to give, where pydantic explains a type poorly."""
    id_fields: ClassVar[tuple[str, ...]] = ()
    """Those that hold token ids, of which there may be millions: in a large body they are `array`s."""

    @classmethod
    def parse(cls: type[R], body: bytes) -> R:
        """Raises `InvalidParameter` that names the first wrong field."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
        # Looked for in what is refused alone: 1.0 for 1 is rare, and most bodies are read once.
        whole = _with_integers(body) if any(fault["type"] == "int_type" for fault in faults) else body
        if whole != body:
            return cls.parse(whole)
        fault = faults[0]
        if not fault["loc"]:
            raise InvalidParameter(f"the body is not a JSON object of this route: {fault['msg']}")
        name = str(fault["loc"][0])
        if name in cls.remedies:
            raise InvalidParameter(f"{name}: {cls.remedies[name]}", param=name)
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"][1:])
        raise InvalidParameter(f"{name}{path}: {fault['msg'].removeprefix('Value error, ')}", param=name)
