"""The command line, from a shell."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.e2e.harness import LATTICE, RealServer


def _lattice(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([LATTICE, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def test_generate_says_what_the_server_says(server: RealServer, model: Path) -> None:
    options = ["--max-tokens", "12", "--seed", "9", "--temperature", "0.7", "--threads", "1"]
    shown = _lattice("generate", "Once upon a time", "--model", model, *options).stdout
    answer = server.complete("Once upon a time", max_tokens=12, seed=9, temperature=0.7)
    assert shown == answer["choices"][0]["text"] + "\n"


def test_init_then_bench(model: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    _lattice("init", model, made, "--seed", "1", "--dtype", "float32")
    sizes = ["--batch", "2", "--decode-tokens", "8", "--prefill-tokens", "32", "--repeats", "1"]
    sizes += ["--position", "50", "--plot", str(tmp_path / "drawn.png")]
    *_, line = _lattice("bench", "offline", made, "--threads", "1", *sizes).stdout.splitlines()
    report = json.loads(line)
    assert report["engine"]["dtype"] == "float32"
    assert [(run["phase"], run["batch"], run["tokens"]) for run in report["runs"]] == [
        ("prefill", 1, 32),
        ("decode", 2, 8),
    ]
    assert all(run["tokens_per_second"] > 0 for run in report["runs"])
    assert report["far"]["position"] == 50
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_bench_http(server: RealServer) -> None:
    load = ["--concurrency", "4", "--requests", "8", "--prompt-tokens", "20", "--output-tokens", "10"]
    *_, line = _lattice("bench", "http", "--url", server.url, *load).stdout.splitlines()
    [run] = json.loads(line)["runs"]
    assert (run["failed"], run["output_tokens"]) == (0, 80)
