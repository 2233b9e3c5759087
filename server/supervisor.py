"""Keeps one engine process running: starts it, restarts it when it dies or hangs, ends it with the server."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from lattice_serve.engine import child_process
from lattice_serve.engine.config import SAVE_SECONDS, EngineConfig
from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.own_folder import OwnFolder
from lattice_serve.server.engine_client import EngineClient

log = structlog.get_logger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "lattice_serve.engine.process")

_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 10.0
_STABLE_SECONDS = 60.0
"""An engine that lived that long, or has generated something, is restarted without the delays that earlier deaths have
added."""
_LAST_SECONDS = 1.0
_STOP_SECONDS = 3.0
_STDERR = 2
_NOT_STARTED = 126
"""Exit status of an engine without a process: what a shell has for a command that cannot be run."""


class Supervisor:
    """`run` it to have an engine: `command --socket PATH --config JSON`, PATH in a folder with mode 0700, its own.

    The engine writes to the server's stderr; it is out of reach of the terminal's Ctrl-C, so that the server
    can drain first; and its stdin ends when the server does, however that happens.
    """

    def __init__(
        self,
        config: EngineConfig,
        client: EngineClient,
        command: Sequence[str] = ENGINE_COMMAND,
        cache_options: Sequence[str] = (),
    ) -> None:
        """cache_options: where what an engine has cached outlives it; writing it may take a while at the end."""
        self.restarts = 0
        self.failure: ConfigError | None = None
        """Set when the engine cannot be started, or ended before it was ever ready: trying again would not help."""
        self._config = config
        self._client = client
        self._command = [*command, *cache_options]
        self._stop_seconds = SAVE_SECONDS if cache_options else _STOP_SECONDS

    async def run(self) -> None:
        """Until cancelled, or until there is a `failure`."""
        deaths = 0
        while True:
            started = time.monotonic()
            self._client.worked = False
            try:
                status = await self._live_once()
                failure = ConfigError(_why(status))
            except ConfigError as error:
                log.error("engine could not be started", error=error.message)
                status, failure = _NOT_STARTED, error
            if not self._client.ever_ready:
                self.failure = failure
                return
            if self._client.worked or time.monotonic() - started > _STABLE_SECONDS:
                deaths = 0
            delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**deaths)
            log.error("engine died, starting it again", exit_status=status, delay_seconds=delay)
            deaths += 1
            self.restarts += 1
            await asyncio.sleep(delay)

    async def _live_once(self) -> int:
        """Run one engine process to its end. Returns its exit status. Raises `ConfigError` where there is no folder
        for it, or no process."""
        # One for each engine: who clears up temporary files may take it away, and then the next one has its own.
        try:
            own = OwnFolder()
        except OSError as error:  # where the whole file system is read-only, for one
            raise ConfigError(
                f"no folder for the engine's socket: {error.strerror}: set TMPDIR to one that can be written to"
            ) from error
        with own as folder:
            return await self._run_process(folder / "engine.sock")

    async def _run_process(self, socket: Path) -> int:
        """The same, in its folder."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *("--socket", str(socket), "--config", self._config.model_dump_json()),
                # Threads that spin while they wait slow each other down.
                env={"OMP_WAIT_POLICY": "passive"}
                | child_process.environment()
                | {"TMPDIR": str(socket.parent.parent)},
                stdin=subprocess.PIPE,
                stdout=_STDERR,
                start_new_session=True,
            )
        except OSError as error:  # no memory for a process, or too many of them
            raise ConfigError(f"the engine did not start (exit status {_NOT_STARTED}): {error}") from error
        log.info("engine started", pid=process.pid)
        link = asyncio.create_task(self._client.run(socket))
        exited = asyncio.create_task(process.wait())
        try:
            # Without its connection an engine is of no use: what it worked on is lost to the server.
            await asyncio.wait({link, exited}, return_when=asyncio.FIRST_COMPLETED)
            hangs = link.done() and isinstance(link.exception(), TimeoutError)
            if hangs:
                log.error("engine hangs, killing it", reason=str(link.exception()))
                process.kill()
            # One that ends by itself closes its connection a moment before: its exit status is to be its own.
            await asyncio.wait({exited}, timeout=_LAST_SECONDS)
            if not hangs and link.done() and link.exception() is not None:
                log.error("engine connection failed", exc_info=link.exception())
        finally:
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)
            await _stop(process, self._stop_seconds)
        return await exited


def _why(status: int) -> str:
    """What an engine that was never ready has ended of."""
    if status == -signal.SIGKILL:  # which leaves it no time for messages
        return "the engine did not start: it was killed, most likely for want of memory: lower max_rows or state_memory"
    return f"the engine did not start (exit status {status}): its messages say why"


async def _stop(process: asyncio.subprocess.Process, seconds: float) -> None:
    assert process.stdin is not None
    process.stdin.close()  # ends it, see `engine.process`
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()
