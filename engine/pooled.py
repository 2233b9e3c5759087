"""One vector for a text: the mean of its tokens' final hidden states, or the last of them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lattice_serve.engine.errors import NumericalError
from lattice_serve.engine.messages import Pooling


class Pooled:
    """Takes the hidden states of a prompt piece by piece; how it was cut makes no difference to any bit."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
        self._count = 0

    def places(self, begin: int, end: int, last: bool) -> range:
        """Which tokens of a piece, at `begin` to `end` of a batch, are wanted; last: whether the prompt ends there."""
        return range(begin, end) if self._pooling == "mean" else range(end - last, end)

    def add(self, hidden: Tensor) -> None:
        """hidden: [n, hidden_size] float32 of the tokens that were wanted of the next piece.

        Raises `NumericalError` when they are not finite.
        """
        if not bool(hidden.isfinite().all()):
            raise NumericalError("the model's hidden states for this text are not finite")
        rows = hidden.cpu().double().numpy()
        for row in rows:  # one after another: any other order of summation would depend on the piece
            self._sum = row if self._sum is None else self._sum + row
        self._count += len(rows)

    def result(self) -> list[float]:
        """[hidden_size], of float32 precision."""
        assert self._sum is not None, "nothing was pooled"
        values: list[float] = (self._sum / self._count).astype(np.float32).tolist()
        return values
