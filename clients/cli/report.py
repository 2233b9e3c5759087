"""What benchmarks show: progress on standard error, a table and a line of JSON on standard output."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lattice_serve.clients.errors import ClientError
from lattice_serve.clients.stats import Spread


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def table(*columns: str) -> Table:
    made = Table(box=None, header_style="bold", caption_justify="left")
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index else "left", no_wrap=True)
    return made


def spread(values: Spread | None) -> str:
    return "none" if values is None else f"{values.mean:.1f} / {values.p50:.1f} / {values.p99:.1f}"


def finish(shown: Table, result: dict[str, Any], path: Path | None) -> None:
    """Print `shown` and, as the last line, `result` with when and where it was measured; write that to `path` too.

    Raises `ClientError` when `path` cannot be written, after printing.
    """
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    made = {"version": version("lattice-serve"), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    line = msgspec.json.encode({**made, **machine, **result}).decode()
    # Not a terminal's 80 columns where there is no terminal: a table in a log is not to be cut.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(shown)
    print(line)
    if path is not None:
        try:
            path.write_text(line + "\n", encoding="utf-8")
        except OSError as error:
            raise ClientError(f"{path}: {error.strerror}: name a file that can be written") from error
