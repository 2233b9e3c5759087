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
    '<tool_call>{"name": "null", "arguments": null}</tool_call>',
    '<tool_call>{"name": "empty", "arguments": ""}</tool_call>',
    '<tool_call>{"name": "null", "parameters": "null"}</tool_call>',
    '<tool_call>{"name": "list", "arguments": [1]}</tool_call>',
    f" \n<tool_call>{ADD}</tool_call>\n<tool_call>\n{ADD}\n</tool_call>\n",
    f"So:\n<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call> Done.\n",
    f"<tool_call>\n{ADD}\n{ADD}, {{}} {ADD}</tool_call>",
    f'<tool_call>[{ADD}, {{"arguments": null, "name": "now"}}]</tool_call>',
    f"<tool_call>{ADD}<tool_call>{ADD}",
    f'<tool_call>{ADD[:-1]}, "id": {{"name": "</tool_call>", "arguments": {{}}}}}}</tool_call>.',
    '<tool_call>{"name": "cut", "arguments": {"a": 1</tool_call> goes on',
    f"<tool_call>I think of {ADD} <tool_call>{ADD}</tool_call>",
    r'<tool_call>{"name": "\q", "arguments": {}}</tool_call>',
    r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "nan", "arguments": NaN}</tool_call>',
    f'<tool_call>{{"arguments": {{"a": "{"x" * 10_000}"}}, "name": "long"}}</tool_call>',
    f'<tool_call>{{"arguments": {{"a": "{"x" * 70_000}"}}, "name": "too long"}}</tool_call>',
    f'<tool_call>{{"name": "{"x" * 5000}", "arguments": {{}}}}</tool_call>',
    " \n ",
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


@pytest.mark.parametrize("text", TAGGED, ids=range(len(TAGGED)))
@given(cuts=st.lists(st.integers(0, 10_000), max_size=40))
def test_pieces_do_not_matter(text: str, cuts: list[int]) -> None:
    assert read(text, cuts) == read(text, [])


@pytest.mark.parametrize("text", TAGGED, ids=range(len(TAGGED)))
def test_single_characters_do_not_matter(text: str) -> None:
    assert read(text, list(range(len(text)))) == read(text, [])


TAGS = ("<tool_call>", "</tool_call>", "<tool", "_call>", "</")
CALLS = (ADD, ADD[:30], ADD[30:], '{"name": "f", "arguments": ', '{"arguments": {"a": 1}, "name": "g"}')
PIECES = st.sampled_from((*TAGS, *CALLS, *'{}[]",\\ \né', "null", '"{}"', "text"))


@given(parts=st.lists(PIECES, max_size=12), cuts=st.lists(st.integers(0, 1000), max_size=20), flags=st.integers(0, 3))
def test_no_text_breaks_it_and_no_cut_changes_it(parts: list[str], cuts: list[int], flags: int) -> None:
    text, tagged, parallel = "".join(parts), bool(flags & 1), bool(flags & 2)
    content, calls = read(text, [], tagged=tagged, parallel=parallel)
    assert read(text, cuts, tagged=tagged, parallel=parallel) == (content, calls)
    assert read(text, list(range(len(text))), tagged=tagged, parallel=parallel) == (content, calls)
    assert content.strip() or not (calls and content), "white space alone is no content beside a call"
    assert tagged or not content
    assert parallel or len(calls) <= 1
    if "<tool_call>" not in text and tagged:
        assert content == text


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
        (TAGGED[12], "", [("null", "{}")]),
        (TAGGED[13], "", [("empty", "{}")]),
        (TAGGED[14], "", [("null", "{}")]),
        (TAGGED[15], "", [("list", "[1]")]),
        (TAGGED[16], "", [("add", ARGUMENTS)] * 2),
        (TAGGED[17], "So:\n Done.\n", [("add", ARGUMENTS)] * 2),
        (TAGGED[18], "", [("add", ARGUMENTS)] * 3),
        (TAGGED[19], "", [("add", ARGUMENTS), ("now", "{}")]),
        (TAGGED[20], "", [("add", ARGUMENTS)] * 2),
        (TAGGED[21], ".", [("add", ARGUMENTS)]),
        (TAGGED[22], " goes on", [("cut", '{"a": 1')]),
        (TAGGED[23], f"<tool_call>I think of {ADD} ", [("add", ARGUMENTS)]),
        (TAGGED[24], TAGGED[24], []),
        (TAGGED[25], TAGGED[25], []),
        (TAGGED[26], TAGGED[26], []),
        (TAGGED[27], "", [("long", f'{{"a": "{"x" * 10_000}"}}')]),
        (TAGGED[28], TAGGED[28], []),
        (TAGGED[29], "", [("x" * 5000, "{}")]),
        (TAGGED[30], TAGGED[30], []),
    ],
)
def test_content_and_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(text, []) == (content, calls)


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
