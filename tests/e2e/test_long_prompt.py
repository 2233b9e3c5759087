"""What a long prompt costs: time once, and neither memory nor speed afterwards."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.e2e.harness import RealServer, choices, random_ids

LONG = 200_000
DECODED = 300


def test_a_prompt_of_200_000_tokens(server: RealServer, pool: ThreadPoolExecutor) -> None:
    draw = random.Random(2)
    body: dict[str, Any] = {"max_tokens": DECODED, "seed": 1, "ignore_eos": True}
    short, long = body | {"prompt": random_ids(draw, 10)}, body | {"prompt": random_ids(draw, LONG)}
    alone = server.chunks(short)
    resident = _kilobytes(server.engine_pid, "VmRSS")
    # Starts the high-water mark anew.
    Path(f"/proc/{server.engine_pid}/clear_refs").write_text("5")

    first = pool.submit(server.complete, long["prompt"], max_tokens=1)
    # Meanwhile the others go on, with the same answers.
    assert choices(server.chunks(short)) == choices(alone)
    assert not first.done()
    assert first.result(timeout=120)["usage"]["prompt_tokens"] == LONG

    # In turn, and the best of each: what else the machine does makes some slower, and none faster.
    taken = [[_seconds(server, each) for each in (short, long)] for _ in range(4)]
    assert _kilobytes(server.engine_pid, "VmHWM") - resident < 50_000
    near, far = map(min, zip(*taken, strict=True))
    assert far < 1.5 * near


def _seconds(server: RealServer, body: dict[str, Any]) -> float:
    """From the first token to the last, as the client sees it."""
    times = []
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    assert len(times) == DECODED
    return times[-1] - times[0]


def _kilobytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
