"""API keys beside each other: places in a full queue, weights, and what is stored. The rest of it is the engine's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.harness import ServerProcess, wait_for

StartServer = Callable[..., ServerProcess]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def keyed(server: ServerProcess, key: str, path: str = "/v1/completions", **body: object) -> httpx.Response:
    return server.http.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def live(server: ServerProcess, count: int) -> None:
    wait_for(lambda: len(server.records("submit")) >= count)


def samples(server: ServerProcess) -> str:
    return server.http.get("/metrics", headers={"authorization": "Bearer a"}).raise_for_status().text


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_full_queue_has_room_for_a_key_below_its_share(
    tmp_path: Path, start_server: StartServer, pool: ThreadPoolExecutor, replicas: int
) -> None:
    """Of 8 places a has 8: b has 4 more, and heavy, whose weight is 2, half of those there are for three keys."""
    (tmp_path / "keys").write_text("a\nb\nheavy weight=2\n")
    size = {"max_rows": 2 // replicas, "max_waiting": 6 // replicas, "replicas": replicas}
    server = start_server(api_key_file=str(tmp_path / "keys"), **size)
    wait_for(lambda: server.http.get("/ready").json()["rows"] == 2)
    begun = 0

    def begin(key: str, count: int) -> None:
        nonlocal begun
        for _ in range(count):
            answers.append(pool.submit(keyed, server, key, prompt="!stall", timeout=5))
        begun += count
        live(server, begun)

    def refused(key: str) -> str:
        response = keyed(server, key, prompt="x")
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        return str(response.json()["error"]["message"])

    answers: list[object] = []
    begin("a", 8)
    assert "8 sequences run or wait" in refused("a")
    begin("b", 4)
    assert "this key has its share of them, 4" in refused("b")
    assert "this key has its share of them, 8" in refused("a")
    begin("heavy", 4)
    refused("heavy")
    text = samples(server)
    assert 'admission_rejections_total{model_name="lattice",reason="queue_full"} 1.0' in text
    assert 'admission_rejections_total{model_name="lattice",reason="key_quota"} 3.0' in text
    assert 'lattice:active_keys{model_name="lattice"} 3.0' in text
    assert all(answer.result().status_code == 408 for answer in answers)  # type: ignore[attr-defined]
    assert 'lattice:active_keys{model_name="lattice"} 0.0' in samples(server)


def test_the_engine_is_told_whose_a_sequence_is(tmp_path: Path, start_server: StartServer) -> None:
    (tmp_path / "keys").write_text("# of the team\na weight=5\nb\n")
    server = start_server(api_key_file=str(tmp_path / "keys"))
    for key in "ab":
        assert keyed(server, key, prompt="x", max_tokens=1, cache_salt="s").status_code == 200
        assert keyed(server, key, "/v1/embeddings", input="x").status_code == 200
    tenants = {key: hashlib.sha256(key.encode()).hexdigest() for key in "ab"}
    told = [(record["tenant"], record["weight"], record["salt"]) for record in server.records("submit")]
    assert told == [(tenants["a"], 5, "s"), (tenants["a"], 5, ""), (tenants["b"], 1, "s"), (tenants["b"], 1, "")]
    assert "weight" not in server.log_path.read_text()


def test_without_keys_all_are_one(server: ServerProcess) -> None:
    server.complete("x", cache_salt="a/b")
    last = server.records("submit")[-1]
    assert (last["tenant"], last["weight"], last["salt"]) == ("", 1, "a/b")
