"""Every error has the OpenAI shape, whatever the request is like."""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from lattice_serve.engine import errors
from lattice_serve.engine.errors import LatticeError
from lattice_serve.server.access import AccessLog
from lattice_serve.server.errors import error_response, install_handlers
from lattice_serve.server.schemas.completions import CompletionRequest
from tests.server.harness import ServerProcess

DEEP = b'{"prompt":' + b"[" * 100_000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b'"prompt"', None),
        (b"{}", "prompt"),
        (DEEP, None),
        (DEEP + b"]" * 100_000 + b"}", None),
        (b'{"prompt": "\xff\xfe"}', None),
        (rb'{"prompt": "\ud800"}', None),
        (b'{"prompt": null}', "prompt"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [[]]}', "prompt"),
        (b'{"prompt": ["a", ""]}', "prompt"),
        (b'{"prompt": 5}', "prompt"),
        (b'{"prompt": {"a": 1}}', "prompt"),
        (b'{"prompt": [1, "a"]}', "prompt"),
        (b'{"prompt": [true]}', "prompt"),
        (b'{"prompt": [1.5]}', "prompt"),
        (b'{"prompt": [[1], "a"]}', "prompt"),
        (b'{"prompt": [-1]}', "prompt"),
        (b'{"prompt": [4096]}', "prompt"),
        (b'{"prompt": [[1], [99999999999999999999]]}', "prompt"),
        (b'{"prompt": [1e400]}', "prompt"),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", None),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e400}', "temperature"),
        (b'{"prompt": "a", "temperature": -Infinity}', "temperature"),
        (b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}", "temperature"),
        (b'{"prompt": "a", "temperature": -1}', "temperature"),
        (b'{"prompt": "a", "temperature": true}', "temperature"),
        (b'{"prompt": "a", "temperature": "0.5"}', "temperature"),
        (b'{"prompt": "a", "top_p": -0.1}', "top_p"),
        (b'{"prompt": "a", "top_k": -2}', "top_k"),
        (b'{"prompt": "a", "max_tokens": 1e400}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "max_completion_tokens": 0}', "max_completion_tokens"),
        (b'{"prompt": "a", "max_tokens": 5, "max_completion_tokens": 0}', "max_completion_tokens"),
        (b'{"prompt": "a", "max_tokens": 1e30}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 16.0, "n": 1.5}', "n"),
        (b'{"prompt": [1.0, 1e400]}', "prompt"),
        (b'{"prompt": "a", "stop": ["a", ""]}', "stop"),
        (b'{"prompt": "a", "stop": "' + b"x" * 257 + b'"}', "stop"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 99999999999999999999999}', "max_tokens"),
        (b'{"prompt": "a", "min_tokens": 17}', "min_tokens"),
        (b'{"prompt": "a", "n": 0}', "n"),
        (b'{"prompt": "a", "n": 1000000}', "n"),
        (b'{"prompt": "a", "n": 3, "best_of": 2}', "best_of"),
        (b'{"prompt": "a", "best_of": 129}', "best_of"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix"),
        (b'{"prompt": "a", "prompt_logprobs": 21}', "prompt_logprobs"),
        (b'{"prompt": "a", "use_beam_search": true}', "use_beam_search"),
        (b'{"prompt": "a", "timeout": 0}', "timeout"),
        (b'{"prompt": "a", "timeout": 1e9}', "timeout"),
        (b'{"prompt": "a", "response_format": {"type": "xml"}}', "response_format"),
        (b'{"prompt": "a", "response_format": {"type": "json_schema"}}', "response_format"),
        (b'{"prompt": "a", "structured_outputs": {}}', "structured_outputs"),
        (b'{"prompt": "a", "structured_outputs": {"whitespace_pattern": " ?", "regex": "a"}}', "structured_outputs"),
        (b'{"prompt": "a", "guided_choice": ["a", 1]}', "guided_choice"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs"),
        (b'{"prompt": "a", "logprobs": true}', "logprobs"),
        (b'{"prompt": "a", "echo": 1}', "echo"),
        (b'{"prompt": "a", "stream": "yes"}', "stream"),
        (b'{"prompt": "a", "stream_options": {}}', "stream_options"),
        (b'{"prompt": "a", "stream": true, "stream_options": []}', "stream_options"),
        (b'{"prompt": "a", "stop": ""}', "stop"),
        (b'{"prompt": "a", "stop": [5]}', "stop"),
        (b'{"prompt": "a", "stop": ' + json.dumps(["x"] * 17).encode() + b"}", "stop"),
        (b'{"prompt": "a", "stop_token_ids": [5000]}', "stop_token_ids"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"5": 101}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"5": null}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"5000": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": [1]}', "logit_bias"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "seed"),
        (b'{"prompt": "a", "seed": 1.5}', "seed"),
        (b'{"prompt": "a", "priority": 1e10}', "priority"),
        (b'{"prompt": "a", "model": 5}', "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_body_is_a_400_that_names_the_field(
    server: ServerProcess, body: bytes, param: str | None, stream: bool
) -> None:
    if stream and body.endswith(b"}") and b'"stream' not in body:
        body = body[:-1] + b', "stream": true}' if param is not None and body != b"{}" else body
    response = server.http.post("/v1/completions", content=body)
    error = check_error(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param is None or param in error["message"]


@pytest.mark.parametrize("fields", ['"prompt": [%s]', '"prompt": "", "stop_token_ids": [%s]', '"prompt": [[1], [%s]]'])
def test_many_wrong_elements_make_few_errors(fields: str) -> None:
    body = "{" + fields % ",".join(["1.5"] * 10_000) + "}"
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate_json(body)
    assert caught.value.error_count() < 10


def test_many_wrong_entries_make_few_errors() -> None:
    body = json.dumps({"prompt": "", "logit_bias": {str(i): None for i in range(10_000)}})
    with pytest.raises(ValidationError, match="at most") as caught:
        CompletionRequest.model_validate_json(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_content_type_does_not_matter(server: ServerProcess, encoding: str) -> None:
    headers = {"content-type": f"application/x-www-form-urlencoded; charset={encoding}"}
    response = server.http.post("/v1/completions", content=b'{"prompt": "\xc3\xa9"}', headers=headers)
    assert response.status_code == 200


def test_a_body_of_100_mb_is_refused(server: ServerProcess) -> None:
    response = server.http.post("/v1/completions", content=b" " * 100_000_000)
    error = check_error(response, 413)
    assert str(8 << 20) in error["message"]
    assert response.headers["connection"] == "close"


async def test_who_does_not_read_while_it_sends_is_answered_too(server: ServerProcess) -> None:
    # Unlike the client above, asyncio's transports lose what they have received when they cannot send.
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        check_error(await client.post("/v1/completions", content=b" " * 100_000_000), 413)


def test_a_compressed_body_is_refused(server: ServerProcess) -> None:
    body = b'{"prompt": "a"}'
    response = server.http.post("/v1/completions", content=gzip.compress(body), headers={"content-encoding": "gzip"})
    assert "'gzip': send the body as it is" in check_error(response, 415)["message"]
    response = server.http.post("/v1/completions", content=body, headers={"content-encoding": "identity"})
    assert response.status_code == 200


def test_large_heads_are_refused(server: ServerProcess) -> None:
    for path, value in (("/health", "a" * 70_000), ("/health?" + "a" * 60_000, "a" * 10_000)):
        error = check_error(server.http.get(path, headers={"x-large": value}), 431)
        assert str(64 << 10) in error["message"]
    assert server.http.get("/health", headers={"x-large": "a" * 60_000}).status_code == 200


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-endless: ",
        b"GET /health?",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-trailer: ",
    ],
)
def test_a_head_without_an_end_is_cut_off(server: ServerProcess, start: bytes) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=10) as connection:
        connection.sendall(start)
        try:
            while sent < 100_000_000:
                connection.sendall(b"a" * 0x10000)
                sent += 0x10000
        except ConnectionError:
            pass
    assert sent < 10_000_000
    assert server.http.get("/health").status_code == 200


