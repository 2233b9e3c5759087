"""The load generators that others use, `vllm bench serve` and `guidellm`, against a running server, on every route.

    python benchmarks/clients.py [--vllm PROGRAM] [--guidellm PROGRAM] [--url http://127.0.0.1:8000] [--model FOLDER]

Each is a program of an environment of its own: `pip install vllm` (a build for the CPU will do), `pip install guidellm
sentencepiece protobuf`. FOLDER is that of the served model, for its tokenizer. A run in which a request fails, or a
token is missing, ends it all. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from lattice_serve.engine.weights import bundled_model

VLLM_ROUTES = {
    "/v1/completions": "openai",
    "/v1/chat/completions": "openai-chat",
    "/v1/responses": "openai-responses",
    "/v1/embeddings": "openai-embeddings",
}
"""With the names of vLLM's backends."""
GUIDELLM_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
SIZES = {"input": 128, "output": 64}
"""Tokens of a prompt, about, and of an answer. The tokenizer as these programs read it splits a little otherwise."""


def run(command: list[str]) -> None:
    """Offline: the tokenizer is here, and nothing else is wanted."""
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{(done.stdout + done.stderr)[-3000:]}")


def vllm(options: argparse.Namespace, route: str, folder: Path) -> dict[str, Any]:
    command = [str(options.vllm), "bench", "serve", "--base-url", options.url, "--tokenizer", str(folder)]
    command += ["--backend", VLLM_ROUTES[route], "--endpoint", route, "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", str(SIZES["input"]), "--random-output-len", str(SIZES["output"])]
    command += ["--num-prompts", str(options.requests), "--max-concurrency", str(options.concurrency)]
    run([*command, "--save-result", "--result-dir", str(folder), "--result-filename", "result.json"])
    result = json.loads((folder / "result.json").read_text())
    if route == "/v1/embeddings":
        return {"answered": result["completed"], "e2e_ms": result["median_e2el_ms"]}
    return {
        "answered": result["completed"],
        "output_tokens": result["total_output_tokens"],
        "output_tokens_per_second": result["output_throughput"],
        "ttft_ms": result["median_ttft_ms"],
        "tpot_ms": result["median_tpot_ms"],
    }


def guidellm(options: argparse.Namespace, route: str, folder: Path) -> dict[str, Any]:
    result = folder / "result.json"
    command = [str(options.guidellm), "run", "--disable-console", "--output", f"kind=json,path={result}"]
    command += ["--backend", f"kind=openai_http,target={options.url},request_format={route}"]
    command += ["--profile", f"kind=concurrent,streams={options.concurrency}"]
    command += ["--constraint", f"kind=max_requests,count={options.requests}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={folder}"]
    run([*command, "--data", f"kind=synthetic_text,prompt_tokens={SIZES['input']},output_tokens={SIZES['output']}"])
    [benchmark] = json.loads(result.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    good = {name: metrics[name]["successful"] for name in metrics if name.endswith(("_ms", "_count", "_second"))}
    return {
        "answered": metrics["request_totals"]["successful"],
        "output_tokens": good["output_token_count"]["total_sum"],
        "output_tokens_per_second": good["output_tokens_per_second"]["mean"],
        "ttft_ms": good["time_to_first_token_ms"]["median"],
        "tpot_ms": good["time_per_output_token_ms"]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="(%(default)s)")
    parser.add_argument(
        "--model", type=Path, default=bundled_model(), help="folder of the served model (the bundled one)"
    )
    parser.add_argument("--vllm", type=Path, help="vLLM's program")
    parser.add_argument("--guidellm", type=Path, help="guidellm's program")
    parser.add_argument("--requests", type=int, default=24, help="of each run (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="(%(default)s)")
    options = parser.parse_args()
    jobs = [("vllm", vllm, route) for route in VLLM_ROUTES if options.vllm]
    jobs += [("guidellm", guidellm, route) for route in GUIDELLM_ROUTES if options.guidellm]
    if not jobs:
        parser.error("give --vllm or --guidellm, or both")
    runs = []
    table = Table("client", Column("route", no_wrap=True), "answered", "tokens/s", "first token, ms", "a token, ms")
    for name, job, route in jobs:
        print(f"{name}: {route}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            # As transformers reads it.
            (folder / "tokenizer.model").symlink_to((options.model / "tokenizer.model").resolve())
            (folder / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}'
            )
            figures = job(options, route, folder)
        tokens = options.requests * SIZES["output"]
        if figures["answered"] != options.requests or figures.get("output_tokens", tokens) != tokens:
            raise SystemExit(f"{name}, {route}: requests failed, or tokens are missing: {figures}")
        runs.append({"client": name, "route": route, **figures})
        shown = [figures.get(key) for key in ("output_tokens_per_second", "ttft_ms", "tpot_ms")]
        table.add_row(
            name, route, str(figures["answered"]), *("" if value is None else f"{value:,.1f}" for value in shown)
        )
    Console().print(table)
    print(json.dumps({"benchmark": "clients", "concurrency": options.concurrency, **SIZES, "runs": runs}))


if __name__ == "__main__":
    main()
