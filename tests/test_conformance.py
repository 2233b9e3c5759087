"""`docs/conformance.md` against the fields that OpenAI's client knows, the schemas here, and the tests it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from lattice_serve.engine.sampling import MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOP_STRINGS
from lattice_serve.server.schemas.base import RequestModel
from lattice_serve.server.schemas.chat import MAX_MESSAGES, MAX_TOOLS, ChatRequest
from lattice_serve.server.schemas.completions import CompletionRequest
from lattice_serve.server.schemas.embeddings import EmbeddingRequest
from lattice_serve.server.schemas.generation import MAX_CHOICES
from lattice_serve.server.schemas.responses import ResponseRequest
from lattice_serve.server.settings import Settings

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| `(?P<field>\w+)` \| (?P<does>\w+) \|(?P<how>.*)\| `(?P<test>[\w.:]+)` \|")
ROUTES: dict[str, tuple[type[RequestModel], type[Any]]] = {
    "/v1/completions": (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
    "/v1/chat/completions": (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
    "/v1/responses": (ResponseRequest, response_create_params.ResponseCreateParamsStreaming),
    "/v1/embeddings": (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
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


def test_variables_in_documents_are_settings() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    names = {name for path in documents for name in re.findall(r"LATTICE_([A-Z_]+[A-Z])", path.read_text("utf-8"))}
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    assert {"REQUEST_SECONDS", "MAX_BODY_BYTES", "MAX_HEADER_BYTES", "KEEP_ALIVE_SECONDS"} <= names


def test_limits_are_the_defaults() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text("utf-8").partition("## Limits\n")[2].partition("\n## ")[0]
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    units = {"MiB": 1 << 20, "KiB": 1 << 10, "s": 1}
    stated = re.findall(r"\| (\d+) (MiB|KiB|s) \(`LATTICE_(\w+)`\)", text)
    assert len(stated) == 6
    assert {name.lower(): int(n) * units[unit] for n, unit, name in stated}.items() <= defaults.items()
    assert f"{MAX_CHOICES} / {MAX_LOGPROBS} / {MAX_STOP_STRINGS} of {MAX_STOP_LENGTH} characters" in text
    assert f"{MAX_MESSAGES:,} / {MAX_TOOLS}" in text
