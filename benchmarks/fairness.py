"""What one API key can take from another: a greedy key against a polite one, on a server of this script's own.

    python benchmarks/fairness.py [--clients 4] [--greedy 200] [--seconds 10] [--rounds 3] [--store]

Starts a server of the bundled model with 32 rows and 96 places to wait, on loopback, and ends it. Each attack runs for
`--seconds` beside the polite key's clients, which send streamed completions one after another. They are held against
the same clients beside a key that fills the other rows and lets nothing wait. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from served import Served

ROWS, WAITING = 32, 96
POLITE, GREEDY = "polite", "greedy"
HARD = 'root ::= "' + "☃" * 24 + '" s\ns ::= s s | "a" | "b"'
Figures: TypeAlias = "dict[str, float | None]"
Body = Callable[[int], dict[str, Any]]


class Tally:
    """What the clients of one key got."""

    def __init__(self) -> None:
        self.firsts: list[float] = []
        """Seconds to the first token."""
        self.done = self.refused = self.tokens = 0

    def summary(self, seconds: float) -> Figures:
        firsts = sorted(self.firsts)
        return {
            "done": self.done,
            "refused": self.refused,
            "tokens_per_second": round(self.tokens / seconds, 1),
            "first_p50_ms": round(1e3 * firsts[len(firsts) // 2], 1) if firsts else None,
            "first_p99_ms": round(1e3 * firsts[int(0.99 * (len(firsts) - 1))], 1) if firsts else None,
        }


async def post(
    port: int, key: str, body: dict[str, Any], tally: Tally | None = None, path: str = "/v1/completions"
) -> bytes:
    """Send one request, and read its answer to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
        began = time.perf_counter()
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        answer, first = b"", 0.0
        while piece := await reader.read(1 << 16):
            answer = answer + piece if not body.get("stream") or b"\r\n\r\n" not in answer else answer
            if tally is not None:
                tally.tokens += piece.count(b"data: {")
            if not first and b"data: {" in piece:
                first = time.perf_counter() - began
        if tally is not None:
            tally.refused += answer.startswith(b"HTTP/1.1 429")
            if first:
                tally.firsts.append(first)
                tally.done += 1
        return answer
    finally:
        writer.close()


async def loop(port: int, key: str, make: Body, numbers: itertools.count[int], tally: Tally, until: float) -> None:
    """One client: a request after another."""
    while time.monotonic() < until:
        refused = tally.refused
        await post(port, key, make(next(numbers)), tally)
        if tally.refused > refused:
            await asyncio.sleep(0.05)


def completion(tokens: int, **fields: Any) -> Body:
    return lambda number: {
        "prompt": f"{number} times she said to him that",
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
        **fields,
    }


async def beside(
    port: int, clients: int, others: int, make: Body, seconds: float, *, polite: Body | None = None
) -> tuple[Figures, Figures]:
    """What `clients` of the polite key and `others` of the greedy one get. The first quarter is not counted."""
    until, numbers = time.monotonic() + 1.25 * seconds, itertools.count()
    warm = Tally()
    tallies = {POLITE: Tally(), GREEDY: Tally()}
    tasks = [asyncio.create_task(loop(port, GREEDY, make, numbers, tallies[GREEDY], until)) for _ in range(others)]
    asked = polite or completion(32)
    begun = until - seconds
    first = [loop(port, POLITE, asked, numbers, warm, begun) for _ in range(clients)]
    await asyncio.gather(*first)
    begun = time.monotonic()
    await asyncio.gather(*(loop(port, POLITE, asked, numbers, tallies[POLITE], until) for _ in range(clients)))
    took = time.monotonic() - begun
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.5)
    return tallies[POLITE].summary(took), tallies[GREEDY].summary(1.25 * seconds)


