"""A chat of many turns: how long the first token of each takes, and how many tokens of its prompt had to be run.

    python benchmarks/conversation.py [--url http://127.0.0.1:8000] [--turns 20] [--rounds 5]

Each round is a conversation of its own with a running server, whose answers become part of the next prompt. Ends with
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from statistics import median

import httpx
from rich.console import Console
from rich.table import Table


def turn(http: httpx.Client, messages: list[dict[str, str]], tokens: int, salt: str) -> tuple[str, float, int]:
    """The answer, milliseconds to its first token, and prompt tokens that no cached state knew."""
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True, "cache_salt": salt}
    text, first, run = "", 0.0, 0
    began = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or 1e3 * (time.perf_counter() - began)
            chunk = json.loads(line.removeprefix("data: "))
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if usage := chunk.get("usage"):
                run = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return text, first, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are of that many (%(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="of each answer (%(default)s)")
    options = parser.parse_args()
    firsts: list[list[float]] = [[] for _ in range(options.turns)]
    runs: list[int] = []
    with httpx.Client(base_url=options.url, timeout=300) as http:
        for _ in range(options.rounds):
            salt = uuid.uuid4().hex  # no round finds what another one left
            messages: list[dict[str, str]] = []
            runs = []
            for number in range(options.turns):
                messages.append({"role": "user", "content": f"What did she say to him the {number + 1}. time?"})
                text, first, run = turn(http, messages, options.tokens, salt)
                messages.append({"role": "assistant", "content": text})
                firsts[number].append(first)
                runs.append(run)
    medians = [median(each) for each in firsts]
    table = Table("turn", "first token, ms", "prompt tokens run")
    for number, (first, run) in enumerate(zip(medians, runs, strict=True), 1):
        table.add_row(str(number), f"{first:.1f}", str(run))
    Console().print(table)
    figures = {"first_token_ms": medians, "prompt_tokens_run": runs, "last_over_second": medians[-1] / medians[1]}
    print(json.dumps({"benchmark": "conversation", "turns": options.turns, "rounds": options.rounds, **figures}))


if __name__ == "__main__":
    main()
