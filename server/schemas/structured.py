"""Requests for structured output: the fields of OpenAI, those of vLLM, and vLLM's older ones, as one `Grammar`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.sampling import Grammar
from lattice_serve.server.schemas.base import Off, RequestModel, Strings

JsonSchema: TypeAlias = dict[str, Any] | str
"""An object, or its text."""


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class NamedSchema(RequestModel):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Answers keep to the schema either way; with it, a format that they cannot be kept to is refused, not ignored."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(RequestModel):
    """vLLM's: one of these."""

    json_: Annotated[JsonSchema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_any_whitespace: Off | None = None
    disable_additional_properties: Off | None = None


class StructuredRequest(RequestModel):
    remedies: ClassVar[dict[str, str]] = {
        "response_format": "give a type of text, json_object, or json_schema with json_schema: {name, schema}",
        "structured_outputs": "give one of json (a schema), json_object: true, regex, choice (strings) and grammar",
        "guided_json": "give a JSON schema",
        "guided_regex": "give a regular expression",
        "guided_choice": "give a list of strings",
        "guided_grammar": "give a grammar in EBNF",
    }

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None

    @cached_property
    def grammar(self) -> Grammar | None:
        """What the answer has to keep to. Raises `InvalidParameter` when two fields say so, or one wrongly."""
        grammars = [*self._of_response_format(), *self._of_structured_outputs(), *self._of_guided()]
        if len(grammars) > 1:
            names = " and ".join(dict.fromkeys(grammar.param for grammar in grammars))
            raise InvalidParameter(f"{names} ask for more than one grammar: give one", param=grammars[-1].param)
        return grammars[0] if grammars else None

    def _of_response_format(self) -> list[Grammar]:
        name = "response_format"
        if isinstance(self.response_format, JsonSchemaFormat):
            given = self.response_format.json_schema
            return [Grammar.json_schema(given.schema_, name, strict=given.strict is True)]
        return [Grammar.json(name)] if isinstance(self.response_format, JsonObjectFormat) else []

    def _of_structured_outputs(self) -> list[Grammar]:
        given, name = self.structured_outputs, "structured_outputs"
        if given is None:
            return []
        grammars = _grammars(name, given.json_, given.regex, given.choice, given.grammar)
        if given.json_object:
            grammars.append(Grammar.json(name))
        if not grammars:
            raise InvalidParameter(f"{name}: {self.remedies[name]}", param=name)
        return grammars

    def _of_guided(self) -> list[Grammar]:
        return [
            *_grammars("guided_json", schema=self.guided_json),
            *_grammars("guided_regex", regex=self.guided_regex),
            *_grammars("guided_choice", choice=self.guided_choice),
            *_grammars("guided_grammar", ebnf=self.guided_grammar),
        ]


def _grammars(
    param: str,
    schema: JsonSchema | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    ebnf: str | None = None,
) -> list[Grammar]:
    grammars = []
    if schema is not None:
        grammars.append(Grammar.json_schema(schema, param))
    if regex is not None:
        grammars.append(Grammar.regex(regex, param))
    if choice is not None:
        grammars.append(Grammar.choice(choice, param))
    if ebnf is not None:
        grammars.append(Grammar.ebnf(ebnf, param))
    return grammars
