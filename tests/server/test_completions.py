"""`POST /v1/completions` without streaming."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.server.harness import ServerProcess, wait_for


def test_answer_has_the_openai_shape(server: ServerProcess) -> None:
    answer = server.complete("hello", max_tokens=3, model="lattice", user="someone")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "lattice"
    (choice,) = answer["choices"]
    assert choice["text"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 3


def test_prompts_of_all_four_kinds_agree(server: ServerProcess) -> None:
    ids = [tokens(server, text) for text in ("one", "another")]
    one, another = (server.complete(text, seed=1)["choices"][0]["text"] for text in ("one", "another"))
    assert server.complete(ids[0], seed=1)["choices"][0]["text"] == one
    for prompts in (["one", "another"], ids):
        answer = server.complete(prompts, seed=1)
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, one), (1, another)]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_choice_i_of_n_has_the_seed_plus_i(server: ServerProcess) -> None:
    answer = server.complete(["one", "another"], n=2, best_of=2, seed=7)
    alone = [
        server.complete(prompt, seed=seed)["choices"][0]["text"] for prompt in ("one", "another") for seed in (7, 8)
    ]
    assert [choice["text"] for choice in answer["choices"]] == alone
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_the_largest_seed_has_a_next_one(server: ServerProcess) -> None:
    assert len(server.complete("a", seed=2**63 - 1, n=2)["choices"]) == 2


def test_best_of_returns_the_likeliest(server: ServerProcess) -> None:
    answer = server.complete(["!rank", "!rank"], n=2, best_of=4, seed=1, max_tokens=5)
    best = [server.complete("!rank", seed=seed, max_tokens=5)["choices"][0]["text"] for seed in (4, 3)]
    assert [choice["text"] for choice in answer["choices"]] == best * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert answer["usage"]["completion_tokens"] == 40
    scored = server.complete("!rank", best_of=3, seed=1, logprobs=0, max_tokens=2)["choices"]
    assert scored[0]["logprobs"]["token_logprobs"] == [-97.0] * 2


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo(server: ServerProcess, as_ids: bool) -> None:
    prompt = tokens(server, "to be") if as_ids else "to be"
    plain = server.complete(prompt, seed=1)["choices"][0]["text"]
    assert server.complete(prompt, seed=1, echo=True)["choices"][0]["text"] == "to be" + plain
    assert server.complete(prompt, echo=True, max_tokens=0)["choices"][0]["text"] == "to be"


def test_logprobs(server: ServerProcess) -> None:
    (choice,) = server.complete("a", logprobs=2, max_tokens=3)["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [0, lengths[0], lengths[0] + lengths[1]]
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.5
        assert sorted(top.values()) == [-9999.0, -0.5]


def test_logprobs_0_has_the_chosen_token_alone(server: ServerProcess) -> None:
    (choice,) = server.complete("a", logprobs=0, max_tokens=1)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{choice["text"]: -0.5}]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(server: ServerProcess, max_tokens: int) -> None:
    text = "we few, we happy few"
    prompts = [tokens(server, text), tokens(server, "once")]
    answer = server.complete(prompts, echo=True, logprobs=1, max_tokens=max_tokens)
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        assert {len(entries) for entries in logprobs.values()} == {len(ids) + max_tokens}
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1 + max_tokens)
        assert logprobs["top_logprobs"][0] is None
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)


def test_offsets_are_of_the_text_not_of_the_tokens_names(server: ServerProcess) -> None:
    (choice,) = server.complete("a \U0001f600 b", echo=True, logprobs=0, max_tokens=2)["choices"]
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert sum(name.startswith("bytes:") for name in names) == 4, "a character of four tokens"
    assert offsets == sorted(offsets)
    for name, offset in zip(names, offsets, strict=True):
        assert choice["text"][offset:].startswith("\U0001f600" if name.startswith("bytes:") else name)


def test_prompt_logprobs(server: ServerProcess) -> None:
    ids = tokens(server, "we few")
    (choice,) = server.complete("we few", prompt_logprobs=2, max_tokens=1)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token_id, entries in zip(ids[1:], rest, strict=True):
        text = server.post("/detokenize", tokens=[token_id]).json()["prompt"]
        assert entries.pop(str(token_id)) == {"logprob": -0.5, "rank": 1, "decoded_token": text}
        assert [(entry["logprob"], entry["rank"]) for entry in entries.values()] == [(-9999.0, 2)]
    assert choice["logprobs"] is None
    (choice,) = server.complete("we few", prompt_logprobs=0, max_tokens=0)["choices"]
    assert choice["prompt_logprobs"][1] == {str(ids[1]): {"logprob": -0.5, "rank": None, "decoded_token": " few"}}
    (choice,) = server.complete("we few", prompt_logprobs=0, echo=True, logprobs=2, max_tokens=1)["choices"]
    assert len(choice["prompt_logprobs"][1]) == 1
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2
    assert "prompt_logprobs" not in server.complete("we few", max_tokens=1)["choices"][0]


def test_an_answer_that_takes_too_long(server: ServerProcess) -> None:
    aborts = len(server.records("abort"))
    response = server.post(prompt=["!slow", "!stall"], timeout=0.2)
    assert response.status_code == 408
    assert response.json()["error"]["param"] == "timeout"
    assert response.headers["x-should-retry"] == "false"
    assert server.post(prompt="!stall", timeout=0.1, stream=True).status_code == 408
    *chunks, last = server.stream("!slow", timeout=0.3, max_tokens=1000)
    assert 1 <= len(chunks) <= 6
    assert last["error"]["code"] == 408
    wait_for(lambda: len(server.records("abort")) == aborts + 4)
    assert server.complete("a", timeout=60)


def test_end_of_text_and_stop_strings(server: ServerProcess) -> None:
    answer = server.complete("!eos", max_tokens=10)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] is None
    assert answer["usage"]["completion_tokens"] == 4
    for stop in (".", [".", "x"]):
        assert server.complete("!stop", max_tokens=10, stop=stop)["choices"][0]["stop_reason"] == "."


def test_null_is_as_good_as_absent_and_unknown_fields_are_ignored(server: ServerProcess) -> None:
    optional = (
        "model max_tokens max_completion_tokens temperature top_p n best_of stream stream_options logprobs echo stop "
        "presence_penalty frequency_penalty logit_bias seed suffix min_p top_k repetition_penalty stop_token_ids "
        "include_stop_str_in_output ignore_eos min_tokens priority response_format prompt_logprobs use_beam_search "
        "timeout user"
    )
    answer = server.complete("a", **dict.fromkeys(optional.split()), no_such_field={"a": [1]})
    assert answer["usage"]["completion_tokens"] == 16


def test_a_whole_number_may_be_written_with_a_fraction(server: ServerProcess) -> None:
    """JSON has one kind of number, and some clients write each as 16.0."""
    expected = server.complete([[5, 6], [7]], max_tokens=3, seed=1, n=2, top_k=5, logit_bias={"9": 1.5})["choices"]
    body = b"""{"prompt": [[5.0, 6e0], [7]], "max_tokens": 3.0, "seed": 1.0, "n": 2.0, "top_k": 5.0, "temperature": 1.0,
        "logit_bias": {"9": 1.5}, "user": "\xe2\x80\xa8 1.0"}"""
    response = server.http.post("/v1/completions", content=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == expected


def test_the_newer_name_of_the_limit_wins(server: ServerProcess) -> None:
    answer = server.complete("a", max_tokens=5, max_completion_tokens=2)
    assert answer["usage"]["completion_tokens"] == 2


def test_top_p_0_is_taken(server: ServerProcess) -> None:
    assert server.complete("a", top_p=0, max_tokens=2)


def test_no_event_holds_what_some_clients_take_for_the_end_of_a_line(server: ServerProcess) -> None:
    odd = "a\u2028b\u2029c\x85d\u00e9\u2026"
    for path, asked in (
        ("/v1/completions", {"prompt": f"!say {odd}", "max_tokens": 60, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"!say {odd}"}]}),
        ("/v1/responses", {"input": f"!say {odd}", "instructions": odd}),
    ):
        response = server.post(path, stream=True, **asked)
        assert response.status_code == 200
        assert response.text.splitlines() == response.text.split("\n")[:-1]
        texts = "".join(
            json.loads(f'"{text}"') for text in re.findall(r'"(?:text|content|delta)":"(.*?)"', response.text)
        )
        assert texts.startswith(odd)
        assert {"\\u2028", "\\u2029", "\\u0085"} <= set(re.findall(r"\\u\w{4}", response.text))


def test_every_sampling_field_is_taken(server: ServerProcess) -> None:
    fields: dict[str, Any] = {
        "max_completion_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100, "6": 1.5},
        "seed": -3,
        "stop": ["x"],
        "include_stop_str_in_output": True,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "min_tokens": 2,
        "priority": -1,
        "response_format": {"type": "text"},
        "suffix": "",
        "use_beam_search": False,
    }
    assert server.complete("a", **fields)["usage"]["completion_tokens"] == 5


def tokens(server: ServerProcess, text: str) -> list[int]:
    ids: list[int] = server.post("/tokenize", prompt=text).json()["tokens"]
    return ids
