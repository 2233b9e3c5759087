"""How many connections a server has, and which one makes room for another."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_OPEN_FILES = 1 << 16
_RESERVE = 32
"""Files for what is not a connection: engines that are started again, other processes, logs."""
_RESERVE_REPLICA = 8
_FEWEST = 8

PROVEN = "lattice.proven"
"""Name of the ASGI extension whose `call` `Limits` makes when a request has shown what it must."""


class Connections:
    """The open ones, of at most `limit`. Beyond that the oldest makes room: first of those that have never shown a key,
    whatever they do, then of those without a request. To a server without keys every request has shown its key."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = 0
        # Each with what closes it, in the order in which they came there.
        self._unproven: dict[object, Callable[[], object]] = {}
        self._idle: dict[object, Callable[[], object]] = {}

    def open(self, connection: object, close: Callable[[], object]) -> bool:
        """Take one in. False: there is no room, for all others are at work."""
        self._count += 1
        if self._count > self.limit:
            evictable = self._unproven or self._idle
            if not evictable:
                return False
            oldest = next(iter(evictable))
            evictable.pop(oldest)()
        self._unproven[connection] = close
        return True

    def prove(self, connection: object) -> None:
        """It has shown a key, and has a request."""
        self._unproven.pop(connection, None)

    def begin(self, connection: object) -> None:
        """It has a request."""
        self._idle.pop(connection, None)

    def end(self, connection: object, close: Callable[[], object]) -> None:
        """Its request has been answered."""
        if connection not in self._unproven:
            self._idle[connection] = close

    def closed(self, connection: object) -> None:
        self._count -= 1
        self._unproven.pop(connection, None)
        self._idle.pop(connection, None)


def connection_limit(replicas: int) -> int:
    """Raise the limit of open files, and return how many of them may be connections.

    Each connection is an open file, and beyond the limit libuv closes new ones without a word. What most systems begin
    with, 1024, is for programs with `select`, and is less than may run and wait here.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # as it was, then
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    used = len(list(Path("/proc/self/fd").iterdir()))
    return max(_FEWEST, files - used - _RESERVE - _RESERVE_REPLICA * replicas)
