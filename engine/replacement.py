"""A file that is written beside its place, and moved there when it is whole.

What is unfinished has one name, and a lock as long as its writer lives: a writer that is killed leaves one such file at
the most, which the next one writes over or clears up. A lock, unlike a process number, means the same to servers in
different containers that share a volume.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, for its owner's eyes alone, that takes the place of `path` at the end of a block without an error.

    Raises `BlockingIOError` while another process writes one, and other kinds of OSError.
    """
    unfinished = _unfinished(path)
    with _locked(unfinished, os.O_RDWR | os.O_CREAT) as file:
        try:
            file.truncate()
            yield file
            file.flush()
            unfinished.replace(path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise


def clear_unfinished(path: Path) -> int:
    """Remove what a writer of `path` that has been killed has left, if there is such a file; its bytes."""
    unfinished = _unfinished(path)
    # Where it is not there, or is another's, or cannot be opened, there is nothing to clear up.
    with suppress(OSError), _locked(unfinished, os.O_RDWR) as file:
        unfinished.unlink()
        return os.fstat(file.fileno()).st_size
    return 0


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[IO[bytes]]:
    while True:
        with os.fdopen(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it before may have moved it to its place since it was opened: then that is not ours to write to.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    yield file
                    return
