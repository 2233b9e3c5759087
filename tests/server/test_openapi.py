"""The description at `/openapi.json` against what the server does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server.harness import ServerProcess


@pytest.fixture(scope="module")
def description(server: ServerProcess) -> dict[str, Any]:
    answer: dict[str, Any] = server.http.get("/openapi.json").raise_for_status().json()
    return answer


def test_it_has_every_route(description: dict[str, Any]) -> None:
    assert description["paths"].keys() == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/models",
        "/v1/models/{model_id}",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/ready",
        "/ping",
        "/metrics",
        "/version",
    }
    names = [operation["operationId"] for path in description["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    references = {reference.removeprefix("#/components/schemas/") for reference in _references(description)}
    assert references <= schemas.keys()
    assert {"CompletionRequest", "ChatRequest", "Completion", "ChatCompletion", "Failure"} <= references


def test_errors_are_documented(server: ServerProcess, description: dict[str, Any]) -> None:
    for path, operations in description["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            assert "422" not in responses
            assert {"200", "401", "405", "413", "415", "431", "500"} <= responses.keys()
            if path.startswith("/v1/c"):
                assert {"400", "404", "408", "429", "503"} <= responses.keys()
            for status, response in responses.items():
                if status != "200":
                    assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Failure"}
    error = server.http.get("/nowhere").json()
    fault = description["components"]["schemas"]["Fault"]
    assert error["error"].keys() == set(fault["required"]) == fault["properties"].keys()


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 2, "prompt_logprobs": 1}, "Completion"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "max_tokens": 2},
            "ChatCompletion",
        ),
    ],
)
def test_answers_have_the_fields_that_it_names(
    server: ServerProcess, description: dict[str, Any], path: str, body: dict[str, Any], model: str
) -> None:
    schemas = description["components"]["schemas"]
    answer = server.post(path, **body).json()
    assert answer.keys() == schemas[model]["properties"].keys()
    choice = schemas[model]["properties"]["choices"]["items"]["$ref"].rpartition("/")[2]
    assert answer["choices"][0].keys() == schemas[choice]["properties"].keys()
    assert description["paths"][path]["post"]["responses"]["200"]["content"].keys() == {
        "application/json",
        "text/event-stream",
    }


def test_a_key_is_told_of(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(api_key="key")
    assert server.http.get("/openapi.json").status_code == 401
    description = server.http.get("/openapi.json", headers={"authorization": "Bearer key"}).json()
    assert description["security"] == [{"key": []}]
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def _references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (each for name, each in value.items() if name == "$ref")
        for each in value.values():
            yield from _references(each)
    if isinstance(value, list):
        for each in value:
            yield from _references(each)
