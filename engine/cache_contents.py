"""What a prefix cache holds at one moment, to be written down while the cache goes on changing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lattice_serve.engine.prefix_cache import PrefixCache
from lattice_serve.engine.radix_tree import Ids
from lattice_serve.engine.tier import Snapshot


@dataclass(slots=True, eq=False)
class KeptState:
    """A state, and where it belongs."""

    cache: PrefixCache
    snapshot: Snapshot
    salt: int
    """Number of its salt."""
    after: int
    """Number of the state that its tokens go on from, which comes before it; -1: from nothing."""
    ids: Ids
    """The tokens that follow those of that one."""
    used: int
    """Place among all, the least recently used first."""
    has_logits: bool
    fetched: Tensor | None = None
    """A copy of row and logits, where they lie in a GPU's memory."""

    def fetch(self) -> None:
        self.fetched = torch.cat([tensor.cpu() for tensor in _tensors(self.snapshot)])

    def numbers(self) -> bytes | None:
        """Row and logits, float32; None: they are cached no more.

        Can be called in any thread while another one changes the cache: what is copied counts only if the snapshot is
        there afterwards, with the same memory. So nobody waits, and memory may be used again meanwhile.
        """
        if self.fetched is not None:
            return self.fetched.numpy().tobytes()
        while self.snapshot in self.cache:
            tensors = _tensors(self.snapshot)
            data = b"".join(tensor.cpu().numpy().data.cast("B") for tensor in tensors)
            again = _tensors(self.snapshot)
            same = len(again) == len(tensors) and all(a is b for a, b in zip(again, tensors, strict=True))
            if self.snapshot in self.cache and same:
                return data
        return None


class Contents:
    """The states of a cache and the tokens of each. Collecting takes some microseconds a state."""

    def __init__(self, cache: PrefixCache) -> None:
        by_use = cache.snapshots()
        used = {id(snapshot): place for place, snapshot in enumerate(by_use)}
        salts: dict[str, int] = {}
        numbers: dict[int, int] = {}
        self.states: list[KeptState] = []
        # What a snapshot goes on from has fewer tokens, and so comes before it.
        for snapshot in sorted(by_use, key=lambda snapshot: snapshot.length):
            before, ids = _before(snapshot)
            numbers[id(snapshot)] = len(numbers)
            self.states.append(
                KeptState(
                    cache,
                    snapshot,
                    salts.setdefault(snapshot.salt, len(salts)),
                    -1 if before is None else numbers[id(before)],
                    ids,
                    used[id(snapshot)],
                    snapshot.logits is not None,
                )
            )
        self.salts = list(salts)
        self._to_fetch = [state for state in self.states if state.snapshot.row.device.type != "cpu"]

    def fetch(self, seconds: float) -> bool:
        """Copy states of a GPU's memory for so long; whether there are more. For the thread that has the GPU."""
        until = time.monotonic() + seconds
        while self._to_fetch and time.monotonic() < until:
            state = self._to_fetch.pop()
            if state.snapshot in state.cache:
                state.fetch()
        return bool(self._to_fetch)


def _before(snapshot: Snapshot) -> tuple[Snapshot | None, Ids]:
    """The longest snapshot that this one goes on from, and the tokens between them."""
    node, edges = snapshot.node, [snapshot.node.edge]
    while node.parent is not None and node.parent.value is None:
        node = node.parent
        edges.append(node.edge)
    ids = edges[0] if len(edges) == 1 else np.concatenate(edges[::-1])
    return (None if node.parent is None else node.parent.value), ids


def _tensors(snapshot: Snapshot) -> list[Tensor]:
    return [tensor for tensor in (snapshot.row, snapshot.logits) if tensor is not None]
