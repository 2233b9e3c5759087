"""What all request bodies share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lattice_serve.engine.errors import InvalidParameter

R = TypeVar("R", bound="RequestModel")

Count = Annotated[int, Field(ge=0, lt=2**31)]
# Without fail_fast a list of a million wrong elements makes a million error objects.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
Texts = str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
TEXTS = "give a string, a list of strings, a list of token ids or a list of lists of token ids"


def each(texts: Texts, name: str) -> Sequence[str | list[int]]:
    """One after another. Raises `InvalidParameter`, naming the field, when there is none, or one of them is empty."""
    single = isinstance(texts, str) or (bool(texts) and isinstance(texts[0], int))
    listed = cast("Sequence[str | list[int]]", [texts] if single else texts)
    if not listed or not all(listed):
        raise InvalidParameter(f"{name} is empty: give at least one token", param=name)
    return listed


class RequestModel(BaseModel):
    """A JSON body. Types are exact (no `true` for 1, no "1", no 1.0 for an integer) and numbers finite.

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
            fault = error.errors(include_url=False, include_input=False)[0]
        if not fault["loc"]:
            raise InvalidParameter(f"the body is not a JSON object of this route: {fault['msg']}")
        name = str(fault["loc"][0])
        if name in cls.remedies:
            raise InvalidParameter(f"{name}: {cls.remedies[name]}", param=name)
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"][1:])
        raise InvalidParameter(f"{name}{path}: {fault['msg'].removeprefix('Value error, ')}", param=name)
