"""Chat templates: the plain transcript, what templates of model folders rely on, and templates that mean harm."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lattice_serve.engine.errors import CheckpointError, EngineUnavailable, InvalidParameter, Overloaded
from lattice_serve.server import template as module
from lattice_serve.server.template import ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]


async def render(folder: Path, source: str | None, request: bytes | None = None, **variables: Any) -> str:
    if source is not None:
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    async with ChatTemplate(folder) as template:
        return await template.render({"messages": HELLO, "add_generation_prompt": True, **variables}, request)


async def test_without_a_template_a_chat_is_a_transcript(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": "Who are\nyou?"},
        {"role": "assistant", "content": "A crew."},
        {"role": "user", "content": ""},
    ]
    text = "System: Rhyme.\nUser: Who are\nyou?\nAssistant: A crew.\nUser:\nAssistant:"
    assert await render(tmp_path, None, messages=messages) == text
    cut = await render(tmp_path, None, messages=messages[:3], add_generation_prompt=False)
    assert cut == "System: Rhyme.\nUser: Who are\nyou?\nAssistant: A crew."


async def test_the_transcript_shows_tools_and_calls(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": "é<"}}}
    messages = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call, call]}]
    text = await render(tmp_path, None, messages=messages, tools=[{"function": {"name": "add"}}])
    system, user, assistant, cue = text.split("\n")
    assert system.startswith("System: ")
    assert system.endswith(' {"name": "add"}')
    said = '<tool_call>{"name": "add", "arguments": {"a": "é<"}}</tool_call>'
    assert (user, assistant, cue) == ("User: Hello", f"Assistant: {said} {said}", "Assistant:")


async def test_what_templates_of_models_count_on(tmp_path: Path) -> None:
    source = """
    {%- set ns = namespace(n=0) %}
    {% for message in messages %}
        {% if message['content'] == 'skip' %}{% continue %}{% endif %}
        {% set ns.n = ns.n + 1 %}
