"""Whether an engine still works: it has to answer between two steps, or to compute."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LOOKS = 20
"""At the engine, in `watchdog_seconds`. They are counted, not the time: where the server itself was stopped, what the
engine said meanwhile has still to be read."""
_UNREADY_LOOKS = 10
"""After which no more requests are sent to it."""
_LONGEST_STEP = 10
"""Times `watchdog_seconds` that an engine which computes may be silent: a step of a large model on a busy machine may
take long, an endless loop looks the same."""
_WORKING_SHARE = 0.02
"""Of a processor, used by an engine that computes. One that waits for what never comes uses none."""


class Watchdog:
    """Looks at one engine. The engine's answers prove that its loop goes on; in the middle of a long step, when none
    can come, the processor time of its processes does."""

    def __init__(self, seconds: float) -> None:
        self.responsive = True
        """False: it has been silent and still for half of the time after which it counts as hanging."""
        self._seconds = seconds
        self._heard = False

    def heard(self) -> None:
        """To be called when the engine says something."""
        self._heard = self.responsive = True

    async def watch(self, pid: int, ask: Callable[[], object]) -> str:
        """Returns, with the reason, when the engine hangs. `ask` has it answer as soon as its step is done."""
        silent = still = 0
        used = processor_seconds(pid)
        pause = self._seconds / _LOOKS
        while still < _LOOKS and silent < _LONGEST_STEP * _LOOKS:
            self._heard = False
            if not silent:
                ask()
            await asyncio.sleep(pause)
            before, used = used, processor_seconds(pid)
            silent = 0 if self._heard else silent + 1
            still = 0 if self._heard or used - before > _WORKING_SHARE * pause else still + 1
            self.responsive = still < _UNREADY_LOOKS
        if still < _LOOKS:
            return f"its step has taken {_LONGEST_STEP * self._seconds:g} s"
        return f"nothing came from it for {self._seconds:g} s, and it did not compute"


def processor_seconds(pid: int) -> float:
    """Processor time that a process and its children have used so far; 0 where there is none."""
    ticks = 0
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in (str(pid), *children):
            with suppress(OSError):  # a child may have ended meanwhile
                # The name, in parentheses, may hold spaces.
                fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
