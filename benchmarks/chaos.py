"""An hour of everything at once against a real server that this starts, with the bundled model.

    python benchmarks/chaos.py [--seconds 3600] [--seed 1] [--faults 180] [--plot FILE]

Clients send what ordinary and hostile ones send: streams of all kinds, lists of prompts, embeddings, responses, chats
held to schemas, requests that are cut, readers that are slow, bodies that are nonsense. Every `--faults` seconds the
engine is killed or stopped, in turn (0: never). Every 10 s the memory and the open files of server and engine are read.
At the end all comes to rest. One line of JSON says what was found: how memory grew after the first ten minutes (or a
third of a shorter run), rows still held, 5xx that no fault explains, and greedy answers that were not as at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from served import Served, descriptors, memory_mb
from tqdm import tqdm

WARM_SECONDS = 600
"""In which caches fill."""
SAMPLE_SECONDS = 10.0
FAULT_SECONDS = 45.0
"""After a fault in which errors are its own: an engine that is stopped is noticed, and started again."""
CLIENTS = 12
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TRUTHS = [
    {"prompt": text, "max_tokens": 24, "temperature": 0, "seed": 1}
    for text in ("It was a dark night, and", "She said", "The king looked at", "Once upon a time there was")
]


@dataclass
class Sample:
    seconds: float
    server_mb: float
    engine_mb: float
    engine_pid: int | None
    descriptors: int


@dataclass
class Found:
    """What a run has found."""

    statuses: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)
    """5xx, broken streams and refused connections at times when no fault was near."""
    different: int = 0
    """Greedy answers that were not as at the start."""
    samples: list[Sample] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)


class Chaos:
    def __init__(self, server: Served, seconds: float, seed: int, faults: float) -> None:
        self._server, self._seconds, self._every = server, seconds, faults
        self._draw = random.Random(seed)
        self._began = time.monotonic()
        self.found = Found()
        self._truths: list[str] = []

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=90, limits=limits) as self._http:
            self._truths = [await self._text(body) for body in TRUTHS]
            clients = [self._client(number) for number in range(CLIENTS)]
            await asyncio.gather(self._watch(), self._fault(), *clients)

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    @property
    def _left(self) -> float:
        return self._seconds - self._now

    async def _watch(self) -> None:
        with tqdm(total=round(self._seconds), unit="s", desc="chaos") as bar:
            while self._left > 0:
                self.sample()
                bar.set_postfix(requests=sum(self.found.requests.values()), unexplained=len(self.found.unexplained))
                await asyncio.sleep(min(SAMPLE_SECONDS, max(0.1, self._left)))
                bar.update(round(self._now) - bar.n)

    def sample(self) -> None:
        engine = self._server.engine_pid
        self.found.samples.append(
            Sample(
                self._now,
                memory_mb(self._server.pid),
                memory_mb(engine) if engine else 0.0,
                engine,
                descriptors(self._server.pid),
            )
        )

    async def _fault(self) -> None:
        for number in (signal.SIGKILL, signal.SIGSTOP) * 10_000:
            await asyncio.sleep(min(self._every or self._seconds, max(0.0, self._left)))
            # The last one is far enough from the end for an engine to be back.
            if not self._every or self._left < 2 * FAULT_SECONDS:
                return
            if self._server.signal_engine(number):
                self.found.faults.append(self._now)

    def _explained(self, began: float) -> bool:
        return any(began - FAULT_SECONDS < fault < self._now for fault in self.found.faults)

    async def _client(self, number: int) -> None:
        draw = random.Random(self._draw.random())
        kinds: list[Callable[[random.Random], Awaitable[None]]] = [
            self._truth, self._stream, self._stream, self._cut, self._slow, self._several, self._constrained,
            self._embeddings, self._response, self._scored, self._nonsense, self._broken,
        ]  # fmt: skip
        while self._left > 0:
            kind, began = draw.choice(kinds), self._now
            self.found.requests[kind.__name__.strip("_")] += 1
            try:
                await asyncio.wait_for(kind(draw), 120)
            except (httpx.HTTPError, OSError, asyncio.TimeoutError) as error:
                self._note(f"{kind.__name__.strip('_')}: {type(error).__name__}", began)
            await asyncio.sleep(draw.random() * 0.1)

    def _note(self, what: str, began: float) -> None:
        self.found.statuses[what] += 1
        if not self._explained(began):
            self.found.unexplained.append(f"{began:.0f} s: {what}")

    async def _post(self, path: str, body: Any) -> httpx.Response:
        began = self._now
        response = await self._http.post(path, json=body)
        self._answered(response, path, began)
        return response

    def _answered(self, response: httpx.Response, path: str, began: float) -> None:
        if response.status_code >= 500:
            self._note(f"{path}: {response.status_code} {response.text[:200]}", began)
        else:
            self.found.statuses[str(response.status_code)] += 1

    async def _text(self, body: dict[str, Any]) -> str:
        response = await self._post("/v1/completions", body)
        return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else ""

    # What clients do.

    async def _truth(self, draw: random.Random) -> None:
        place = draw.randrange(len(TRUTHS))
        text = await self._text(TRUTHS[place] | {"cache_salt": draw.choice(["", str(draw.random())])})
        self.found.different += bool(text) and text != self._truths[place]

    async def _stream(self, draw: random.Random, lines: int | None = None, pause: float = 0.0) -> None:
        """lines: after so many the client goes away. pause: before each, in seconds."""
        body = {
            "prompt": [draw.randrange(4096) for _ in range(draw.choice([1, 5, 60, 700]))],
            "max_tokens": draw.choice([1, 20, 200, 1500]),
            "temperature": draw.choice([0, 0.8, 1.5]),
            "seed": draw.getrandbits(30),
            "n": draw.choice([1, 1, 1, 3]),
            "logprobs": draw.choice([None, 3, 20]),
            "stop": draw.choice([None, "e", ["qu", "st", "xyz"]]),
            "presence_penalty": draw.choice([0, 1]),
            "stream": True,
        }
        began = self._now
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            self._answered(response, "/v1/completions", began)
            count, last = 0, ""
            async for line in response.aiter_lines():
                count, last = count + 1, line or last
                if '"error"' in line:
                    self._note(f"stream: {line[:200]}", began)
                if count == lines or self._left < 0:
                    return
                if pause:
                    await asyncio.sleep(pause)
        if response.status_code == 200 and last != "data: [DONE]" and '"error"' not in last:
            self._note("stream: it ended without its end", began)

    async def _cut(self, draw: random.Random) -> None:
        await self._stream(draw, lines=draw.choice([1, 2, 5, 30]))

    async def _slow(self, draw: random.Random) -> None:
        await self._stream(draw, lines=40, pause=0.2)

    async def _several(self, draw: random.Random) -> None:
        prompts = [[draw.randrange(4096)] * draw.randrange(1, 50) for _ in range(draw.choice([2, 9, 60]))]
        await self._post("/v1/completions", {"prompt": prompts, "max_tokens": 8, "logprobs": draw.choice([None, 1])})

    async def _constrained(self, draw: random.Random) -> None:
        grammars: list[dict[str, Any]] = [
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            {"structured_outputs": {"regex": "[a-z]{3,9}( [a-z]{2,5}){0,4}"}},
            {"structured_outputs": {"choice": [f"choice {draw.random()}" for _ in range(5)]}},
            {"structured_outputs": {"grammar": 'root ::= s\ns ::= s s | "a" | "b"'}},
        ]
        messages = [{"role": "user", "content": f"Tell me {draw.random()}"}]
        await self._post("/v1/chat/completions", {"messages": messages, "max_tokens": 60, **draw.choice(grammars)})

    async def _embeddings(self, draw: random.Random) -> None:
        await self._post("/v1/embeddings", {"input": [f"text {draw.random()}"] * draw.choice([1, 8, 100])})

    async def _response(self, draw: random.Random) -> None:
        first = await self._post("/v1/responses", {"input": f"Hello {draw.random()}", "max_output_tokens": 20})
        if first.status_code == 200:
            body = {"input": "And then?", "previous_response_id": first.json()["id"], "max_output_tokens": 20}
            await self._post("/v1/responses", body)

    async def _scored(self, draw: random.Random) -> None:
        ids = [draw.randrange(4096) for _ in range(draw.choice([10, 2000]))]
        await self._post("/v1/completions", {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 2})

    async def _nonsense(self, draw: random.Random) -> None:
        values: list[Any] = [None, -1, 1e308, "x" * 100_000, [[[[]]]], {"a": {}}, [1] * 200_000, "\ud800", True]
        value = draw.choice(values)
        name = draw.choice(["prompt", "max_tokens", "logit_bias", "stop", "n", "seed", "stream_options", "tools"])
        path = draw.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/v1/embeddings"])
        data = json.dumps({"prompt": "x", "input": "x", "max_tokens": 2, "max_output_tokens": 2, name: value})
        began = self._now
        headers = {"content-type": "application/json"}
        self._answered(await self._http.post(path, content=data, headers=headers), path, began)

    async def _broken(self, draw: random.Random) -> None:
        """Bytes that are no request, or half of one."""
        host, _, port = self._server.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n"
        )
        writer.write(
            draw.choice([b"\0" * 500, b"GET / HTTP/9.9\r\n\r\n", head + b'{"prompt": ', head[:40], b"\r\n" * 50])
        )
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.close()


def slopes(samples: list[Sample], seconds: float) -> dict[str, Any]:
    """MB and open files an hour, after the caches have filled: of the server, and of each engine that lived long."""
    warm = min(WARM_SECONDS, seconds / 3)
    late = [sample for sample in samples if sample.seconds > warm]

    def an_hour(points: list[tuple[float, float]]) -> float | None:
        if len(points) < 4:
            return None
        x, y = np.array(points).T
        return round(float(np.polyfit(x / 3600, y, 1)[0]), 2)

    engines = {sample.engine_pid for sample in late if sample.engine_pid}
    return {
        "server_mb_an_hour": an_hour([(s.seconds, s.server_mb) for s in late]),
        "descriptors_an_hour": an_hour([(s.seconds, float(s.descriptors)) for s in late]),
        "engines_mb_an_hour": [
            an_hour([(s.seconds, s.engine_mb) for s in late if s.engine_pid == pid]) for pid in sorted(engines)
        ],
        "server_mb": [round(late[0].server_mb), round(late[-1].server_mb)] if late else None,
        "engine_mb_most": round(max((s.engine_mb for s in late), default=0)),
    }


def draw_plot(found: Found, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    minutes = [sample.seconds / 60 for sample in found.samples]
    axes.plot(minutes, [sample.server_mb for sample in found.samples], label="server, MB")
    axes.plot(minutes, [sample.engine_mb for sample in found.samples], label="engine, MB")
    for fault in found.faults:
        axes.axvline(fault / 60, color="grey", linewidth=0.5)
    axes.set_xlabel("minutes; grey: the engine was killed or stopped")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)


async def rest(server: Served) -> dict[str, float]:
    """Waits until nothing runs or waits; what is still held then."""
    names = ("num_requests_running", "num_requests_waiting", "state_pool_usage_ratio")
    for _ in range(120):
        held = {name: server.metric(name) for name in names}
        if not any(held.values()):
            break
        await asyncio.sleep(0.5)
    return held


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--faults", type=float, default=180, help="seconds between faults; 0: none (%(default)s)")
    parser.add_argument("--plot", type=Path, help="picture of memory over time")
    options = parser.parse_args()
    with Served("--max-rows=32") as server:
        chaos = Chaos(server, options.seconds, options.seed, options.faults)
        await chaos.run()
        held = await rest(server)
        chaos.sample()
        found = chaos.found
        result = {
            "benchmark": "chaos",
            "seconds": options.seconds,
            "faults": len(found.faults),
            "requests": dict(found.requests),
            "statuses": dict(found.statuses.most_common(20)),
            "unexplained": found.unexplained[:20],
            "different": found.different,
            "held_at_rest": held,
            **slopes(found.samples, options.seconds),
        }
    if options.plot:
        draw_plot(found, options.plot)
    print(json.dumps(result))
    raise SystemExit(bool(found.unexplained or found.different or any(held.values())))


if __name__ == "__main__":
    asyncio.run(main())
