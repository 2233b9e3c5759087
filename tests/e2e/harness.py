"""`lattice serve` itself as tests drive it, its engine process included."""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.server.harness import ServerProcess
from tests.tiny import VOCAB_SIZE

LATTICE = str(Path(sys.executable).with_name("lattice"))


class RealServer(ServerProcess):
    """Serves the model folder `model`; further settings are options of the command, None: not given."""

    start_seconds = 120.0
    """The first engine on a machine compiles its kernels."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        **settings: Any,
    ):
        super().__init__(folder, environment=environment)
        # The name is what `metrics` leaves out.
        options = {"port": 0, "max_rows": 8, "threads": 1, "served_model_name": "lattice"} | settings
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        self._command = [*prefix, LATTICE, "serve", str(model), *flags]

    def logged(self, event: str) -> dict[str, Any]:
        """The last such line of the log."""
        return [line for line in self.log_lines() if line["event"] == event][-1]

    @property
    def engine_pid(self) -> int:
        return int(self.logged("engine started")["pid"])

    def load_seconds(self) -> float:
        """From the start of the last engine process until it took requests."""
        start, end = (self.logged(event)["timestamp"] for event in ("engine started", "ready"))
        # Python 3.10 does not read the Z.
        started, ready = (datetime.fromisoformat(time.replace("Z", "+00:00")) for time in (start, end))
        return (ready - started).total_seconds()

    def chunks(self, body: dict[str, Any], *, cut_after: int | None = None) -> list[dict[str, Any]]:
        """What streams for `body`, to its end; with `cut_after`, that many chunks, and the client goes away."""
        chunks: list[dict[str, Any]] = []
        with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return chunks
                if line.startswith("data: "):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                if len(chunks) == cut_after:
                    return chunks
        raise AssertionError("the stream ended without [DONE]")

    def is_idle(self) -> bool:
        metrics = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "state_pool_usage_ratio")
        return all(metrics[name] == 0 for name in names)


def choices(chunks: list[dict[str, Any]]) -> list[Any]:
    """All that has to be equal when the same request is sent again."""
    return [chunk["choices"] for chunk in chunks]


def random_ids(draw: random.Random, count: int) -> list[int]:
    return draw.choices(range(VOCAB_SIZE), k=count)


def random_request(draw: random.Random) -> dict[str, Any]:
    """A request of mixed length and sampling, whose answer its seed decides."""
    length = draw.choice([1, 2, 3, 5, 16, 17, 64, 150, 400])
    text = "".join(draw.choices(string.ascii_lowercase + "  \né", k=length))
    body: dict[str, Any] = {
        "prompt": draw.choice([text, random_ids(draw, length)]),
        "max_tokens": draw.randint(1, 60),
        "seed": draw.getrandbits(40),
        "temperature": draw.choice([0, 0.5, 1, 1, 1.5]),
    }
    extras: list[dict[str, Any]] = [
        {"top_p": 0.8, "top_k": 50},
        {"min_p": 0.05},
        {"stop": ["st", "qu", "ing"]},
        {"stop": "e", "min_tokens": 1, "include_stop_str_in_output": True},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"logit_bias": {"300": 5, "301": -100}},
        {"logprobs": 3},
        {"ignore_eos": True},
    ]
    for extra in draw.sample(extras, k=draw.randint(0, 3)):
        body |= extra
    return body | {"min_tokens": min(body.get("min_tokens", 0), body["max_tokens"])}
