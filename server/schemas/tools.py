"""Functions that a chat offers to the model, and the calls it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.sampling import Grammar
from lattice_serve.server.schemas.base import RequestModel

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class CalledFunction(RequestModel):
    name: str
    arguments: str
    """JSON."""


class Call(RequestModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(RequestModel):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Arguments keep to the schema where a call must be made, and are the model's own where it may be."""

    @model_validator(mode="after")
    def _check(self) -> Function:
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise ValueError("parameters describe no object: give a schema of type object")
        return self


class Tool(RequestModel):
    type: Literal["function"]
    function: Function


class NamedFunction(RequestModel):
    name: str


class NamedTool(RequestModel):
    type: Literal["function"]
    function: NamedFunction


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool


def calls(functions: Sequence[Function], *, one: bool) -> Grammar:
    """A JSON list of calls of `functions`, of a single one with `one`, whose arguments keep to their schemas.

    Raises `InvalidParameter` where two functions give one name to different definitions.
    """
    kinds = []
    shared: dict[str, dict[str, Any]] = {}
    for function in functions:
        parameters: dict[str, Any] = {"type": "object"} | (function.parameters or {})
        # References are from the root of the schema.
        for place in ("$defs", "definitions"):
            if not isinstance(parameters.get(place), dict):
                continue
            for name, definition in parameters.pop(place).items():
                if shared.setdefault(place, {}).setdefault(name, definition) != definition:
                    raise InvalidParameter(
                        f"tools: two functions have different {place} of the name {name[:100]!r}: rename one",
                        param="tools",
                    )
        properties = {"name": {"const": function.name}, "arguments": parameters}
        kinds.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    limits = {"minItems": 1, "maxItems": 1} if one else {"minItems": 1}
    return Grammar.json_schema({"type": "array", "items": {"anyOf": kinds}, **limits, **shared}, "tools")
