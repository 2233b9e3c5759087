"""What hostile bodies, hard grammars and slow readers do to 16 ordinary streams: gaps between tokens with and without.

    python benchmarks/hostile.py [--turns 3] [--seconds 10] [--streams 16]

A server of its own with the bundled model, over loopback. Turns without and with the hostile load take turns, so that a
noisy machine affects both. The load is a process of its own. Ends with one line of JSON; exit status 1 where the 99th
percentile is more than twice that without, a gap is longer than 100 ms (which says something on a quiet machine alone),
an ordinary request failed, or the engine died.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from served import Served

from lattice_serve.clients.client import AsyncClient
from lattice_serve.clients.errors import ClientError
from lattice_serve.clients.stats import percentile
from lattice_serve.clients.transport import LeanTransport

MOST_MS, MOST_TIMES = 100.0, 2.0
TOKENS = 200
"""Of an ordinary answer."""
SLOW_READERS = 6
SLOW_BYTES, SLOW_SECONDS = 3600, 0.1
"""36 kB/s, each."""
AMBIGUOUS = 'root ::= "☃" s\ns ::= s s | "a" | "b"'
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def large_bodies() -> list[tuple[str, bytes]]:
    """A few megabytes each, of the kinds that are dear to parse, to check or to answer."""
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string", "enum": ["a", "b"]} for i in range(60_000)}}
    message = [{"role": "user", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": wide}}]
    bodies: list[tuple[str, Any]] = [
        (CHATS, {"messages": message, "tools": tools}),
        (CHATS, {"messages": message, "chat_template_kwargs": {f"k{i}": [i] for i in range(300_000)}}),
        (COMPLETIONS, {"prompt": [[1]] * 1_500_000}),
        (COMPLETIONS, {"prompt": ["a"] * 1_000_000}),
        (COMPLETIONS, {"prompt": [9] * 400_000, "max_tokens": 1, "prompt_logprobs": 20}),
        (COMPLETIONS, {"prompt": "a", "guided_json": wide}),
        ("/tokenize", {"prompt": "It was a dark night. " * 300_000}),
        ("/detokenize", {"tokens": [300] * 1_500_000}),
        ("/v1/embeddings", {"input": ["a"] * 500_000}),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 100_000, "store": False}),
    ]
    return [(path, json.dumps(body).encode()[: 8 << 20]) for path, body in bodies]


async def send_large(http: httpx.AsyncClient, told: Counter[str], draw: random.Random) -> None:
    path, body = draw.choice(BODIES)
    with suppress(httpx.HTTPError):
        told[f"{path} {(await http.post(path, content=body)).status_code}"] += 1


async def send_grammar(http: httpx.AsyncClient, told: Counter[str], draw: random.Random) -> None:
    hard = draw.choice(
        [
            {"n": 32, "guided_grammar": AMBIGUOUS, "max_tokens": 200},
            {"guided_regex": f"(a|b)*a(a|b){{{draw.randint(8, 14)}}}{draw.random()}", "max_tokens": 20},
            {"n": 8, "stop": ["x" * 250 + str(i) for i in range(16)], "max_tokens": 20},
        ]
    )
    with suppress(httpx.HTTPError):
        told[f"grammar {(await http.post(COMPLETIONS, json={'prompt': 'a'} | hard)).status_code}"] += 1


async def read_slowly(url: httpx.URL) -> None:
    long = {"prompt": "Once", "max_tokens": 10**6, "ignore_eos": True, "stream": True, "logprobs": 20}
    body = json.dumps(long).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    with suppress(OSError):
        reader, writer = await asyncio.open_connection(url.host, url.port, limit=1 << 12)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        try:
            while await reader.read(SLOW_BYTES):  # noqa: ASYNC110
                await asyncio.sleep(SLOW_SECONDS)
        finally:
            writer.transport.abort()


BODIES = large_bodies()


def be_hostile(url: str, seconds: float, seed: int, told: Any) -> None:
    """The load, for so many seconds: two connections with large bodies, two with hard grammars, six slow readers."""
    count: Counter[str] = Counter()

    async def load() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=seconds) as http:

            async def again(send: Any, number: int) -> None:
                draw = random.Random(f"{seed} {send.__name__} {number}")
                while True:
                    await send(http, count, draw)
                    await asyncio.sleep(0.01)

            clients = [again(send, number) for send in (send_large, send_grammar) for number in range(2)]
            clients += [read_slowly(httpx.URL(url)) for _ in range(SLOW_READERS)]
            await asyncio.gather(*clients)

    async def bounded() -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(load(), seconds)

    asyncio.run(bounded())
    told.put(dict(count))


async def gaps(url: str, streams: int, seconds: float) -> tuple[list[float], int]:
    """Milliseconds between the tokens of `streams` streams at once, and requests that failed."""
    measured: list[float] = []
    failed = 0
    until = time.perf_counter() + seconds

    async def stream(client: AsyncClient, number: int) -> None:
        nonlocal failed
        draw = random.Random(number)
        while time.perf_counter() < until:
            prompt, last = draw.choices(range(3, 4000), k=20), 0.0
            try:
                async with await client.completions(prompt, stream=True, max_tokens=TOKENS, ignore_eos=True) as chunks:
                    async for chunk in chunks:
                        now = time.perf_counter()
                        if chunk.choices and last:
                            measured.append(1e3 * (now - last))
                        last = now
            except ClientError:
                failed += 1
                await asyncio.sleep(0.05)

    async with AsyncClient(url, model="lattice", max_retries=0, transport=LeanTransport()) as client:
        await asyncio.gather(*(stream(client, number) for number in range(streams)))
    return measured, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="of each kind (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="of a turn (%(default)s)")
    parser.add_argument("--streams", type=int, default=16, help="ordinary ones (%(default)s)")
    options = parser.parse_args()
    measured: dict[bool, list[float]] = {False: [], True: []}
    failed = {False: 0, True: 0}
    answers: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, Served(Path(folder), max_rows=64) as server:
        asyncio.run(gaps(server.url, options.streams, 2))  # warm
        for turn in range(2 * options.turns):
            hostile, told = turn % 2 == 1, context.Queue()
            load = context.Process(target=be_hostile, args=(server.url, options.seconds + 2, turn, told))
            if hostile:
                load.start()
                time.sleep(2)  # until it has made its bodies, and sends them
            values, failures = asyncio.run(gaps(server.url, options.streams, options.seconds))
            measured[hostile] += values
            failed[hostile] += failures
            if hostile:
                answers.update(told.get(timeout=60))
                load.join()
                server.wait_until_free(60)
        restarts = server.restarts()
    table = Table("", "tokens", "median, ms", "99%, ms", "longest, ms", "failed")
    figures: dict[str, Any] = {"turns": options.turns, "seconds": options.seconds, "streams": options.streams}
    for hostile, name in ((False, "without"), (True, "with")):
        values = measured[hostile]
        p50, p99, longest = (percentile(values, percent) for percent in (50, 99, 100))
        table.add_row(name, str(len(values)), *(f"{each:.1f}" for each in (p50, p99, longest)), str(failed[hostile]))
        figures[name] = {"tokens": len(values), "p50_ms": p50, "p99_ms": p99, "longest_ms": longest}
        figures[name]["failed"] = failed[hostile]
    Console(stderr=True).print(table)
    times = figures["with"]["p99_ms"] / figures["without"]["p99_ms"]
    figures |= {"p99_times": times, "restarts": restarts, "hostile_answers": dict(sorted(answers.items()))}
    print(json.dumps({"benchmark": "hostile", **figures}))
    return int(times > MOST_TIMES or figures["with"]["longest_ms"] > MOST_MS or restarts > 0 or failed[True] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
