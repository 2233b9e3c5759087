"""Which silences of an engine are hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lattice_serve.server.watchdog import Watchdog

SPIN = "while True: pass"
SLEEP = "import time; time.sleep(60)"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.fixture
def pid(request: pytest.FixtureRequest) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", *request.param], start_new_session=True)
    yield process.pid
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("pid", [(SLEEP,)], indirect=True)
async def test_one_that_does_nothing(pid: int) -> None:
    asked: list[None] = []
    watchdog = Watchdog(0.5)
    watch = asyncio.create_task(watchdog.watch(pid, lambda: asked.append(None)))
    while watchdog.responsive:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert not watch.done()
    assert await watch == "nothing came from it for 0.5 s, and it did not compute"
    assert not watchdog.responsive


@pytest.mark.parametrize("pid", [(SPIN,), (PARENT, SPIN)], ids=["itself", "a child"], indirect=True)
async def test_one_that_computes_without_an_end(pid: int) -> None:
    watchdog = Watchdog(0.5)
    watch = asyncio.create_task(watchdog.watch(pid, lambda: None))
    await asyncio.sleep(2)
    assert (watch.done(), watchdog.responsive) == (False, True)
    assert await watch == "its step has taken 5 s"


@pytest.mark.parametrize("pid", [(SLEEP,)], indirect=True)
async def test_one_that_answers(pid: int) -> None:
    watchdog = Watchdog(0.5)
    watch = asyncio.create_task(watchdog.watch(pid, watchdog.heard))
    await asyncio.sleep(1)
    assert (watch.done(), watchdog.responsive) == (False, True)
    watch.cancel()


async def test_one_that_has_ended() -> None:
    assert "did not compute" in await Watchdog(0.1).watch(1 << 30, lambda: None)
