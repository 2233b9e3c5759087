"""Numba's files of compiled kernels save a start some 15 s. They must never be wrong, and a start must do without them.

Numba checks only the file of a function, not those of the functions it calls: after an edit or an upgrade of one of
these it would run the old code, and say nothing. And a full disk would end a start.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core import caching, config

_KERNELS = Path(__file__).parents[1]


@functools.cache
def sources_digest() -> str:
    """Returns the SHA-256 of the sources of all kernels, in hexadecimal."""
    whole = hashlib.sha256()
    for path in sorted(_KERNELS.rglob("*.py")):
        source = path.read_bytes()
        whole.update(f"{path.relative_to(_KERNELS)} {len(source)}\n".encode() + source)
    return whole.hexdigest()


def configure_cache() -> None:
    """Makes Numba check the sources of all kernels where it checks one file, and go on where it cannot read or write.

    Call it before the first kernel is compiled. Numba has no public names for this; these exist from 0.61 on.
    """
    locator: Any = caching._SourceFileBackedLocatorMixin
    files: Any = caching.FunctionCache
    stamp_of_file, load, save = locator.get_source_stamp, files.load_overload, files.save_overload

    def get_source_stamp(self: Any) -> Any:
        stamp = stamp_of_file(self)
        return (stamp, sources_digest()) if Path(self._py_file).is_relative_to(_KERNELS) else stamp

    def load_overload(self: Any, signature: Any, context: Any) -> Any:
        try:
            return load(self, signature, context)
        except Exception:  # a damaged pickle can raise anything
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self: Any, signature: Any, compiled: Any) -> None:
        try:
            save(self, signature, compiled)
        except OSError as error:
            _warn(error.strerror or str(error))

    locator.get_source_stamp, files.load_overload, files.save_overload = get_source_stamp, load_overload, save_overload
    caching.CacheImpl._locator_classes = [*caching.CacheImpl._locator_classes, _reader()]


def _reader() -> type[Any]:
    """A locator for where no folder can be written, which Numba takes for an error: what was compiled into one before,
    as in an image, is used all the same."""
    base: Any = getattr(caching, "InTreeCacheLocator", None) or caching._InTreeCacheLocator  # the name before 0.62

    class ReadOnlyCacheLocator(base):
        def __init__(self, function: Any, file: str) -> None:
            super().__init__(function, file)
            if config.CACHE_DIR:
                self._cache_path = str(Path(config.CACHE_DIR, self.get_suitable_cache_subpath(file)))

        @classmethod
        def from_function(cls, function: Any, file: str) -> Any:
            return cls(function, file) if Path(file).is_relative_to(_KERNELS) else None

    return ReadOnlyCacheLocator


@functools.cache  # Python's own memory of what it has warned of does not outlast the next compilation
def _warn(reason: str) -> None:
    warnings.warn(
        f"compiled kernels are not kept, the next start compiles them again: {reason}: "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        stacklevel=1,
    )
