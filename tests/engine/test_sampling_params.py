"""SamplingParams: every range, however the object comes to be."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.engine.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    SamplingParams,
)

TOO_BIG = 10**400

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("max_tokens", TOO_BIG),
    ("temperature", -0.1),
    ("temperature", 100.1),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -1),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 100.1),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
    ("prompt_logprobs", MAX_LOGPROBS + 1),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", TOO_BIG),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {TOO_BIG: 1.0}),
    ("logit_bias", {1: 100.5}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)),
    ("stop", ("",)),
    ("stop", ("x" * (MAX_STOP_LENGTH + 1),)),
    ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
    ("stop_token_ids", (3, -1)),
    ("stop_token_ids", (TOO_BIG,)),
]

RIGHT: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("temperature", 0.0),
    ("temperature", 100.0),
    ("top_p", 0),
    ("top_p", 1e-9),
    ("top_k", 0),
    ("min_p", 1.0),
    ("presence_penalty", -2.0),
    ("frequency_penalty", 2.0),
    ("repetition_penalty", 100.0),
    ("min_tokens", 16),
    ("logprobs", 0),
    ("logprobs", MAX_LOGPROBS),
    ("seed", -(2**63)),
    ("seed", 2**63 - 1),
    ("logit_bias", {0: -100.0, 1: 100.0}),
    ("stop", ("x" * MAX_STOP_LENGTH,) * MAX_STOP_STRINGS),
    ("stop_token_ids", (0, 5)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda x: str(x)[:20])
def test_a_value_out_of_range_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert caught.value.status == 400


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
)
def test_no_number_may_be_nan_or_infinite(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(("name", "value"), RIGHT, ids=lambda x: str(x)[:20])
def test_the_ends_of_each_range_are_taken_and_survive_a_message(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_a_message_is_checked_like_a_call() -> None:
    with pytest.raises(InvalidParameter) as caught:
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 3.0}), type=SamplingParams)
    assert caught.value.param == "top_p"


def test_a_message_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="top_q"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_q": 0.5}), type=SamplingParams)


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(top_p=0).greedy
    assert not SamplingParams(temperature=1e-9).greedy


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("temperature", 1, 1.0),
        ("top_p", 1, 1.0),
        ("presence_penalty", -2, -2.0),
        ("logit_bias", {3: 5}, {3: 5.0}),
        ("stop", ["a"], ("a",)),
        ("stop_token_ids", [3], (3,)),
    ],
)
def test_what_can_be_meant_by_another_type_is_taken(name: str, given: Any, taken: Any) -> None:
    value = getattr(SamplingParams(**{name: given}), name)
    assert (value, type(value)) == (taken, type(taken))
    if name == "logit_bias":
        assert type(value[3]) is float


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", None),
        ("max_tokens", 1.5),
        ("max_tokens", None),
        ("stop", "a"),
        ("stop", [1]),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("seed", 0.5),
        ("logprobs", True),
        ("ignore_eos", 1),
        ("grammar", "a*"),
    ],
)
def test_another_type_is_refused_by_name(name: str, given: Any) -> None:
    with pytest.raises(InvalidParameter, match=f"^{name}: Expected ") as caught:
        SamplingParams(**{name: given})
    assert caught.value.param == name
