"""Curves of a run.

python -m lattice_serve.training.plot OUT_DIR curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from lattice_serve.engine.errors import ConfigError

_SMOOTHED = 50
"""Steps that a point of the smoothed training loss averages over."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in order; `ConfigError` if there are none."""
    try:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}: give the folder of a run", param="out") from error
    if not records:
        raise ConfigError(f"{folder}: no step was logged yet", param="out")
    return records


def plot(folder: Path, picture: Path) -> None:
    """Draw training loss, validation bits per byte and learning rate over millions of tokens."""
    records = read_metrics(folder)
    steps = [record for record in records if "loss" in record]
    scores = [record for record in records if "validation_bpb" in record]
    tokens = np.array([record["tokens"] for record in steps]) / 1e6
    losses = np.array([record["loss"] for record in steps])
    figure, axes = plt.subplots(3, 1, figsize=(9, 9), sharex=True, height_ratios=(3, 3, 1), layout="constrained")
    axes[0].plot(tokens, losses, color="0.8", linewidth=0.6, label="each step")
    window = min(_SMOOTHED, len(losses))
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes[0].plot(tokens[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    axes[0].set_ylabel("training loss (nats a token)")
    axes[0].legend()
    axes[1].plot([s["tokens"] / 1e6 for s in scores], [s["validation_bpb"] for s in scores], "C1.-")
    axes[1].set_ylabel("validation (bits per byte)")
    axes[2].plot(tokens, [record["lr"] for record in steps], "C2")
    axes[2].set_ylabel("learning rate")
    axes[2].set_xlabel("million tokens")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lattice_serve.training.plot", description="Draw a run's curves.")
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("picture", type=Path, help="where to write the PNG")
    options = parser.parse_args(arguments)
    plot(options.out, options.picture)


if __name__ == "__main__":
    main()
