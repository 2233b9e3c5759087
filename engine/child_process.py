"""What the processes of this program that others have started have in common."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1


def environment() -> dict[str, str]:
    """This process's environment for one that it starts, without the server's settings: the API keys are among them."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LATTICE_")}


def wake_at_parents_end() -> None:
    """Have the kernel let this process go on, if it is stopped, when the one that has started it ends, however that
    happens: it then finds its life line cut, and ends, too. To one that runs this is nothing."""
    with suppress(OSError, AttributeError):  # another kernel than Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
