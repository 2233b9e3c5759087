"""A `lattice serve` process that a benchmark starts, and what can be read of its processes from outside. Linux only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

START_SECONDS = 120
STOP_SECONDS = 60


class Served:
    """`with Served("--max-rows=8") as server:` starts a server on a free port and waits until it takes requests."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "server.log")

    def __enter__(self) -> Served:
        command = [str(Path(sys.executable).with_name("lattice")), "serve", "--port=0", *self._arguments]
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=file)
        deadline = time.monotonic() + START_SECONDS
        while not (ready := self.logged("ready")):
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.__exit__(None, None, None)
                raise SystemExit(f"the server did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)
        self.url = str(ready[0]["address"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        lines = self._log.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def engine_pid(self) -> int | None:
        """Of the engine that is there now; None while there is none."""
        for child in children(self.pid):
            with suppress(OSError):
                if b"engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        return None

    def signal_engine(self, number: signal.Signals) -> bool:
        """Returns False where there is no engine to be signalled."""
        pid = self.engine_pid
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return True

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over all labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return sum(float(value) for sample, _, value in samples if sample.partition("{")[0] == f"lattice:{name}")


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def memory_mb(pid: int) -> float:
    """Resident memory in MB; 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


def descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0
