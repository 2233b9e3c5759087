"""Hours of all that goes wrong, against a server of its own with the bundled model, over loopback.

    python benchmarks/chaos.py [--seconds 3600] [--clients 12] [--seed 0] [--plot chaos.png]

Clients send requests of all kinds, stream them, go away in the middle, read slowly, and send hostile bodies. The engine
is stopped now and then, and killed in the first part of the time, so that the last one lives long. Every answer is
compared with the one that the server gave at the start: same seed, same prompt, same answer. Memory, descriptors and
rows are sampled every ten seconds. Ends with one line of JSON; exit status 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx
from rich.console import Console
from served import Served, Usage

SAMPLE_SECONDS = 10.0
SETTLE_SECONDS = 600.0
"""Of a process's life, in which its memory may grow: caches fill."""
LEAST_OF = 6
"""Samples."""
KILL_SHARE = 0.4
"""Of the time, in which the engine is killed now and then."""
STOPPED_SECONDS = (0.5, 3.0)
REST_SECONDS = 60.0
CUT = "cut short"
LIMIT_MB_PER_HOUR = 1.0
GRAMMAR = 'root ::= "yes, " [a-z]{2,8} | "no, " [a-z]{2,8}'
COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"

Body = dict[str, Any]


def questions() -> dict[str, tuple[str, Body]]:
    """Requests whose answers are known beforehand, by a name for each."""
    base: Body = {"prompt": "It was a dark and stormy night, and", "max_tokens": 40}
    ids = [3 + 37 * i % 4000 for i in range(600)]
    messages = [{"role": "user", "content": "Who was there?"}]
    completions: dict[str, Body] = {
        "greedy": {"temperature": 0},
        "long prompt": {"prompt": ids, "temperature": 0},
        "sampled": {"seed": 1, "temperature": 0.9, "top_p": 0.9},
        "penalised": {"seed": 2, "presence_penalty": 1.0, "repetition_penalty": 1.2},
        "logprobs": {"seed": 3, "logprobs": 5, "echo": True},
        "choices": {"seed": 4, "n": 3},
        "stop": {"seed": 5, "stop": ["e", "the "], "min_tokens": 4},
        "regular expression": {"seed": 6, "guided_regex": "[a-z ]{5,30}\\."},
        "grammar": {"seed": 7, "guided_grammar": GRAMMAR},
        "schema": {"seed": 8, "guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
    known = {name: (COMPLETIONS, base | body) for name, body in completions.items()}
    known["chat"] = (CHATS, {"messages": messages, "max_tokens": 40, "temperature": 0})
    known["response"] = (RESPONSES, {"input": "Who was there?", "temperature": 0, "store": False, "seed": 1})
    known["response"][1]["max_output_tokens"] = 40
    known["embedding"] = ("/v1/embeddings", {"input": ["It was a dark night", "and she was there"]})
    return known


HOSTILE: list[tuple[str, str, bytes]] = [
    ("POST", COMPLETIONS, body)
    for body in (
        b"{",
        b"[" * 50_000,
        b'{"prompt": "\xff"}',
        b'{"prompt": [99999999]}',
        b'{"prompt": "a", "max_tokens": -1}',
        b'{"prompt": "a", "n": 100000}',
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "guided_regex": "(((("}',
        b'{"prompt": "a", "guided_grammar": "root ::= root root"}',
        b'{"prompt": "a", "guided_json": {"$ref": "#"}}',
        b'{"prompt": "a", "logit_bias": {"x": 1}}',
        b'{"prompt": "' + b"a" * (9 << 20) + b'"}',
    )
]
HOSTILE += [("GET", COMPLETIONS, b""), ("POST", "/nowhere", b"{}"), ("POST", CHATS, b'{"messages": [{}]}')]
HOSTILE += [("POST", RESPONSES, b'{"input": [1]}'), ("POST", "/v1/embeddings", b'{"input": []}')]


def said(path: str, answer: Body) -> Any:
    """All of an answer that must be the same again."""
    if path == RESPONSES:
        return [part["text"] for item in answer["output"] for part in item.get("content", ())]
    if path == "/v1/embeddings":
        return answer["data"]
    choices = [dict(choice) for choice in answer["choices"]]
    for choice in choices:
        choice.get("message", {}).pop("refusal", None)
    return choices


def streamed(path: str, answer: Any) -> Any:
    """The same of a stream, as `said` has it of one that is whole."""
    if path == RESPONSES:
        return answer
    return [choice["text"] if path == COMPLETIONS else choice["message"]["content"] for choice in answer]


@dataclass
class Run:
    """What has happened so far."""

    server: Served
    seconds: float
    began: float = field(default_factory=time.monotonic)
    truths: dict[str, Any] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    """Requests by kind and how they ended."""
    broken: list[str] = field(default_factory=list)
    """Failures that no fault of ours has caused, and answers that were not the same."""
    samples: list[tuple[float, int | None, dict[str, Usage], float]] = field(default_factory=list)
    """Seconds, engine's process, usage, rows in use."""
    kills: int = 0
    stops: int = 0
    _harm: list[float] = field(default_factory=list)
    _harming: bool = False

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    @contextmanager
    def harm(self) -> Iterator[None]:
        """While the engine is away by our doing: requests that fail then count for nothing."""
        self._harming = True
        try:
            yield
        finally:
            self._harming = False
            self._harm.append(self.now)

    def excused(self, since: float) -> bool:
        return self._harming or any(end >= since for end in self._harm)

    def note(self, kind: str, outcome: str, since: float, *, wrong: bool) -> None:
        excused = wrong and self.excused(since)
        self.outcomes[f"{kind}: {outcome}{' by a fault of ours' if excused else ''}"] += 1
        if wrong and not excused:
            self.broken.append(f"at {self.now:.0f} s, {kind}: {outcome}")


async def ask(run: Run, http: httpx.AsyncClient, name: str, draw: random.Random) -> None:
    """A question whole or streamed, to its end or not, and its answer held against the truth."""
    path, body = questions()[name]
    since, how = run.now, draw.choice(["whole", "whole", "streamed", "cut"])
    if path == "/v1/embeddings":
        how = "whole"
    try:
        if how == "whole":
            answer = await http.post(path, json=body)
            if answer.status_code != 200:
                run.note(name, str(answer.status_code), since, wrong=answer.status_code != 429)
            else:
                same = said(path, answer.json()) == run.truths[name]
                run.note(name, "same" if same else "another answer", since, wrong=not same)
            return
        outcome, text = await read_stream(http, path, body, draw.randint(1, 20) if how == "cut" else None)
        wrong = outcome not in ("200", "429", CUT)
        if outcome == "200" and text != streamed(path, run.truths[name]):
            outcome, wrong = "another stream", True
        run.note(name, outcome, since, wrong=wrong)
    except httpx.HTTPError as error:
        run.note(name, type(error).__name__, since, wrong=True)


async def read_stream(http: httpx.AsyncClient, path: str, body: Body, cut: int | None) -> tuple[str, list[str]]:
    """How it ended, and the text of each choice. cut: after so many events the client goes away."""
    texts: dict[int, str] = {}
    async with http.stream("POST", path, json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return str(answer.status_code), []
        events = 0
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            events += 1
            if cut is not None and events > cut:
                return CUT, []
            event = json.loads(line.removeprefix("data: "))
            if event.get("error") or event.get("type") in ("error", "response.failed"):
                return "error event", []
            if event.get("type") == "response.output_text.delta":
                texts[0] = texts.get(0, "") + event["delta"]
            for choice in event.get("choices", ()):
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return "200", [texts[index] for index in sorted(texts)]


async def churn(run: Run, http: httpx.AsyncClient, draw: random.Random) -> None:
    """A prompt that nobody has sent before, for the cache."""
    since, prompt = run.now, draw.choices(range(3, 4000), k=draw.choice([5, 50, 700, 1500]))
    try:
        answer = await http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": draw.randint(1, 30)})
        run.note("new prompt", str(answer.status_code), since, wrong=answer.status_code not in (200, 429))
    except httpx.HTTPError as error:
        run.note("new prompt", type(error).__name__, since, wrong=True)


async def attack(run: Run, http: httpx.AsyncClient, draw: random.Random) -> None:
    """What is no request gets an answer that says so, whatever else happens."""
    since, (method, path, body) = run.now, draw.choice(HOSTILE)
    try:
        status = (await http.request(method, path, content=body)).status_code
        run.note("hostile", str(status), since, wrong=status < 400 or status >= 500)
    except httpx.HTTPError as error:
        # A body that is too large is refused before it has come: some writes then find a closed connection.
        run.note("hostile", type(error).__name__, since, wrong=len(body) < 1 << 20)


async def read_slowly(run: Run, draw: random.Random) -> None:
    """Takes a little of a long stream at a time, for some seconds, and goes away."""
    url, since = httpx.URL(run.server.url), run.now
    long = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True, "logprobs": 5}
    body = json.dumps(long).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    try:
        reader, writer = await asyncio.open_connection(url.host, url.port, limit=1 << 12)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until = run.now + draw.uniform(2, 15)
        while run.now < until and await reader.read(2000):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        writer.transport.abort()
        run.note("slow reader", "gone", since, wrong=False)
    except OSError as error:
        run.note("slow reader", type(error).__name__, since, wrong=True)


async def client(run: Run, number: int, seed: int) -> None:
    draw, names = random.Random(f"{seed} {number}"), sorted(questions())
    async with httpx.AsyncClient(base_url=run.server.url, timeout=120) as http:
        while run.now < run.seconds:
            kind = draw.random()
            if kind < 0.65:
                await ask(run, http, draw.choice(names), draw)
            elif kind < 0.8:
                await churn(run, http, draw)
            elif kind < 0.92:
                await attack(run, http, draw)
            else:
                await read_slowly(run, draw)
            await asyncio.sleep(draw.uniform(0, 0.2))


async def faults(run: Run, seed: int, every: float) -> None:
    """Kills and stops the engine, at random moments `every` so many seconds in the mean."""
    draw = random.Random(f"{seed} faults")
    while (wait := draw.expovariate(1 / every)) + run.now < run.seconds - 2 * SAMPLE_SECONDS:
        await asyncio.sleep(wait)
        pid = run.server.engine_pid
        if pid is None:
            continue
        with run.harm(), suppress(ProcessLookupError):
            if draw.random() < 0.5 and run.now < KILL_SHARE * run.seconds:
                os.kill(pid, signal.SIGKILL)
                run.kills += 1
                await asyncio.sleep(1)
                while not await asyncio.to_thread(run.server.is_ready):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            else:
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(draw.uniform(*STOPPED_SECONDS))
                os.kill(pid, signal.SIGCONT)
                run.stops += 1


async def watch(run: Run) -> None:
    while run.now < run.seconds:
        await asyncio.sleep(min(SAMPLE_SECONDS, max(0.1, run.seconds - run.now)))
        with suppress(httpx.HTTPError):
            rows = await asyncio.to_thread(run.server.rows_used)
            run.samples.append((run.now, run.server.engine_pid, run.server.usage(), rows))


def slopes(run: Run, part: str) -> dict[str, float | None]:
    """Megabytes and descriptors an hour by which the processes have grown that have lived long enough, the worst of
    them; None: none has."""
    lives: dict[int | None, list[tuple[float, Usage]]] = {}
    for at, engine, usage, _ in run.samples:
        lives.setdefault(engine if part == "engine" else run.server.process.pid, []).append((at, usage[part]))
    measured: dict[str, float | None] = {f"{part}_mb_per_hour": None, f"{part}_descriptors_per_hour": None}
    settle = min(SETTLE_SECONDS, run.seconds / 6)
    for life in lives.values():
        settled = [each for each in life if each[0] - life[0][0] >= settle]
        # The least of each minute or so: what requests under way take comes and goes.
        groups = [settled[i : i + LEAST_OF] for i in range(0, len(settled) - LEAST_OF + 1, LEAST_OF)]
        if len(groups) < 3:
            continue
        hours = [group[0][0] / 3600 for group in groups]
        megabytes = [min(usage.megabytes for _, usage in group) for group in groups]
        descriptors = [float(min(usage.descriptors for _, usage in group)) for group in groups]
        for name, values in ((f"{part}_mb_per_hour", megabytes), (f"{part}_descriptors_per_hour", descriptors)):
            slope, known = linear_regression(hours, values).slope, measured[name]
            measured[name] = slope if known is None else max(slope, known)
    return measured


async def measure(options: argparse.Namespace, server: Served) -> Body:
    run = Run(server, options.seconds)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        for name, (path, body) in questions().items():
            run.truths[name] = said(path, (await http.post(path, json=body)).raise_for_status().json())
    run.began = time.monotonic()
    clients = [client(run, number, options.seed) for number in range(options.clients)]
    await asyncio.gather(watch(run), faults(run, options.seed, options.fault_every), *clients)
    free = await asyncio.to_thread(server.wait_until_free, REST_SECONDS)
    figures: Body = {"seconds": options.seconds, "clients": options.clients, "seed": options.seed}
    figures |= {"requests": run.outcomes.total(), "kills": run.kills, "stops": run.stops, "rows_free_at_rest": free}
    for part in ("server", "engine", "children"):
        figures |= slopes(run, part)
    figures["restarts"] = await asyncio.to_thread(server.restarts)
    figures["last_mb"] = {name: round(usage.megabytes) for name, usage in server.usage().items()}
    figures["mismatches"] = sum("another" in each for each in run.broken)
    figures |= {"failures_unexplained": len(run.broken), "examples": run.broken[:20]}
    figures["outcomes"] = dict(sorted(run.outcomes.items()))
    if options.plot is not None:
        plot(run, options.plot)
    return figures


def plot(run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    minutes = [at / 60 for at, *_ in run.samples]
    for part in ("server", "engine", "children"):
        panels[0].plot(minutes, [usage[part].megabytes for _, _, usage, _ in run.samples], label=part)
        panels[1].plot(minutes, [usage[part].descriptors for _, _, usage, _ in run.samples], label=part)
    panels[2].plot(minutes, [rows for *_, rows in run.samples])
    for panel, title in zip(panels, ("memory, MB", "open descriptors", "requests, and the share of rows"), strict=True):
        panel.set_ylabel(title)
    panels[0].legend()
    panels[2].set_xlabel("minutes")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="(%(default)s)")
    parser.add_argument("--clients", type=int, default=12, help="at once (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--fault-every", type=float, default=90, help="seconds, in the mean (%(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG file to draw into")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = {"prefix_cache_memory": "64M", "prefix_cache_file": f"{folder}/states", "prefix_cache_save_seconds": 30}
        with Served(Path(folder), max_rows=16, **cache) as server:
            figures = asyncio.run(measure(options, server))
    Console(stderr=True).print(figures)
    print(json.dumps({"benchmark": "chaos", **figures}))
    grown = [figures[f"{part}_mb_per_hour"] or 0 for part in ("server", "engine", "children")]
    broken = figures["failures_unexplained"] or not figures["rows_free_at_rest"] or max(grown) > LIMIT_MB_PER_HOUR
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main())
