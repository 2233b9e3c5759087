"""Steps of prompts of fixed sizes, for CUDA graphs: a step of some hundred tokens takes the host longer to launch,
kernel by kernel, than it takes the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lattice_serve.kernels.decoder.triton_network import TritonNetwork
from lattice_serve.kernels.mixers.chunks import DeviceSegments, list_segments, tile_tokens
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.triton.graph import Graph
from lattice_serve.kernels.triton.upload import pinned

_NONE = Segments(np.empty(0, np.int64), np.empty(0, np.int64), np.zeros(1, np.int64))


class PromptStep:
    """Prompts of up to `tokens` tokens, filled up with tokens, segments and chunks of none.

    A token's bits are those of a step of any size, as tiles do not change them (`linear.tiles`).
    """

    def __init__(self, network: TritonNetwork, tokens: int, C: int, device: torch.device) -> None:
        """C: tokens of a chunk. device: the network's."""
        self._tokens, self._C, self._segments = tokens, C, min(max(4, tokens // 8), 64)
        # Of so many tokens and segments there are never more.
        self._chunks = -(-tokens // tile_tokens(C)) + 2 * self._segments
        size = tokens + 4 * self._segments + 1 + 5 * self._chunks
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        ids, segments = self._inputs[:tokens], DeviceSegments.within(self._inputs[tokens:], self._segments)

        def call() -> None:
            self._hidden = network.prefill(ids, segments)

        self._call: Callable[[], object] = call

    def capture(self, memory: Any) -> None:
        """memory: as for `Graph`."""
        self._fill([], _NONE)
        self._call = Graph(self._call, memory)

    def holds(self, segments: Segments) -> bool:
        """Whether they fit. Not every prompt of few tokens does: its segments may be too many."""
        return bool(segments.starts[-1] <= self._tokens and len(segments.rows) <= self._segments)

    def __call__(self, ids: Sequence[int], segments: Segments) -> Tensor:
        """What `TritonNetwork.prefill` returns, good until the next call. Does not wait for the device."""
        self._fill(ids, segments)
        self._call()
        return self._hidden[: len(ids)]

    def _fill(self, ids: Sequence[int], segments: Segments) -> None:
        listed = list_segments(segments, self._C, self._segments, self._chunks)
        filled = np.zeros(self._tokens, np.int64)
        filled[: len(ids)] = ids
        inputs = torch.from_numpy(np.concatenate((filled, listed)))
        self._inputs.copy_(pinned(inputs, self._inputs.device), non_blocking=True)
