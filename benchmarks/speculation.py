"""Decode of one sequence with and without guessing ahead, on text that repeats itself and on text that does not.

    python benchmarks/speculation.py [MODEL] [--tokens 400] [--draft 8] [--rounds 5]

The tokens must be the same, else nothing is reported. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from lattice_serve.engine.llm import LLM
from lattice_serve.engine.sampling import SamplingParams

TEXTS = {
    "a refrain": "The sea, the sea, the open sea, the blue, the fresh, the ever free.\n" * 8,
    "prose": "She looked at the letter for a long time before she spoke.",
}


def decode(llm: LLM, text: str, params: SamplingParams) -> tuple[list[int], float]:
    """Tokens, and how many a second came from the first to the last."""
    ids, times = [], []
    for output in llm.stream(text, params):
        times.append(time.perf_counter())
        if output.token_id is not None:
            ids.append(output.token_id)
    return ids, (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="model folder (the bundled model)")
    parser.add_argument("--tokens", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--draft", type=int, default=8, help="tokens of a draft (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are of that many (%(default)s)")
    options = parser.parse_args()
    engines = [LLM(options.model, max_rows=1, speculative_tokens=draft) for draft in (0, options.draft)]
    runs = []
    for name, text in TEXTS.items():
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=options.tokens, temperature=temperature, seed=1, ignore_eos=True)
            taken: list[list[float]] = [[], []]
            for _ in range(options.rounds):  # in turn, so that a slow minute slows both
                answers = [decode(llm, text, params) for llm in engines]
                if answers[0][0] != answers[1][0]:
                    raise SystemExit(f"{name}: other tokens with guesses than without: not measured")
                for rates, (_, rate) in zip(taken, answers, strict=True):
                    rates.append(rate)
            plain, guessed = map(median, taken)
            runs.append({"text": name, "temperature": temperature, "plain": plain, "speculative": guessed})
    table = Table("text", "temperature", "tokens/s", "with guesses", "ratio")
    for run in runs:
        plain, guessed = float(str(run["plain"])), float(str(run["speculative"]))
        table.add_row(
            str(run["text"]), str(run["temperature"]), f"{plain:,.0f}", f"{guessed:,.0f}", f"{guessed / plain:.2f} x"
        )
    Console().print(table)
    print(json.dumps({"benchmark": "speculation", "draft": options.draft, "tokens": options.tokens, "runs": runs}))


if __name__ == "__main__":
    main()
