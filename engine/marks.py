"""Names of control pieces in a text: a guard inside tells those that are text from those that are marks."""

from __future__ import annotations

import re
from collections.abc import Sequence

_GUARD = "\ufdd0"
"""A code point that Unicode keeps out of texts."""
_UNGUARDED = re.compile(f"{_GUARD}({_GUARD}?)")


def unmark(text: str, names: Sequence[str]) -> str:
    """`text` with a guard in each of `names`, longest first and none of one character, so that it is no mark."""
    text = text.replace(_GUARD, _GUARD * 2)
    for name in names:
        # Again where names overlap.
        while name in text:
            text = text.replace(name, name[0] + _GUARD + name[1:])
    return text


def unguarded(text: str) -> str:
    """What `unmark` was given, of what it gave."""
    return _UNGUARDED.sub(r"\1", text)
