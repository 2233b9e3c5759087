"""A real server for benchmarks that do it harm: started, looked into, and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import httpx

LATTICE = Path(sys.executable).with_name("lattice")
_START_SECONDS = 120.0
_STOP_SECONDS = 90.0


class Usage(NamedTuple):
    """What a process and those that it has started take."""

    megabytes: float
    descriptors: int


class Served:
    """`lattice serve` with the bundled model on a port of its own; its log goes to `folder`. To be used in a `with`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.log = folder / "server.log"
        self.url = ""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in ({"port": 0} | settings).items()]
        self._command = [str(LATTICE), "serve", *flags]

    def __enter__(self) -> Served:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=log)
        until = time.monotonic() + _START_SECONDS
        while not (self.url and self.is_ready()):
            self.url = next((str(line["address"]) for line in self.logged("starting")), "")
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__(None, None, None)
                raise SystemExit(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.engine_pid or 0, signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def engine_pid(self) -> int | None:
        """Of the engine that was started last."""
        return next((int(line["pid"]) for line in reversed(self.logged("engine started"))), None)

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{") and event in line]
        return [each for line in lines if (each := _parsed(line)).get("event") == event]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def metrics(self) -> dict[str, float]:
        """The sums of all samples of each name."""
        values: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0].removeprefix("lattice:")
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def restarts(self) -> int:
        return int(httpx.get(f"{self.url}/health", timeout=30).json()["restarts"])

    def rows_used(self) -> float:
        """Requests that run or wait, and the share of rows that are held."""
        metrics = self.metrics()
        return metrics["state_pool_usage_ratio"] + metrics["num_requests_running"] + metrics["num_requests_waiting"]

    def wait_until_free(self, seconds: float) -> bool:
        """Whether nothing runs, waits or holds a row any more, within so many seconds."""
        until = time.monotonic() + seconds
        while self.rows_used():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def usage(self) -> dict[str, Usage]:
        """Of the server alone, of its engine, and of what else both have started."""
        engine, server = self.engine_pid, self.process.pid
        others = [pid for pid in _descendants(server) if pid != engine]
        groups = {"server": [server], "engine": [] if engine is None else [engine], "children": others}
        return {name: _usage(pids) for name, pids in groups.items()}


def _parsed(line: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(line)
    except ValueError:  # half written
        return {}
    return parsed


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def _usage(pids: list[int]) -> Usage:
    pages = descriptors = 0
    for pid in pids:
        with suppress(OSError, IndexError):  # gone meanwhile
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Usage(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, descriptors)
