"""Numba's files of compiled kernels save a start some 15 s. They must never be wrong, and a start must do without them.

Numba checks only the file of a function, not those of the functions it calls: after an edit or an upgrade of one of
these it would run the old code, and say nothing. And a full disk would end a start.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path
from typing import Any

from numba.core import caching

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
    """Makes Numba check the sources of all kernels where it checks one file, and go on where it cannot write.

    Call it before the first kernel is compiled. Numba has no public names for this; these exist from 0.61 on.
    """
    locator: Any = caching._SourceFileBackedLocatorMixin
    files: Any = caching.FunctionCache
    stamp_of_file, save = locator.get_source_stamp, files.save_overload

    def get_source_stamp(self: Any) -> Any:
        stamp = stamp_of_file(self)
        return (stamp, sources_digest()) if Path(self._py_file).is_relative_to(_KERNELS) else stamp

    def save_overload(self: Any, signature: Any, compiled: Any) -> None:
        try:
            save(self, signature, compiled)
        except OSError as error:
            _warn(error.strerror or str(error))

    locator.get_source_stamp, files.save_overload = get_source_stamp, save_overload


@functools.cache  # Python's own memory of what it has warned of does not outlast the next compilation
def _warn(reason: str) -> None:
    warnings.warn(f"compiled kernels are not kept, the next start compiles them again: {reason}", stacklevel=1)
