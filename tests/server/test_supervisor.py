"""What the supervisor does where there is no process to look after."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lattice_serve.engine.config import EngineConfig
from lattice_serve.server import supervisor as module
from lattice_serve.server.router import Router
from lattice_serve.server.supervisor import Supervisor
from tests.server.harness import wait_for


class Client:
    """Of an engine that nobody hears of."""

    def __init__(self, *, ever_ready: bool) -> None:
        self.ever_ready = ever_ready
        self.worked = False
        self.connected = 0

    async def run(self, socket: Path) -> None:
        self.connected += 1
        await asyncio.sleep(60)


@pytest.fixture
def supervisor(tmp_path: Path) -> Callable[..., Supervisor]:
    def make(command: Path, client: Any) -> Supervisor:
        return Supervisor(EngineConfig(model=tmp_path), client, [str(command)])

    return make


async def test_no_folder_for_temporary_files(
    supervisor: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    failed = supervisor(Path(sys.executable), Client(ever_ready=False))
    await failed.run()
    assert "no folder for the engine's socket: No such file or directory: set TMPDIR" in str(failed.failure)


async def test_an_engine_without_a_process_at_the_start(supervisor: Callable[..., Supervisor], tmp_path: Path) -> None:
    failed = supervisor(tmp_path / "missing", Client(ever_ready=False))
    await failed.run()
    assert "the engine did not start (exit status 126)" in str(failed.failure)


async def test_an_engine_that_is_killed_at_its_start(supervisor: Callable[..., Supervisor], tmp_path: Path) -> None:
    command = tmp_path / "engine"
    command.write_text("#!/bin/sh\nkill -9 $$\n")
    command.chmod(0o700)
    failed = supervisor(command, Client(ever_ready=False))
    await failed.run()
    assert "it was killed, most likely for want of memory: lower max_rows" in str(failed.failure)


async def test_an_engine_that_has_run_is_tried_again_until_there_is_a_process(
    supervisor: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_DELAY_SECONDS", 0.05)
    command, client = tmp_path / "engine", Client(ever_ready=True)
    patient = supervisor(command, client)
    task = asyncio.create_task(patient.run())
    try:
        await asyncio.to_thread(wait_for, lambda: patient.restarts >= 3)
        assert client.connected == 0
        command.write_text("#!/bin/sh\nexec cat > /dev/null  # until the pipe ends\n")
        command.chmod(0o700)
        await asyncio.to_thread(wait_for, lambda: client.connected > 0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert patient.failure is None


async def test_a_supervisor_that_ends_is_a_failure() -> None:
    """Whatever it was, it is not lost: the server ends and says so."""

    class Broken:
        failure = None

        async def run(self) -> None:
            raise ZeroDivisionError("a mistake")

    router = Router([SimpleNamespace(supervisor=Broken())], max_waiting=1)  # type: ignore[list-item]
    await router.__aenter__()
    await asyncio.sleep(0)
    assert isinstance(router.failure, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        await router.__aexit__(None, None, None)
