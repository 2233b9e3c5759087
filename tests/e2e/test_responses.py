"""A conversation by `previous_response_id`: each turn runs the new message alone."""

from __future__ import annotations

from collections.abc import Callable

import openai

from lattice_serve.engine.weights import bundled_model
from tests.e2e.harness import RealServer


def test_the_past_is_not_run_again(start_server: Callable[..., RealServer]) -> None:
    server = start_server(model=bundled_model())
    new: list[int] = []
    last: str | None = None
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for turn in range(5):
            made = client.responses.create(
                model="lattice",
                input=f"And what did she say the {turn + 1}. time?",
                previous_response_id=last,
                temperature=0,
                max_output_tokens=24,
            )
            assert made.usage is not None
            new.append(made.usage.input_tokens - made.usage.input_tokens_details.cached_tokens)
            last = made.id
    assert max(new[1:]) <= new[0] + 5, new
    assert server.metrics()["prompt_tokens_total"] == sum(new)
