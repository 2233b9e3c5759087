"""Bits per byte of held-out text, by the serving engine: the figure of the model card, reproduced.

python -m lattice_serve.training.score DATA_DIR [--model MODEL]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from lattice_serve.engine.errors import LatticeError
from lattice_serve.engine.llm import LLM
from lattice_serve.training.data import read_documents, validation_files


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status. Every document starts behind one end-of-text token."""
    parser = argparse.ArgumentParser(prog="python -m lattice_serve.training.score", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with validation*.txt or validation*.txt.xz")
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled model)")
    options = parser.parse_args(arguments)
    try:
        llm = LLM(options.model, max_rows=1)
        nats = size = 0.0
        began = time.monotonic()
        for path in validation_files(options.data):
            for text in read_documents(path):
                ids = [llm.tokenizer.eos_token_id or 0, *llm.tokenizer.encode(text)]
                nats -= sum(llm.score(ids))
                size += len(text.encode())
                rate = nats / math.log(2) / size
                print(f"{size / 1e6:7.3f} MB  {rate:.4f} bits per byte  {time.monotonic() - began:6.0f} s", flush=True)
    except LatticeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
