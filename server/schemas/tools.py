"""Functions that a chat offers to the model, and the calls it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from lattice_serve.engine.sampling import CallableFunction, Grammar
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
    """Arguments keep to the schema where a call must be made, and are the model's own where it may be. What cannot be
    enforced of the schema is then refused instead of ignored."""

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
    """A JSON list of calls of `functions`, of a single one with `one`, whose arguments keep to their schemas."""
    callables = [
        CallableFunction(function.name, function.parameters or {}, function.strict is True) for function in functions
    ]
    return Grammar.tool_calls(callables, one=one, param="tools")
