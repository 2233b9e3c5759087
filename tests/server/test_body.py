"""Large bodies: read as small ones are, refused before they cost anything, and never all at once."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.server import body
from lattice_serve.server.body import LARGE, MAX_VALUES, Turns
from lattice_serve.server.schemas.base import RequestModel
from lattice_serve.server.schemas.chat import ChatRequest
from lattice_serve.server.schemas.completions import CompletionRequest
from lattice_serve.server.schemas.embeddings import EmbeddingRequest
from lattice_serve.server.schemas.tokenize import DetokenizeRequest
from tests.server.harness import ServerProcess

FILL = " " * LARGE
MANY = MAX_VALUES + 1
HELLO = '"messages":[{"role":"user","content":"a"}]'

texts = st.text('ab",[{:\\\n\u00e9', max_size=8)
values = st.recursive(st.none() | st.integers() | texts, lambda each: st.lists(each) | st.dictionaries(texts, each))


async def parsed(kind: type[RequestModel], text: str | bytes) -> Any:
    return await body.parse(kind, text.encode() if isinstance(text, str) else text, Turns())


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CompletionRequest, "prompt", [1, 2, 3]),
        (CompletionRequest, "prompt", [0, -1]),
        (CompletionRequest, "prompt", []),
        (CompletionRequest, "prompt", [[1, 2], [3]]),
        (CompletionRequest, "prompt", [[], [3]]),
        (CompletionRequest, "prompt", "text"),
        (CompletionRequest, "prompt", ["a", "b"]),
        (EmbeddingRequest, "input", [[5] * 9] * 9),
        (DetokenizeRequest, "tokens", list(range(100_000))),
        (CompletionRequest, "prompt", [list(range(50_000)), list(range(70_000))]),
    ],
)
async def test_a_large_body_is_read_as_a_small_one(kind: type[RequestModel], name: str, value: Any) -> None:
    text = json.dumps({name: value, "model": "m"})
    small, large = kind.parse(text.encode()), await parsed(kind, text + FILL)
    found = getattr(large, name)
    if isinstance(found, list):
        found = [each.tolist() if isinstance(each, array) else each for each in found]
    assert (found.tolist() if isinstance(found, array) else found) == getattr(small, name) == value
    assert large.model == "m"
    assert large.model_copy(update={name: value}) == small


@pytest.mark.parametrize(
    ("kind", "text", "param"),
    [
        (CompletionRequest, '{"prompt":[1,2', None),
        (CompletionRequest, '{"prompt":[1,,2]}', None),
        (CompletionRequest, '{"prompt":[1,]}', None),
        (CompletionRequest, "[" * 200_000, None),
        (CompletionRequest, '{"prompt":' + "[" * 40_000, None),
        (CompletionRequest, '{"prompt":[1,[2]]}', "prompt"),
        (CompletionRequest, '{"prompt":[[1],2]}', "prompt"),
        (CompletionRequest, '{"prompt":[[[1]]]}', "prompt"),
        (CompletionRequest, '{"prompt":[1,true]}', "prompt"),
        (CompletionRequest, '{"prompt":[1.5]}', "prompt"),
        (CompletionRequest, '{"prompt":[4294967296]}', "prompt"),
        (CompletionRequest, '{"prompt":[1],"n":"x"}', "n"),
        (DetokenizeRequest, '{"tokens":[[1]]}', "tokens"),
        (CompletionRequest, '{"prompt":["a"' + ',"a"' * MANY + "]}", None),
        (CompletionRequest, '{"prompt":[[1]' + ",[1]" * MANY + "]}", None),
        (CompletionRequest, '{"prompt":"a"' + ',"a":1' * MANY + "}", None),
        (ChatRequest, "{" + HELLO + ',"tools":[' + ",".join("1" * MANY) + "]}", None),
        (ChatRequest, "{" + HELLO + ',"chat_template_kwargs":{"a":[' + ",".join(["{}"] * MANY) + "]}}", None),
    ],
)
async def test_what_is_wrong_with_a_large_body_is_said(kind: type[RequestModel], text: str, param: str | None) -> None:
    with pytest.raises(InvalidParameter) as failure:
        await parsed(kind, text + FILL)
    assert failure.value.param == param


@given(values)
def test_values_are_counted_and_texts_are_not(value: Any) -> None:
    def count(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + sum(map(count, value.values()))
        return 1 + sum(map(count, value)) if isinstance(value, list) else 1

    def opens(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return isinstance(value, dict | list) + sum(map(opens, inner))

    def commas(value: Any) -> int:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        return max(0, len(inner) - 1) + sum(map(commas, inner))

    padded = json.dumps([value, ",[{" * MANY], ensure_ascii=False).encode()  # else it is not looked at closely
    found = asyncio.run(body._count(padded, b",[{"))
    assert found == opens(value) + commas(value) + 2
    assert found + 1 >= count(value)


async def test_large_work_has_turns_and_rests_as_long_as_it_works() -> None:
    turns, spans = Turns(), []

    async def work() -> None:
        async with turns.take(LARGE + 1):
            began = time.monotonic()
            await asyncio.sleep(0.05)
            spans.append((began, time.monotonic()))

    await asyncio.gather(work(), work(), work())
    for (_, end), (begin, _) in pairwise(spans):
        assert begin - end > 0.04
    await turns._lock.acquire()
    async with turns.take(LARGE):  # little work waits for nobody
        pass


async def _steps(work: Any) -> int:
    """How often others had a turn while it was at work."""
    task, steps = asyncio.create_task(work), 0
    while not task.done():
        await asyncio.sleep(0)
        steps += 1
    task.exception()
    return steps


async def test_others_go_on_while_ids_are_read() -> None:
    ids = ("9," * 500_000)[:-1]
    assert await _steps(parsed(CompletionRequest, '{"prompt":[' + ids + "]}")) > 15
    assert await _steps(parsed(DetokenizeRequest, '{"tokens":[' + ids + "]}")) > 15


def test_large_answers_of_the_tokenizer_are_the_same_in_pieces(server: ServerProcess) -> None:
    text = "It was a dark night, \u00e9 \U0001f600. " * 5000
    answer = server.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 50_000
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    assert server.post("/tokenize", prompt="", return_token_strs=True).json()["token_strs"] == []
    assert server.post("/tokenize", prompt="a").json()["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("/v1/chat/completions", "{" + HELLO + ',"chat_template_kwargs":{"a":[' + ",".join("1" * 2_000_000) + "]}}"),
        ("/v1/completions", '{"prompt":[' + ",".join(['"a"'] * 1_500_000) + "]}"),
        ("/v1/completions", '{"prompt":[' + ",".join("9" * 2_000_000) + '],"max_tokens":1}'),
        ("/detokenize", '{"tokens":[' + ",".join("9" * 2_000_000) + "]}"),
        ("/tokenize", json.dumps({"prompt": "dark night " * 300_000, "return_token_strs": True})),
    ],
)
async def test_nobody_waits_for_anothers_body(server: ServerProcess, path: str, data: str) -> None:
    """A bound that a busy machine keeps, too: without care it was seconds."""
    http = server.http
    sending = asyncio.create_task(asyncio.to_thread(http.post, path, content=data, timeout=60))
    worst = 0.0
    while not sending.done():
        began = time.monotonic()
        await asyncio.to_thread(http.get, "/ping")
        worst = max(worst, time.monotonic() - began)
    assert sending.result().status_code in (200, 400)
    assert worst < 1
