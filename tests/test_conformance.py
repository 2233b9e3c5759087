"""`docs/conformance.md` against the fields that OpenAI's client knows, the schemas here, and the tests it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from lattice_serve.server.schemas.base import RequestModel
from lattice_serve.server.schemas.chat import ChatRequest
from lattice_serve.server.schemas.completions import CompletionRequest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| `(?P<field>\w+)` \| (?P<does>\w+) \|(?P<how>.*)\| `(?P<test>[\w.:]+)` \|")
ROUTES: dict[str, tuple[type[RequestModel], type[Any]]] = {
    "/v1/completions": (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
    "/v1/chat/completions": (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
}


def rows(route: str) -> list[re.Match[str]]:
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    section = text.partition(f"## `POST {route}`\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    found = [ROW.fullmatch(line) for line in lines]
    assert all(found), "a row is not as the others"
    return [row for row in found if row is not None]


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_of_the_client_has_a_row(route: str) -> None:
    fields = [row["field"] for row in rows(route)]
    assert len(set(fields)) == len(fields)
    assert set(fields) == set(ROUTES[route][1].__annotations__)


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_not_ignored_is_in_the_schema(route: str) -> None:
    known = ROUTES[route][0].model_fields
    for row in rows(route):
        assert row["does"] in ("supported", "refused", "ignored")
        assert (row["field"] in known) == (row["does"] != "ignored"), row["field"]


@pytest.mark.parametrize("route", ROUTES)
def test_every_row_names_a_test_that_there_is(route: str) -> None:
    for row in rows(route):
        module, *path = row["test"].split("::")
        nodes = ast.parse((ROOT / "tests" / "server" / module).read_text(encoding="utf-8")).body
        for name in path:
            named = {node.name: node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
            assert name in named, row["test"]
            nodes = named[name].body
