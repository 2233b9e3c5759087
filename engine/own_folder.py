"""A temporary folder of a process, removed at its end or, where that was too sudden, when the next one is made.

It is locked as long as its process lives, which a process number could not say of one in another container.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "lattice-serve-"
_MEMORY = "/dev/shm"
"""Where there can be a folder on a machine that has none for temporary files."""


class OwnFolder:
    """With mode 0700. `close` it once, or leave its `with` block."""

    def __init__(self) -> None:
        """Raises OSError where there cannot be one."""
        clear_abandoned()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_temporary_folder()))
            # Until it is locked, another process may take it for an abandoned one, and remove it.
            with suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                with suppress(OSError):  # a file system without locks: nobody else could have one there, either
                    fcntl.flock(self._lock, fcntl.LOCK_SH)
                if self.path.exists():
                    return
                os.close(self._lock)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def clear_abandoned() -> None:
    """Remove the folders of this user's processes that have been killed."""
    with suppress(OSError), os.scandir(_temporary_folder()) as entries:
        mine = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(PREFIX)
            and entry.is_dir(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
        ]
        for path in mine:
            with suppress(OSError):  # in use, or gone meanwhile
                _clear(path)


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # no file system of those that Python tries can be written
        return _MEMORY


def _clear(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    finally:
        os.close(lock)