async def cached(port: int, key: str, prompt: str) -> int:
    """Tokens of a prompt whose state was there, and is there then."""
    answer = await post(port, key, {"prompt": prompt, "max_tokens": 1})
    usage = json.loads(answer[answer.index(b"\r\n\r\n") :])["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


async def cache_points(port: int) -> Figures:
    """48 requests with 64 cache points each: of the polite key's 20 prompts, how many are still cached?"""
    prompts = [f"The {number}. story began in a small house, where he" for number in range(20)]
    for prompt in prompts:
        await cached(port, POLITE, prompt)
    words = " and".join(f" one{number}" for number in range(400))
    points = list(range(10, 650, 10))
    for number in range(48):
        await post(port, GREEDY, {"prompt": f"{number}{words}", "max_tokens": 0, "cache_points": points})
    kept = [await cached(port, POLITE, prompt) > 0 for prompt in prompts]
    return {"prompts": len(kept), "still_cached": sum(kept)}


async def stored(port: int) -> Figures:
    """Responses of one key, more than the store holds: is that of the other still there?"""
    body: dict[str, Any] = {"input": "Hello", "max_output_tokens": 1}
    answer = await post(port, POLITE, body, path="/v1/responses")
    response = json.loads(answer[answer.index(b"\r\n\r\n") :])["id"]
    numbers = iter(range(10_500))

    async def store() -> None:
        for _ in numbers:
            await post(port, GREEDY, body, path="/v1/responses")

    await asyncio.gather(*(store() for _ in range(24)))
    answer = await post(port, POLITE, {**body, "previous_response_id": response}, path="/v1/responses")
    return {"responses": 10_500, "still_there": int(answer.startswith(b"HTTP/1.1 200"))}


async def hard_grammar(port: int, seconds: float) -> Figures:
    """Four streams alone, and beside 128 sequences of a grammar that behaves for 24 characters."""
    body = completion(1_000_000)
    rates = []
    for hard in (False, True):
        tally = Tally()
        tasks = [asyncio.create_task(post(port, POLITE, body(number), tally)) for number in range(4)]
        if hard:
            asked = {"prompt": "x", "n": 128, "max_tokens": 3000, "stream": True, "ignore_eos": True}
            tasks.append(asyncio.create_task(post(port, GREEDY, {**asked, "guided_grammar": HARD})))
            await asyncio.sleep(2 * seconds)  # until it is hard
        await asyncio.sleep(1)
        before = tally.tokens
        await asyncio.sleep(seconds)
        rates.append((tally.tokens - before) / seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.5)
    return {"alone_tokens_per_second": round(rates[0]), "beside_tokens_per_second": round(rates[1])}


@contextmanager
def server(rows: int, waiting: int, **settings: Any) -> Iterator[int]:
    """The port of one that runs until the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = folder / "keys"
        keys.write_text(f"{POLITE}\n{GREEDY}\n")
        with Served(folder, api_key_file=keys, max_rows=rows, max_waiting=waiting, **settings) as served:
            yield int(served.url.rpartition(":")[2])


async def attacks(port: int, options: argparse.Namespace) -> dict[str, Figures]:
    clients, seconds, figures = options.clients, options.seconds, {}
    other = completion(64)
    urgent = completion(64, priority=1 - 2**31)
    loads = {"fair": (ROWS - clients, other), "greedy": (options.greedy, other), "priority": (options.greedy, urgent)}
    shares: dict[str, list[float]] = {"greedy": [], "priority": []}
    for _ in range(options.rounds):  # in turns: the machine may have other work at times
        for name, (others, body) in loads.items():
            figures[name], _ = await beside(port, clients, others, body, seconds)
        for name, each in shares.items():
            each.append((figures[name]["tokens_per_second"] or 0) / (figures["fair"]["tokens_per_second"] or 1))
    figures["share of fair"] = {name: round(median(each), 3) for name, each in shares.items()}

    def quick(number: int) -> dict[str, Any]:
        return completion(16, guided_regex=f"[a-z ]{{12,14}}{number}")(number)

    def slow(number: int) -> dict[str, Any]:
        return completion(16, guided_regex=f"(([a-y]{{1,80}}{number}){{1,60}}\\w){{1,9}}")(number)

    figures["grammars, fair"], _ = await beside(port, clients, ROWS - clients, other, seconds, polite=quick)
    figures["slow grammars"], _ = await beside(port, clients, 48, slow, seconds, polite=quick)
    if options.store:
        figures["stored responses"] = await stored(port)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4, help="of the polite key (%(default)s)")
    parser.add_argument("--greedy", type=int, default=200, help="clients of the greedy one (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each attack (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="shares are medians of that many (%(default)s)")
    parser.add_argument("--store", action="store_true", help="store 10,500 responses, too")
    options = parser.parse_args()
    with server(ROWS, WAITING) as port:
        figures = asyncio.run(attacks(port, options))
    with server(ROWS, WAITING, prefix_cache_memory="64M") as port:
        figures["cache points"] = asyncio.run(cache_points(port))
    with server(256, 1024) as port:
        figures["hard grammar"] = asyncio.run(hard_grammar(port, options.seconds))
    table = Table("", "of the polite key")
    for name, values in figures.items():
        table.add_row(name, ", ".join(f"{each} {value}" for each, value in values.items()))
    Console().print(table)
    settings = {"clients": options.clients, "greedy_clients": options.greedy, "rows": ROWS, "places": ROWS + WAITING}
    print(json.dumps({"benchmark": "fairness", **settings, **figures}))


if __name__ == "__main__":
    main()