<|{{ message['role'] }}|>{{ message['content'].strip() | tojson }}
    {% endfor %}
{% generation %}{{ ns.n }}
{% endgeneration %}
{{ strftime_now('%Y') | length }} {{ missing is defined }} {{ {'a': [1]} | tojson(indent=1) }}"""
    messages = [*HELLO, {"role": "user", "content": "skip"}, {"role": "user", "content": " <&'é\n"}]
    text = await render(tmp_path, source, messages=messages)
    assert text == '<|user|>"Hello"\n<|user|>"<&\'é"\n2\n4 False {\n "a": [\n  1\n ]\n}'


CUT = '{"a": '


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ arguments }}", CUT),
        ("{{ arguments | tojson }}", '"{\\"a\\": "'),
        ("{% if arguments is string %}{{ arguments }}{% else %}{{ arguments | tojson }}{% endif %}", CUT),
        ("{% for name, value in arguments.items() %}{{ name }}={{ value }}{% endfor %}", f"arguments={CUT}"),
        ("{% for name, value in arguments | items %}{{ name }}={{ value }}{% endfor %}", f"arguments={CUT}"),
        ("{% for name, value in arguments | dictsort %}{{ name }}={{ value }}{% endfor %}", f"arguments={CUT}"),
        ("{% for name in arguments.keys() %}{{ arguments.get(name) }}{% endfor %}", CUT),
        ("{{ arguments.values() | join }}{{ arguments.a }}{{ arguments['a'] }}{{ arguments.get('a', 1) }}", CUT + "1"),
        (
            "{% for name, value in {'b': 2} | items %}{{ name }}={{ value }}{% endfor %}{{ missing | items | list }}",
            "b=2[]",
        ),
    ],
)
async def test_arguments_that_are_text_break_no_template(tmp_path: Path, source: str, text: str) -> None:
    call = {"function": {"name": "add", "arguments": CUT}}
    source = f"{{% set arguments = messages[0].tool_calls[0].function.arguments %}}{source}"
    request = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    assert await render(tmp_path, source, json.dumps(request).encode()) == text


async def test_variables_of_any_kind(tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        "self": 1,
        "big": 10**40,
        "none": None,
        "nan": float("nan"),
        "half": "\ud800",
        "deep": [[[{"é": 1.5}]]],
    }
    text = await render(tmp_path, "{{ big }} {{ none }} {{ nan }} {{ half }}{{ deep }}", **odd)
    assert text == f"{10**40} None nan \ud800[[[{{'é': 1.5}}]]]"


async def test_a_template_can_refuse(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="roles must alternate") as caught:
        await render(tmp_path, "{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content.x }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception(messages) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) | list }}",
        "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
        "{{ ('a' * big * 10 ~ messages) | length }}",
    ],
)
async def test_faults_of_templates_are_told_and_harm_nobody(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if bad %}" + source + "{% else %}good{% endif %}")
    async with ChatTemplate(tmp_path) as template:
        assert await template.render({"bad": False}) == "good"
        with pytest.raises(InvalidParameter, match="chat template") as caught:
            await template.render({"bad": True, "big": 10**8, "messages": ["x" * 2000]})
        assert len(caught.value.message) < 1000
        assert await template.render({"bad": False}) == "good"


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** big }}",
    "{{ ('a' * 40000) | replace('', 'b' * 40000) | length }}",
]


@pytest.mark.parametrize("endless", ENDLESS)
async def test_an_endless_template_ends_in_about_a_second(tmp_path: Path, endless: str) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if bad %}" + endless + "{% else %}good{% endif %}")
    async with ChatTemplate(tmp_path) as template:
        ticks = asyncio.create_task(_longest_pause())
        began = time.monotonic()
        with pytest.raises(InvalidParameter, match=r"too much memory|MemoryError"):
            await template.render({"bad": True, "big": 10**9})
        assert time.monotonic() - began < 2
        ticks.cancel()
        assert await ticks < 0.5, "the event loop stood still"
        assert await template.render({"bad": False}) == "good"


async def test_who_waits_long_for_others_is_told_to_come_back(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(ENDLESS[0])
    async with ChatTemplate(tmp_path) as template:
        began = time.monotonic()
        faults = await asyncio.gather(*(template.render({}) for _ in range(20)), return_exceptions=True)
        assert time.monotonic() - began < 5
    kinds = [type(fault) for fault in faults]
    assert kinds[0] is InvalidParameter
    assert kinds[-1] is Overloaded


async def test_a_rendering_that_is_given_up_does_not_answer_the_next(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for i in range(n) %}{% endfor %}{{ n }}")
    async with ChatTemplate(tmp_path) as template:
        assert await template.render({"n": 1}) == "1"
        given_up = asyncio.create_task(template.render({"n": 99999}))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        given_up.cancel()
        assert await template.render({"n": 2}) == "2"


async def test_the_process_goes_with_its_user(tmp_path: Path) -> None:
    async with ChatTemplate(tmp_path) as template:
        process = template._process
        assert process is not None
        assert process.returncode is None
    assert process.returncode is not None


async def test_a_process_that_is_killed_between_renderings_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ n }}")
    async with ChatTemplate(tmp_path) as template:
        for n in range(3):
            process = template._process
            assert process is not None
            process.kill()
            await process.wait()
            assert await template.render({"n": n}) == str(n)


async def test_a_process_that_is_stopped_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_SECONDS", 0.2)
    (tmp_path / "chat_template.jinja").write_text("{{ n }}")
    async with ChatTemplate(tmp_path) as template:
        assert template._process is not None
        template._process.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineUnavailable, match="try again"):
            await template.render({"n": 1})
        monkeypatch.undo()
        assert await template.render({"n": 2}) == "2"


async def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORKER", (str(tmp_path / "missing"),))
    (tmp_path / "chat_template.jinja").write_text("{{ n }}")
    async with ChatTemplate(tmp_path) as template:
        with pytest.raises(EngineUnavailable, match="try again"):
            await template.render({"n": 1})
        monkeypatch.undo()
        assert await template.render({"n": 2}) == "2"


@pytest.mark.parametrize(
    "source", ["{% for %}", "a\n{{ 1 | no_such_filter }}", "{{ " + "(" * 10_000, "{{ 9 ** (9 ** 9) }}"]
)
async def test_what_is_no_template_fails_each_chat(tmp_path: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        await render(tmp_path, source)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="give a text file"):
        ChatTemplate(tmp_path)


async def _longest_pause() -> float:
    longest = 0.0
    try:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began)
    except asyncio.CancelledError:
        return longest
