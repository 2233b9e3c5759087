"""A call on a GPU, captured once and made in one launch from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graph:
    """A call whose inputs and outputs stay where they are."""

    def __init__(self, call: Callable[[], object], memory: Any) -> None:
        """memory: a `torch.cuda.graph_pool_handle`, shared by graphs of which one runs at a time."""
        call()  # what compiles or is set up at its first call cannot be captured
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            call()

    def __call__(self) -> None:
        self._graph.replay()
