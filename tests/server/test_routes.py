"""The routes beside completions, and the API key."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable

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
    assert server.http.get("/health").json() == {"status": "ok", "engine": "ready", "restarts": 0}
    assert server.http.head("/health").status_code == 200
    assert server.http.get("/ready").json()["rows"] == 8
    assert server.http.get("/ping").status_code == 200
    assert server.http.get("/version").json() == {"version": importlib.metadata.version("lattice-serve")}


def test_no_cors(server: ServerProcess) -> None:
    response = server.http.get("/v1/models", headers={"origin": "http://elsewhere.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.fixture
def locked(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server(api_key="first, sécond", host="127.0.0.1")


def test_api_keys(locked: ServerProcess) -> None:
    for key in ("first", "sécond"):
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
