"""Watches the loss and the gradient norm: stops at what is not finite, skips what is far out of line."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from lattice_serve.engine.errors import LatticeError

_WINDOW = 128
_ENOUGH = 16


class Diverged(LatticeError):
    """Training cannot go on: a loss or a gradient norm is not finite."""


class Watch:
    """`admit` says whether a step may be applied. `history` and `skipped` are all that a checkpoint needs to keep."""

    def __init__(self, factor: float = 10.0, history: Iterable[float] = (), skipped: int = 0) -> None:
        self._factor = factor
        self._norms = deque(history, maxlen=_WINDOW)
        self.skipped = skipped

    @property
    def history(self) -> list[float]:
        return list(self._norms)

    def admit(self, step: int, loss: float, norm: float, last_good: str) -> bool:
        """False for a norm above `factor` times its running median; `Diverged` when loss or norm is not finite."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise Diverged(
                    f"step {step}: the {name} is {value}. Last good checkpoint: {last_good}. "
                    "Resume from it with --resume and a lower --lr, or look for what is wrong with the data."
                )
        if len(self._norms) >= _ENOUGH and norm > self._factor * median(self._norms):
            self.skipped += 1
            return False
        self._norms.append(norm)
        return True
