"""Standard error that may come to its end before the process does: its disk is full, or nobody reads its pipe."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

_STDERR = 2


class _Forgiving(io.TextIOWrapper):
    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def outlive_it() -> None:
    """What this process says from here on is lost where it cannot be written: no reason to fail at what it does."""
    try:
        os.fstat(_STDERR)
    except OSError:  # closed by whoever started this
        return
    # A write a line, for several processes write here; no buffer below, which would keep what could not be written,
    # and fail at the end of the process.
    raw = io.FileIO(_STDERR, "w", closefd=False)
    sys.stderr = _Forgiving(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
