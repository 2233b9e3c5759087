"""What the prefix cache saves over HTTP: conversations, equal prompts, and nothing from one API key to another."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from lattice_serve.engine.weights import bundled_model
from tests.e2e.harness import RealServer
from tests.server.harness import alive, wait_for


def test_a_conversation_of_20_turns(start_server: Callable[..., RealServer]) -> None:
    """Each turn runs the new message alone: the tokens around it, and the last of the answer before it."""
    server = start_server(model=bundled_model())
    messages: list[dict[str, str]] = []
    runs = []
    for turn in range(20):
        message = f"And what did she say to the {['man', 'lady', 'king', 'boy'][turn % 4]}?"
        messages.append({"role": "user", "content": message})
        body = {"messages": messages, "max_tokens": 24, "temperature": 0}
        answer = server.http.post("/v1/chat/completions", json=body).json()
        usage = answer["usage"]
        runs.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    new = len(server.http.post("/tokenize", json={"prompt": f"\nUser: {message}\nAssistant:"}).json()["tokens"])
    assert max(runs[1:]) <= new + 2, runs
    metrics = server.metrics()
    assert metrics["prompt_tokens_total"] == sum(runs)
    assert metrics['prefix_cache_misses_total{reason="new"}'] == 1
    assert metrics["prefix_cache_entries"] >= 20


def ask(server: RealServer, **body: Any) -> dict[str, Any]:
    response = server.http.post("/v1/completions", json={"max_tokens": 4, "temperature": 0, "ignore_eos": True} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_the_same_answer_from_the_cache(server: RealServer) -> None:
    prompt = list(range(700, 760))
    first = ask(server, prompt=prompt, logprobs=3)
    again = ask(server, prompt=prompt, logprobs=3)
    assert (cached(first), cached(again)) == (0, 60)
    assert again["choices"] == first["choices"]
    scored = ask(server, prompt=prompt, logprobs=3, echo=True)
    assert cached(scored) == 0
    assert scored["choices"][0]["logprobs"]["token_logprobs"][60:] == first["choices"][0]["logprobs"]["token_logprobs"]


def test_marked_places_and_warming(server: RealServer) -> None:
    prompt = list(range(800, 860))
    warm = ask(server, prompt=prompt, max_tokens=0, cache_points=[20, 60])
    assert warm["choices"][0]["text"] == ""
    assert cached(ask(server, prompt=[*prompt, 3])) == 60
    assert cached(ask(server, prompt=[*prompt[:20], 3])) == 20
    refused = server.post(prompt=prompt, cache_points=[61])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "cache_points"


def test_keys_and_salts_do_not_share(start_server: Callable[..., RealServer]) -> None:
    server = start_server(api_key="one,two")
    prompt = list(range(900, 940))

    def tokens(key: str, salt: str | None = None) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        body = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt}
        response = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        return cached(response.json())

    assert [tokens("one"), tokens("two"), tokens("one", "a"), tokens("one", "b")] == [0, 0, 0, 0]
    assert [tokens("one"), tokens("two"), tokens("one", "a"), tokens("one", "b")] == [40, 40, 40, 40]


def test_choices_of_one_prompt_run_it_once(server: RealServer) -> None:
    before = server.metrics()["prompt_tokens_total"]
    answer = ask(server, prompt=list(range(950, 1010)), n=8, temperature=1, seed=1)
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    assert server.metrics()["prompt_tokens_total"] == before + 60


def test_states_outlive_the_server(start_server: Callable[..., RealServer], tmp_path: Path) -> None:
    path, prompt = tmp_path / "states", list(range(700, 760))
    server = start_server(prefix_cache_file=path)
    first = ask(server, prompt=prompt, logprobs=3)
    server.process.terminate()
    assert server.process.wait(20) == 0
    server = start_server(prefix_cache_file=path)
    again = ask(server, prompt=prompt, logprobs=3)
    assert (cached(first), cached(again)) == (0, 60)
    assert again["choices"] == first["choices"]
    longer = ask(server, prompt=[*prompt, 7, 8, 9])
    # The engine's process outlives a server that is killed, for as long as it takes to write them.
    engine = server.engine_pid
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not alive(engine))
    server = start_server(prefix_cache_file=path)
    assert cached(ask(server, prompt=[*prompt, 7, 8, 9])) == 63
    assert longer["choices"] == ask(server, prompt=[*prompt, 7, 8, 9])["choices"]
    server.process.terminate()
    assert server.process.wait(20) == 0
    path.write_bytes(path.read_bytes()[:-100])
    path.with_name(".states.unfinished").write_bytes(bytes(1000))  # as one has left that was killed while it wrote
    server = start_server(prefix_cache_file=path)
    assert cached(ask(server, prompt=prompt)) == 0
    assert "the cache begins empty" in server.log_path.read_text()
    assert sorted(each.name for each in tmp_path.iterdir() if "states" in each.name) == ["states", "states.key"]


def test_what_was_saved_in_time_outlives_an_engine_that_is_killed(
    start_server: Callable[..., RealServer], tmp_path: Path
) -> None:
    path, prompt = tmp_path / "states", list(range(700, 760))
    server = start_server(prefix_cache_file=path, prefix_cache_save_seconds=0.2)
    first = ask(server, prompt=prompt, logprobs=3)
    wait_for(path.exists)
    wait_for(lambda: "cached states to" in server.log_path.read_text())
    pid = server.engine_pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.engine_pid != pid and server.http.get("/ready").status_code == 200, 60)
    again = ask(server, prompt=prompt, logprobs=3)
    assert (cached(again), again["choices"]) == (60, first["choices"])
