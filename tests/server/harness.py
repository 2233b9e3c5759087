"""A server process with a fake engine, as tests drive it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

RUN_SERVER = Path(__file__).with_name("run_server.py")

S = TypeVar("S", bound="ServerProcess")


class ServerProcess:
    """Started on entering `with`, ready there; killed on leaving it if it still runs."""

    start_seconds = 20.0

    def __init__(
        self,
        folder: Path,
        *,
        ready: bool = True,
        engine_options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        **settings: Any,
    ):
        self.record_path = folder / "record.jsonl"
        self.log_path = folder / "server.log"
        self.url = ""
        self._ready = ready
        self._environment = _environment() | (environment or {})
        options = {"port": 0, "max_rows": 8, **settings}
        self._command = [*prefix, sys.executable, str(RUN_SERVER), json.dumps(options)]
        self._command += ["--record", str(self.record_path), *engine_options]

    def __enter__(self: S) -> S:
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=log, env=self._environment)
        if self._ready:
            self.url = wait_for(lambda: self._logged("starting"), self.start_seconds)["address"]
            # A connection a request: none is left over from before a restart.
            self.http = httpx.Client(base_url=self.url, timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
            wait_for(lambda: self.http.get("/ready").status_code == 200, self.start_seconds)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ready:
            self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _logged(self, event: str) -> Any:
        assert self.process.poll() is None, self.log_path.read_text()
        return next((line for line in self.log_lines() if line["event"] == event), None)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in _lines(self.log_path) if line.startswith("{")]

    def records(self, event: str) -> list[dict[str, Any]]:
        """What the fake engine wrote down."""
        if not self.record_path.exists():
            return []
        return [line for line in map(json.loads, _lines(self.record_path)) if line["event"] == event]

    @property
    def engine_pid(self) -> int:
        return int(self.records("start")[-1]["pid"])

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        response = self.post(prompt=prompt, **fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, prompt: Any, **fields: Any) -> list[Any]:
        """The data of every event, parsed but for [DONE]."""
        response = self.post(prompt=prompt, stream=True, **fields)
        assert response.status_code == 200, response.text
        return events(response.text)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and the labels that are not on all of them."""
        text = self.http.get("/metrics").raise_for_status().text
        samples = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.removeprefix("lattice:").replace('engine="0",', "").replace('model_name="lattice"', "")
                samples[name.replace("{}", "").replace(",}", "}").replace("{,", "{")] = float(value)
        return samples


def events(text: str) -> list[Any]:
    parts = text.split("\n\n")
    assert parts.pop() == "", "the stream ends with an empty line"
    data = [part.removeprefix("data: ") for part in parts if not part.startswith(":")]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


def wait_for(ask: Callable[[], Any], seconds: float = 20) -> Any:
    """The first truthy answer."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed server leaves its engine to init, which may not have reaped it yet.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]


def _lines(path: Path) -> list[str]:
    """The lines of a file that somebody writes to: the last one may be half there."""
    *lines, _ = path.read_text().split("\n")
    return lines


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LATTICE_")}
    return environment | {"PYTHONWARNINGS": "error"}
