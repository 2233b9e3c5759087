"""What Numba has compiled of a kernel is good until any kernel changes.

Numba itself looks only at the file of a function, not at those that the function calls: after an edit, or an upgrade,
of one of these it would go on with the old code, and say nothing.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from numba.core import caching

_KERNELS = Path(__file__).parent


@cache
def sources_digest() -> str:
    """Of the sources of all kernels."""
    whole = hashlib.sha256()
    for path in sorted(_KERNELS.rglob("*.py")):
        source = path.read_bytes()
        whole.update(f"{path.relative_to(_KERNELS)} {len(source)}\n".encode() + source)
    return whole.hexdigest()


def stamp_kernels() -> None:
    """Have Numba look at all kernels where it looks at one. To be called before the first is compiled."""
    locator: Any = caching._SourceFileBackedLocatorMixin  # no public name has this; it is there from 0.61 on
    of_file = locator.get_source_stamp

    def get_source_stamp(self: Any) -> Any:
        stamp = of_file(self)
        return (stamp, sources_digest()) if Path(self._py_file).is_relative_to(_KERNELS) else stamp

    locator.get_source_stamp = get_source_stamp
