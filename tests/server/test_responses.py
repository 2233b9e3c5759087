"""`/v1/responses` with the official client, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseErrorEvent, ResponseFailedEvent

from tests.server.harness import ServerProcess

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def prompts(server: ServerProcess, count: int) -> list[str]:
    """The last prompts that the engine was given, as text."""
    ids = [record["ids"] for record in server.records("submit")[-count:]]
    return [str(server.post("/detokenize", tokens=each).json()["prompt"]) for each in ids]


def test_a_response_and_its_past(server: ServerProcess, client: Any) -> None:
    first = client.responses.create(
        model="lattice", input="!say Good day", instructions="Be brief.", metadata={"a": "b"}
    )
    assert (first.output_text, first.status, first.metadata) == ("Good day", "completed", {"a": "b"})
    assert first.usage.output_tokens > 0
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    assert first.usage.input_tokens_details.cached_tokens == 0
    second = client.responses.create(model="lattice", input="!say And you", previous_response_id=first.id)
    assert second.output_text == "And you"
    assert second.previous_response_id == first.id
    third = client.responses.create(
        model="lattice", previous_response_id=second.id, input=[{"role": "user", "content": "!say Bye"}]
    )
    assert third.output_text == "Bye"
    transcript = "User: !say Good day\nAssistant: Good day\nUser: !say And you\nAssistant: And you\nUser: !say Bye"
    # Instructions are those of one response alone.
    assert prompts(server, 3) == [
        "System: Be brief.\nUser: !say Good day\nAssistant:",
        "User: !say Good day\nAssistant: Good day\nUser: !say And you\nAssistant:",
        f"{transcript}\nAssistant:",
    ]


def test_stored_responses_are_read_and_deleted(client: Any) -> None:
    made = client.responses.create(model="lattice", input="!say Good day")
    assert client.responses.retrieve(made.id).output_text == "Good day"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="lattice", input="a", previous_response_id=made.id)
    assert caught.value.body["param"] == "previous_response_id"  # type: ignore[index]
    kept_from_none = client.responses.create(model="lattice", input="!say a", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept_from_none.id)


def test_the_events_of_a_text(client: Any) -> None:
    events = list(client.responses.create(model="lattice", input="!say Good day to you", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == "Good day to you"
    assert [event.type for event in events if event not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    assert events[-1].response.output_text == "Good day to you"
    assert client.responses.retrieve(events[-1].response.id) == events[-1].response


def test_the_stream_helper(client: Any) -> None:
    with client.responses.stream(model="lattice", input="!say Good day") as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == "Good day"
        assert stream.get_final_response().output_text == "Good day"


async def test_async(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        made = await client.responses.create(model="lattice", input="!say Good day")
        assert made.output_text == "Good day"
        events = [event async for event in await client.responses.create(model="lattice", input="!say a", stream=True)]
        assert events[-1].type == "response.completed"


def test_an_answer_that_is_cut(client: Any) -> None:
    made = client.responses.create(model="lattice", input="a", max_output_tokens=3)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.usage.output_tokens == 3
    assert made.output[0].status == "incomplete"
    *_, last = client.responses.create(model="lattice", input="a", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_calls_and_their_outputs(server: ServerProcess, client: Any) -> None:
    made = client.responses.create(model="lattice", input=f"!say {CALL}", tools=[TOOL])
    [call] = made.output
    assert (call.type, call.name, json.loads(call.arguments), call.status) == (
        "function_call", "get_weather", {"city": "Rome"}, "completed",
    )  # fmt: skip
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    client.responses.create(model="lattice", input=[output], previous_response_id=made.id, tools=[TOOL])
    [prompt] = prompts(server, 1)
    assert prompt.endswith("\nTool: Sunny\nAssistant:")
    assert prompt.count(">{") >= 2
    # The same conversation, told by the client.
    items: list[Any] = [{"role": "user", "content": f"!say {CALL}"}, call.model_dump(exclude_none=True), output]
    client.responses.create(model="lattice", input=items, tools=[TOOL])
    assert prompts(server, 1) == [prompt]


def test_the_events_of_a_call(client: Any) -> None:
    events = list(client.responses.create(model="lattice", input=f"!say {CALL}", tools=[TOOL], stream=True))
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(event.delta for event in deltas)) == {"city": "Rome"}
    assert [event.type for event in events if event not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_formats_are_kept_to(server: ServerProcess, client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for given, kind in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json_schema"),
        ({"type": "json_schema", "name": "x", "schema": schema}, "json_schema"),
    ):
        client.responses.create(model="lattice", input="a", max_output_tokens=1, text={"format": given})
        grammar = server.records("submit")[-1]["grammar"]
        assert (None if grammar is None else grammar["kind"]) == kind


def test_logprobs(client: Any) -> None:
    made = client.responses.create(
        model="lattice", input="a", max_output_tokens=3, include=["message.output_text.logprobs"], top_logprobs=2
    )
    scores = made.output[0].content[0].logprobs
    assert len(scores) == 3
    assert all(score.logprob == -0.5 and len(score.top_logprobs) == 2 for score in scores)


@pytest.mark.parametrize(
    ("said", "tools", "text"),
    [
        ("!say  Good day", [], "Good day"),
        ("!utf8", [], None),
        ("!eos", [], None),
        ("!say ", [], ""),
        ("!say a <tool_", [TOOL], "a <tool_"),
        ("!say \n\n", [TOOL], "\n\n"),
        ("!say a <tool_call>{no} b", [TOOL], "a <tool_call>{no} b"),
    ],
)
def test_every_token_has_a_logprob(client: Any, said: str, tools: list[Any], text: str | None) -> None:
    fields: dict[str, Any] = {"input": said, "max_output_tokens": 20, "tools": tools}
    fields["include"] = ["message.output_text.logprobs"]
    whole = client.responses.create(model="lattice", **fields)
    assert text in (None, whole.output_text)
    [message] = whole.output
    assert len(message.content[0].logprobs) == whole.usage.output_tokens
    *events, last = client.responses.create(model="lattice", stream=True, **fields)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == last.response.output_text == whole.output_text
    assert sum(len(event.logprobs) for event in deltas) == last.response.usage.output_tokens
    assert len(last.response.output[0].content[0].logprobs) == last.response.usage.output_tokens


def test_tokens_of_a_call_have_no_logprobs_in_a_message(client: Any) -> None:
    made = client.responses.create(
        model="lattice", input=f"!say  So:{CALL}", tools=[TOOL], include=["message.output_text.logprobs"]
    )
    message, call = made.output
    assert "".join(score.token for score in message.content[0].logprobs).strip() == "So:"
    assert call.type == "function_call"
    made = client.responses.create(
        model="lattice", input=f"!say {CALL} Done.", tools=[TOOL], include=["message.output_text.logprobs"]
    )
    call, message = made.output
    tokens = "".join(score.token for score in message.content[0].logprobs)
    assert tokens.endswith(" Done.<|endoftext|>")
    assert "Rome" not in tokens


def test_a_cut_call_can_be_gone_on_from(server: ServerProcess, client: Any) -> None:
    tokens = len(server.post("/tokenize", prompt=CALL[:55]).json()["tokens"])
    cut = client.responses.create(model="lattice", input=f"!say {CALL}", tools=[TOOL], max_output_tokens=tokens)
    [call] = cut.output
    assert (cut.status, call.type, call.status) == ("incomplete", "function_call", "incomplete")
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.arguments)
    written = json.dumps(call.arguments, ensure_ascii=False)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It was cut."}
    client.responses.create(model="lattice", input=[output], previous_response_id=cut.id, tools=[TOOL])
    [prompt] = prompts(server, 1)
    assert f'"arguments": {written}}}</tool_call>\nTool: It was cut.' in prompt
    said = [{"role": "user", "content": f"!say {CALL}"}, call.model_dump(exclude_none=True), output]
    client.responses.create(model="lattice", input=said, tools=[TOOL])
    assert prompts(server, 1) == [prompt]


def test_a_refusal_is_what_was_said(server: ServerProcess, client: Any) -> None:
    refused = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    client.responses.create(model="lattice", input=[{"role": "user", "content": "a"}, refused], max_output_tokens=1)
    assert prompts(server, 1) == ["User: a\nAssistant: No.\nAssistant:"]


def test_sampling_fields_are_taken(server: ServerProcess, client: Any) -> None:
    client.responses.create(
        model="lattice", input="a", temperature=0.5, top_p=0.5, max_output_tokens=1, extra_body={"seed": 7}
    )
    assert server.records("submit")[-1]["seed"] == 7


def test_hints_are_ignored(client: Any) -> None:
    hints: dict[str, Any] = {
        "user": "me", "safety_identifier": "x", "prompt_cache_key": "x", "service_tier": "auto", "truncation": "auto",
        "background": False, "parallel_tool_calls": True, "tool_choice": "auto",
        "top_logprobs": 0, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "none", "summary": None},
    }  # fmt: skip
    assert client.responses.create(model="lattice", input="!say a", **hints).output_text == "a"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, "input"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": "a", "previous_response_id": "resp_0"}, 404, "previous_response_id"),
        ({"input": "a", "max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": "a", "temperature": -1}, 400, "temperature"),
        ({"input": "a", "top_logprobs": 3}, 400, "top_logprobs"),
        ({"input": "a", "top_logprobs": 3, "include": ["reasoning.encrypted_content"]}, 400, "top_logprobs"),
        ({"input": "a", "background": True}, 400, "background"),
        ({"input": "a", "conversation": "conv_1"}, 400, "conversation"),
        ({"input": "a", "prompt": {"id": "x"}}, 400, "prompt"),
        ({"input": "a", "reasoning": {"effort": "high"}}, 400, "reasoning"),
        ({"input": "a", "text": {"verbosity": "low"}}, 400, "text"),
        ({"input": "a", "include": ["file_search_call.results"]}, 400, "include"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, 400, "tools"),
        ({"input": "a", "tool_choice": "required"}, 400, "tool_choice"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, 400, "text"),
        ({"input": "a", "max_tool_calls": 3}, 400, "max_tool_calls"),
        ({"input": "a", "truncation": "always"}, 400, "truncation"),
        ({"input": "a", "moderation": {}}, 400, "moderation"),
        ({"input": "a", "access_programs": []}, 400, "access_programs"),
        ({"input": "a", "background_options": {}}, 400, "background_options"),
        ({"input": "a", "context_management": []}, 400, "context_management"),
        ({"input": "a", "image": {}}, 400, "image"),
    ],
)
def test_what_is_refused_is_named(server: ServerProcess, body: dict[str, Any], status: int, param: str) -> None:
    response = server.post("/v1/responses", **body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "input: give a text, or a list of items"),
        ([{"type": "item_reference", "id": "a"}], "input[0]: this type of item is not served: give message, "),
        (
            [{"role": "user", "content": [{"type": "input_image"}]}],
            "part 0 is not served: give parts of type",
        ),
        ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "input[1].message.role: "),
        ([{"role": "user", "content": [{"type": ["input_text"], "text": "a"}]}], "part 0 is not served"),
    ],
)
def test_an_item_at_fault_is_told(server: ServerProcess, given: Any, message: str) -> None:
    error = server.post("/v1/responses", input=given).json()["error"]
    assert error["param"] == "input"
    assert message in error["message"]


def test_failures_before_and_in_the_stream(client: Any) -> None:
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="lattice", input="!fail NumericalError")
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="lattice", input="!fail NumericalError", stream=True)
    with pytest.raises(openai.APIError, match="told to") as caught:
        list(client.responses.create(model="lattice", input="!fail-late NumericalError", stream=True))
    assert (type(caught.value), caught.value.code) == (openai.APIError, "server_error")
    with (
        pytest.raises(openai.APIError, match="told to"),
        client.responses.stream(model="lattice", input="!fail-late NumericalError") as stream,
    ):
        list(stream)


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream; each has the name that its data say."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize(
    ("fields", "code", "kind", "param"),
    [
        ({"input": "!fail-late NumericalError"}, "server_error", "server_error", "prompt"),
        ({"input": "!fail-late Overloaded"}, "rate_limit_exceeded", "rate_limit_error", "prompt"),
        ({"input": "!fail-late InvalidParameter"}, "invalid_prompt", "invalid_request_error", "prompt"),
        ({"input": "!slow", "timeout": 0.3}, "server_error", "timeout_error", "timeout"),
    ],
)
def test_a_failure_in_the_stream_is_an_error_event(
    server: ServerProcess, fields: dict[str, Any], code: str, kind: str, param: str
) -> None:
    events = named_events(server.post("/v1/responses", stream=True, **fields).text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    *_, error, failed = events
    nested = error.pop("error")
    assert error.pop("message") == nested.pop("message") == failed["response"]["error"]["message"]
    assert error == {"type": "error", "code": code, "param": param, "sequence_number": len(events) - 2}
    assert nested == {"type": kind, "code": code, "param": param}
    ResponseErrorEvent.model_validate({**error, "message": ""}, strict=True)
    assert failed["type"] == "response.failed"
    assert (failed["response"]["status"], failed["response"]["error"]["code"]) == ("failed", code)
    assert [item["status"] for item in failed["response"]["output"]] == ["incomplete"]
    ResponseFailedEvent.model_validate(failed)


def test_a_failure_after_comments_alone_is_an_error_event(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(keep_alive_seconds=0.02)
    [error] = named_events(server.post("/v1/responses", input="!stall", timeout=0.2, stream=True).text)
    assert (error["type"], error["param"], error["sequence_number"]) == ("error", "timeout", 0)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match=r"its timeout of 0\.2 s"):
        list(client.responses.create(model="lattice", input="!stall", stream=True, extra_body={"timeout": 0.2}))


def test_another_key_sees_nothing(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(api_key="one,two")
    one, two = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in ("one", "two"))
    made = one.responses.create(model="lattice", input="!say a")
    assert one.responses.retrieve(made.id).output_text == "a"
    with pytest.raises(openai.NotFoundError):
        two.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        two.responses.create(model="lattice", input="a", previous_response_id=made.id)


@pytest.mark.parametrize("wrong", [0, 0.0, "", "false", [], True])
def test_background_is_false_or_absent(server: ServerProcess, wrong: Any) -> None:
    response = server.post("/v1/responses", input="a", background=wrong)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "background")
    assert server.post("/v1/responses", input="a", background=False, max_output_tokens=1).status_code == 200
