"""This engine beside llama.cpp and vLLM on one machine: decode, prefill and HTTP, in turn, medians and their ratio.

    python benchmarks/peers.py MODEL --programs BIN --gguf llama=LLAMA.gguf --gguf mamba=MAMBA.gguf [--rounds 3]
        [--vllm VLLM --vllm-model FOLDER] [--no-http]

MODEL is a Lattice model folder, BIN the folder of llama.cpp's programs, each GGUF a model to compare with, VLLM that
program, which is measured over HTTP alone. Every round runs everyone once, so that a slow minute of the machine slows
them all. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import httpx
from rich.console import Console
from rich.table import Table

BATCHES = (1, 8, 32, 64)
CLIENTS = (1, 8, 32)
PORT = 18473
URL = f"http://127.0.0.1:{PORT}"
OURS = "lattice"

Figures: TypeAlias = dict[str, float]
"""Tokens a second (or milliseconds, where the name ends so) by what was done."""


def run(command: list[str], **options: Any) -> str:
    """Standard output. Raises `CalledProcessError`."""
    text: str = subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout
    return text


def last_json(text: str) -> Any:
    return json.loads(text.strip().splitlines()[-1])


def ours_offline(model: Path, more: list[str]) -> Figures:
    batches = [option for batch in BATCHES for option in ("--batch", str(batch))]
    report = last_json(run([lattice(), "bench", "offline", str(model), *batches, "--repeats", "1", *more]))
    return {
        "prefill" if each["phase"] == "prefill" else f"decode, batch {each['batch']}": each["tokens_per_second"]
        for each in report["runs"]
    }


def llama_offline(programs: Path, gguf: Path, threads: int) -> Figures:
    sizes = ["-c", "16384", "-ub", "512", "-npp", "128", "-ntg", "64", "-npl", ",".join(map(str, BATCHES))]
    program = [str(programs / "llama-batched-bench"), "-m", str(gguf), "-t", str(threads), "--output-format", "jsonl"]
    lines = [
        json.loads(line) for line in run([*program, *sizes], env=environment(programs)).splitlines() if line[:1] == "{"
    ]
    figures = {f"decode, batch {line['pl']}": float(line["speed_tg"]) for line in lines}
    program = [str(programs / "llama-bench"), "-m", str(gguf), "-t", str(threads), "-p", "512", "-n", "0", "-r", "2"]
    (line,) = json.loads(run([*program, "-o", "json"], env=environment(programs)))
    return figures | {"prefill": float(line["avg_ts"])}


def over_http(command: list[str], name: str | None, *, seconds: float = 120, **options: Any) -> Figures:
    """seconds: how long it may take to start."""
    figures = {}
    with server(command, seconds, **options):
        clients = [option for count in CLIENTS for option in ("--concurrency", str(count))]
        model = ["--model", name] if name else []
        for each in last_json(run([lattice(), "bench", "http", "--url", URL, *clients, *model]))["runs"]:
            label = f"HTTP, {each['load']['concurrency']} at once"
            figures[label] = each["output_tokens_per_second"]
            figures[f"{label}, P99 inter-token ms"] = each["itl_ms"]["p99"]
            figures[f"{label}, failed"] = each["failed"]
    return figures


@contextmanager
def server(command: list[str], seconds: float, **options: Any) -> Iterator[None]:
    """A server at `URL`, ready. Raises `RuntimeError` when it does not come up."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        deadline = time.monotonic() + seconds
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: run it by hand to see why")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


def ready() -> bool:
    """By /ready, or by /health where there is no such thing."""
    try:
        answer = httpx.get(URL + "/ready")
        return (httpx.get(URL + "/health") if answer.status_code == 404 else answer).status_code == 200
    except httpx.HTTPError:
        return False


def lattice() -> str:
    return str(Path(sys.executable).with_name("lattice"))


def environment(programs: Path) -> dict[str, str]:
    return os.environ | {"LD_LIBRARY_PATH": str(programs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Lattice model folder")
    parser.add_argument("--programs", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--gguf", action="append", required=True, metavar="NAME=FILE", help="a peer; may be repeated")
    parser.add_argument("--vllm", type=Path, help="vLLM's program")
    parser.add_argument("--vllm-model", type=Path, help="model folder for it")
    parser.add_argument("--no-http", dest="http", action="store_false", help="without servers, and so without vLLM")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--quantization", choices=["int8"], help="of this engine's weights")
    options = parser.parse_args()
    programs = options.programs.resolve()
    peers = {name: Path(file) for name, _, file in (entry.partition("=") for entry in options.gguf)}
    more = ["--threads", str(options.threads)]
    more += ["--quantization", options.quantization] if options.quantization else []
    names = [OURS, *peers, *(["vllm"] if options.vllm and options.http else [])]
    taken: dict[str, list[Figures]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in taken:
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            figures: Figures = {}
            if name == OURS:
                figures |= ours_offline(options.model, more)
                if options.http:
                    figures |= over_http([lattice(), "serve", str(options.model), "--port", str(PORT), *more], None)
            elif name == "vllm":
                program = [str(options.vllm), "serve", str(options.vllm_model), "--port", str(PORT)]
                sizes = ["--max-model-len", "2048", "--gpu-memory-utilization", "0.3"]  # of main memory, on a CPU
                figures |= over_http([*program, *sizes], None, seconds=600)
            else:
                figures |= llama_offline(programs, peers[name], options.threads)
                program = [str(programs / "llama-server"), "-m", str(peers[name]), "-t", str(options.threads)]
                sizes = ["-np", "32", "-c", "16384", "--port", str(PORT)]
                if options.http:
                    figures |= over_http([*program, *sizes], name, env=environment(programs))
            print(json.dumps(figures), file=sys.stderr, flush=True)
            taken[name].append(figures)
    medians = {name: {key: median(each[key] for each in runs) for key in runs[0]} for name, runs in taken.items()}
    table = Table("", *(OURS if name == OURS else f"{name} (ratio)" for name in names))
    for key, value in medians[OURS].items():
        others = [medians[name].get(key) for name in names[1:]]
        cells = ["" if other is None else f"{other:,.0f} ({value / max(other, 1e-9):.2f})" for other in others]
        table.add_row(key, f"{value:,.0f}", *cells)
    Console().print(table)
    print(json.dumps({"benchmark": "peers", "rounds": options.rounds, "threads": options.threads, "medians": medians}))


if __name__ == "__main__":
    main()
