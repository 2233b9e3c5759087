"""The routes beside completions, and the API key."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.harness import ServerProcess


def test_models(server: ServerProcess) -> None:
    (card,) = server.http.get("/v1/models").json()["data"]
    assert card.keys() == {"id", "object", "created", "owned_by", "root", "max_model_len"}
    assert card["id"] == "lattice"
    assert server.http.get("/v1/models/lattice").json() == card


def test_a_model_name_may_have_slashes(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(served_model_name="org/small model")
    assert server.http.get("/v1/models/org/small%20model").json()["id"] == "org/small model"
    assert server.complete("a", model="org/small model")["model"] == "org/small model"


def test_tokenize_and_back(server: ServerProcess) -> None:
    text = "  Ünïcode 😀, kept\nas it is "
    answer = server.post("/tokenize", prompt=text, return_token_strs=True, add_special_tokens=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] > 1_000_000
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    long = text * 1000
    ids = server.post("/tokenize", prompt=long).json()["tokens"]
    assert server.post("/detokenize", tokens=ids).json() == {"prompt": long}


def test_detokenize_checks_ids(server: ServerProcess) -> None:
    for tokens in ([-1], [4096], ["a"], None):
        response = server.post("/detokenize", tokens=tokens)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tokens"


def test_health_ready_version(server: ServerProcess) -> None:
    assert server.http.get("/health").json() == {
        "status": "ok",
        "engine": "ready",
        "restarts": 0,
        "engines": [{"state": "ready", "restarts": 0}],
    }
    assert server.http.head("/health").status_code == 200
    assert server.http.get("/ready").json()["rows"] == 8
    assert server.http.get("/ping").status_code == 200
    assert server.http.get("/version").json() == {"version": importlib.metadata.version("lattice-serve")}


def test_no_cors(server: ServerProcess) -> None:
    response = server.http.get("/v1/models", headers={"origin": "http://elsewhere.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_cors_for_the_origins_that_are_named(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(cors_origins="http://a.example, http://b.example", api_key="key")
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("http://a.example", True), ("http://b.example", True), ("http://c.example", False)):
        # Browsers ask without a key, and must be able to read what is refused.
        preflight = server.http.options("/v1/completions", headers={"origin": origin, **asked})
        assert (preflight.status_code == 200) == allowed
        for answer in (preflight, server.http.get("/v1/models", headers={"origin": origin})):
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
            assert answer.headers["x-request-id"]
    assert server.http.get("/v1/models").status_code == 401


def test_tokenizer_info(server: ServerProcess) -> None:
    info = server.http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["vocab_size"]) == ("<|endoftext|>", None, 4096)
    assert "Assistant:" in info["chat_template"]
    # As lm-eval asks for the id of the end of text.
    assert server.post("/tokenize", prompt=info["eos_token"], add_special_tokens=False).json()["tokens"] == [1]


def test_tokenize_takes_a_text_or_messages(server: ServerProcess) -> None:
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "a"}]).json()
    assert server.post("/detokenize", tokens=chat["tokens"]).json()["prompt"] == "User: a\nAssistant:"
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"messages": [{"role": "user"}]}, "messages"),
    ):
        response = server.post("/tokenize", **body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


@pytest.fixture
def locked(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> ServerProcess:
    keys = tmp_path / "keys"
    keys.write_text("third\n\n  fourth, with a comma \n")
    return start_server(api_key="first, sécond", api_key_file=str(keys), host="127.0.0.1")


def test_api_keys(locked: ServerProcess) -> None:
    for key in ("first", "sécond", "third", "fourth, with a comma"):
        assert locked.http.post("/tokenize", json={"prompt": "a"}, headers=bearer(key)).status_code == 200
    for header in (
        {},
        bearer("firs"),
        bearer("first, sécond"),
        {b"authorization": b"Bearer"},
        {b"authorization": b"Basic first"},
    ):
        for method, path in (("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/x")):
            response = locked.http.request(method, path, headers=header)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == 401
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/ping"):
        assert locked.http.get(path).status_code == 200


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


def test_the_server_never_loads_torch() -> None:
    code = "import sys, lattice_serve.server.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
