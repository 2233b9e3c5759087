"""The tool calls in a text, however it falls into tokens."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.server.tool_calls import ToolCallParser

ADD = '{"name": "add", "arguments": {"a": [1, {"b": "}]\\" \\\\"}], "c": "</tool_call>"}}'
TAGGED = [
    "no call at all < <tool <tool_calls",
    f"<tool_call>{ADD}</tool_call>",
    f"I add.\n<tool_call>\n{ADD}\n</tool_call>\n and <tool_call>{ADD}</tool_call>.",
    '<tool_call>{"arguments": {"a": 1}, "name": "late"}</tool_call>',
    '<tool_call>{"name": "none"}</tool_call>',
    '<tool_call>{"name": "text", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "with \\"quotes\\" é", "parameters": {}}</tool_call>',
    '<tool_call>{"name": 5}</tool_call> <tool_call>[]</tool_call> <tool_call>',
    f"<tool_call>{ADD[:-1]}</tool_call> goes on",
    f"<tool_call>{ADD[:40]}",
    f"<tool_call>{'x' * 5000}",
    f"<tool_call>{ADD} trailing words</tool_call>!",
]


def read(
    text: str, cuts: list[int], *, tagged: bool = True, parallel: bool = True
) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of each call, of `text` fed in pieces."""
    parser = ToolCallParser(tagged=tagged, parallel=parallel)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    content, ids = "", []
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        content += delta.content or ""
        for call in delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls)
                assert call.function.name
                ids.append(call.id)
                calls.append((call.function.name, ""))
            assert call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call.function.arguments)
    assert len(set(ids)) == len(ids) == parser.calls
    return content, calls


@pytest.mark.parametrize("text", TAGGED)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=40))
def test_pieces_do_not_matter(text: str, cuts: list[int]) -> None:
    assert read(text, cuts) == read(text, list(range(len(text))))


ARGUMENTS = json.dumps(json.loads(ADD)["arguments"])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (TAGGED[0], TAGGED[0], []),
        (TAGGED[1], "", [("add", ARGUMENTS)]),
        (TAGGED[2], "I add.\n\n and .", [("add", ARGUMENTS)] * 2),
        (TAGGED[3], "", [("late", '{"a": 1}')]),
        (TAGGED[4], "", [("none", "{}")]),
        (TAGGED[5], "", [("text", "{}")]),
        (TAGGED[6], "", [('with "quotes" é', "{}")]),
        (TAGGED[7], TAGGED[7], []),
        (TAGGED[8], " goes on", [("add", ARGUMENTS)]),
        (TAGGED[9], "", [("add", ARGUMENTS[:11])]),
        (TAGGED[10], TAGGED[10], []),
        (TAGGED[11], "!", [("add", ARGUMENTS)]),
    ],
)
def test_content_and_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(text, list(range(len(text)))) == (content, calls)


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(tagged=True, parallel=True)
    for piece in ("<tool_call>", '{"name": "add", ', '"arguments": '):
        assert parser.feed(piece) == []
    (begin, first) = parser.feed('{"a"')
    assert begin.tool_calls[0].function.name == "add"  # type: ignore[index]
    assert first.tool_calls[0].function.arguments == '{"a"'  # type: ignore[index]
    (more,) = parser.feed(": 1")
    assert more.tool_calls[0].function.arguments == ": 1"  # type: ignore[index]


def test_only_the_first_call_without_parallel_ones() -> None:
    assert read(TAGGED[2], [], parallel=False) == ("I add.\n", [("add", ARGUMENTS)])
    assert read(f"[{ADD}, {ADD}]", [], tagged=False, parallel=False)[1] == [("add", ARGUMENTS)]


@given(cuts=st.lists(st.integers(0, 10_000), max_size=40))
def test_a_list_of_calls(cuts: list[int]) -> None:
    assert read(f"[{ADD},\n {ADD}]", cuts, tagged=False) == ("", [("add", ARGUMENTS)] * 2)
    assert read(f"[{ADD}, {{", cuts, tagged=False) == ("", [("add", ARGUMENTS)])
