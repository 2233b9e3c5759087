"""`POST /v1/embeddings`: vectors for texts, and what is refused."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import openai
import pytest

from lattice_serve.engine.models.registry import load_config
from lattice_serve.server.settings import BUNDLED_MODEL
from tests.server.harness import ServerProcess


def embed(server: ServerProcess, **body: Any) -> dict[str, Any]:
    response = server.post("/v1/embeddings", **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def expected(tokens: int) -> list[float]:
    """What the fake engine says of so many tokens, made a unit vector."""
    length = math.hypot(3.0 * tokens, 4.0)
    return [3.0 * tokens / length, 4.0 / length, 0.0]


def test_inputs_of_all_four_kinds(server: ServerProcess) -> None:
    ids = server.post("/tokenize", prompt="Good morning").json()["tokens"]
    one = embed(server, input="Good morning", user="me", model="lattice")
    assert one == embed(server, input=ids) == embed(server, input=["Good morning"]) == embed(server, input=[ids])
    assert one["object"] == "list"
    assert one["model"] == "lattice"
    assert one["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}
    [vector] = one["data"]
    assert (vector["object"], vector["index"]) == ("embedding", 0)
    assert vector["embedding"] == pytest.approx(expected(len(ids)))


def test_many_texts_come_in_order(server: ServerProcess) -> None:
    texts = [[5] * count for count in (4, 1, 3, 2)]
    data = embed(server, input=texts, pooling="last")["data"]
    assert [vector["index"] for vector in data] == [0, 1, 2, 3]
    assert [vector["embedding"][0] for vector in data] == pytest.approx([expected(len(ids))[0] for ids in texts])


def test_as_many_texts_as_openai_takes(server: ServerProcess) -> None:
    """Far more than may run and wait at once."""
    texts = [[5] * (1 + index % 7) for index in range(2048)]
    answer = embed(server, input=texts)
    assert [vector["index"] for vector in answer["data"]] == list(range(2048))
    assert [vector["embedding"][0] for vector in answer["data"]] == [expected(len(ids))[0] for ids in texts]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_the_models_own_length_may_be_asked_for(server: ServerProcess) -> None:
    size = load_config(BUNDLED_MODEL).hidden_size
    assert embed(server, input="a", dimensions=size) == embed(server, input="a")
    error = server.post("/v1/embeddings", input="a", dimensions=size // 2).json()["error"]
    assert f"have {size} numbers" in error["message"]


def test_base64(server: ServerProcess) -> None:
    plain = embed(server, input="a b c", encoding_format="float")["data"][0]["embedding"]
    coded = base64.b64decode(embed(server, input="a b c", encoding_format="base64")["data"][0]["embedding"])
    assert list(struct.unpack("<3f", coded)) == pytest.approx(plain)


def test_the_openai_client(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model="lattice", input=[[1, 2], [3]])
    assert [vector.embedding for vector in answer.data] == [pytest.approx(expected(2)), pytest.approx(expected(1))]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": [1, "a"]}, 400, "input"),
        ({"input": [-1]}, 400, "input"),
        ({"input": [[4096]]}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": [[5]] * 2049}, 400, "input"),
        ({"input": [[5] * 3000] * 101}, 400, "input"),
        ({}, 400, "input"),
        ({"input": "a", "dimensions": 3}, 400, "dimensions"),
        ({"input": "a", "dimensions": 10**6}, 400, "dimensions"),
        ({"input": "a", "dimensions": "3"}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "text"}, 400, "encoding_format"),
        ({"input": "a", "pooling": "max"}, 400, "pooling"),
        ({"input": "a", "model": "other"}, 404, "model"),
    ],
)
def test_what_is_refused_is_named(server: ServerProcess, body: dict[str, Any], status: int, param: str) -> None:
    response = server.post("/v1/embeddings", **body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_a_failure_is_told(server: ServerProcess) -> None:
    assert server.post("/v1/embeddings", input="!fail NumericalError").status_code == 500
