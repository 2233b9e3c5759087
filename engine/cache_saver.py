"""Saves the prefix cache from time to time, and at the end: beside the engine's steps, which do not wait for it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from lattice_serve.engine.cache_contents import Contents
from lattice_serve.engine.cache_file import CacheFile
from lattice_serve.engine.errors import CacheFileError
from lattice_serve.engine.prefix_cache import PrefixCache

_REST = 3.0
"""For so many times as long as a state took it rests, so that steps have the processors."""
_FETCH_SECONDS = 0.003
"""For so long a step waits while states are copied from a GPU."""


class _Ended(Exception):
    """The engine ends, and saves all that it has then."""


class CacheSaver:
    """Belongs to the engine's thread, but for the writing, which has one of its own."""

    def __init__(self, file: CacheFile, cache: PrefixCache, seconds: float) -> None:
        """seconds: between two saves, as long as something has been added to the cache; 0: at the end alone."""
        self._file, self._cache, self._seconds = file, cache, seconds
        self._contents: Contents | None = None
        """As long as states are to be copied from a GPU."""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._added, self._since = cache.added, time.monotonic()
        """What has been added to the cache when it was saved last, and when that was."""

    def load(self) -> None:
        """Put what is in the file into the cache, and say what came of it. To be called first."""
        self._report("the cache begins empty", "from", lambda: self._file.load(self._cache))
        self._added = self._cache.added

    @property
    def wait_seconds(self) -> float | None:
        """In which `tick` is to be called, even if nothing else happens; None: it need not be."""
        if not self._seconds:
            return None
        if self._writing:
            return self._seconds
        if self._contents is not None:
            return 0.0
        if self._added == self._cache.added:
            return None
        return max(0.0, self._since + self._seconds - time.monotonic())

    def tick(self) -> None:
        """Begin to save, where it is time for that. To be called between steps."""
        if self.wait_seconds != 0:
            return
        if self._contents is None:
            self._added, self._contents = self._cache.added, Contents(self._cache)
        if not self._contents.fetch(_FETCH_SECONDS):
            contents, self._contents = self._contents, None
            self._thread = threading.Thread(target=self._write, args=(contents,), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Save what has not been saved yet."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        contents = Contents(self._cache)
        contents.fetch(float("inf"))
        self._report("cached states are lost", "to", lambda: self._file.save(contents))

    @property
    def _writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, contents: Contents) -> None:
        began = time.monotonic()

        def rest() -> None:
            nonlocal began
            if self._ended.wait(_REST * (time.monotonic() - began)):
                raise _Ended
            began = time.monotonic()

        try:
            self._report("cached states were not saved", "to", lambda: self._file.save(contents, after_each=rest))
        except _Ended:
            return
        finally:
            self._since = time.monotonic()

    def _report(self, failure: str, way: str, move: Callable[[], int]) -> None:
        """Say how many states went the way, and how long that took, or that it failed."""
        began = time.monotonic()
        try:
            states = move()
            seconds = time.monotonic() - began
            print(f"engine: {states} cached states {way} {self._file.path}, {seconds:.1f} s", file=sys.stderr)
        except CacheFileError as error:
            print(f"engine: {failure}: {error.message}", file=sys.stderr)