def test_a_body_that_does_not_tell_its_size_is_read_to_the_limit(server: ServerProcess) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while sent < 100_000_000:
                connection.sendall(chunk)
                sent += len(chunk)
        except ConnectionError:
            pass
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert sent < 40_000_000


def test_unknown_model(server: ServerProcess) -> None:
    assert check_error(server.post(prompt="a", model="gpt-4"), 404)["param"] == "model"
    check_error(server.http.get("/v1/models/gpt-4"), 404)
    check_error(server.post("/tokenize", prompt="a", model="gpt-4"), 404)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completion", "/v1/completions/", "/metrics/", "/docs", "/health/x"])
def test_unknown_route(server: ServerProcess, path: str) -> None:
    assert "/openapi.json" in check_error(server.http.get(path), 404)["message"]


GETS = ["/v1/models", "/v1/models/lattice", "/health", "/ready", "/ping", "/metrics", "/version", "/openapi.json"]


@pytest.mark.parametrize("path", [*GETS, "/tokenizer_info", "/v1/models/other", "/nowhere"])
def test_head_is_get_without_a_body(server: ServerProcess, path: str) -> None:
    head, get = server.http.head(path), server.http.get(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"] if path != "/ping" else True
    assert abs(int(head.headers["content-length"]) - len(get.content)) < 100, "metrics grow"


def test_head_of_what_only_takes_posts(server: ServerProcess) -> None:
    response = server.http.head("/v1/completions")
    assert (response.status_code, response.headers["allow"], response.content) == (405, "POST", b"")


def test_wrong_method(server: ServerProcess) -> None:
    response = server.http.get("/v1/completions")
    assert (
        (check_error(response, 405)["message"]) == "GET /v1/completions: the route does not take that method: send POST"
    )
    assert response.headers["allow"] == "POST"
    check_error(server.http.delete("/v1/models"), 405)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": [[5]] * 2049, "n": 2}, "prompt"),
        ({"prompt": ["a"] * 17, "n": 128}, "n"),
        ({"prompt": ["a"] * 17, "n": 1, "best_of": 128}, "best_of"),
    ],
)
def test_more_answers_than_one_request_may_ask_for(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    error = check_error(server.post(**fields), 400)
    assert error["param"] == param
    assert "at most 2048" in error["message"]


def test_an_unknown_engine_error_is_a_500(server: ServerProcess) -> None:
    check_error(server.post(prompt="!fail os"), 500)


def test_request_ids(server: ServerProcess) -> None:
    def answered(request_id: str) -> str:
        return server.http.get("/nowhere", headers={"x-request-id": request_id}).headers["x-request-id"]

    assert answered("client-7") == "client-7"
    for bad in ("", "a b", "x" * 129):
        assert len(answered(bad)) == 32


def test_the_log_has_no_prompt(server: ServerProcess) -> None:
    server.complete("a very private prompt")
    server.post(prompt="a very private prompt", temperature=-1)
    server.http.get("/v1/models?q=a+very+private+prompt")
    assert "private" not in server.log_path.read_text()
    assert {"method", "path", "status", "seconds", "request_id"} <= server.log_lines()[-1].keys()


STATUSES = {
    "LatticeError": 500,
    "ConfigError": 500,
    "CheckpointError": 500,
    "CacheFileError": 500,
    "RequestError": 400,
    "InvalidParameter": 400,
    "ModelNotFound": 404,
    "ResponseNotFound": 404,
    "Overloaded": 429,
    "Draining": 503,
    "EngineUnavailable": 503,
    "OutOfMemory": 503,
    "EngineDied": 500,
    "NumericalError": 500,
}


@pytest.mark.parametrize(("name", "status"), STATUSES.items())
def test_every_error_of_the_tree_has_a_status(name: str, status: int) -> None:
    response = error_response(getattr(errors, name)("text", param="field"))
    assert response.status_code == status
    error = json.loads(bytes(response.body))["error"]
    assert (error["message"], error["param"], error["code"]) == ("text", "field", status)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_the_tree_has_no_other_leaf() -> None:
    named = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, LatticeError)
    }
    assert named == STATUSES.keys()


def test_what_is_no_error_of_ours_tells_nothing() -> None:
    response = error_response(ValueError("secret"))
    assert response.status_code == 500
    assert b"secret" not in bytes(response.body)


async def test_errors_that_no_route_foresees() -> None:
    app = FastAPI()
    install_handlers(app)
    app.add_middleware(AccessLog)

    @app.get("/")
    async def route(number: int) -> float:
        return 1 / number

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        assert (await client.get("/?number=2")).json() == 0.5
        assert check_error(await client.get("/?number=x"), 400)["param"] == "number"
        assert "division" not in check_error(await client.get("/?number=0"), 500)["message"]


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of an answer that must have `status` and the OpenAI shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    assert error["message"]
    return error
