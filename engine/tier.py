"""The cached states that lie in one kind of memory, a GPU's or the host's, within its budget."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from lattice_serve.engine.radix_tree import Node
from lattice_serve.engine.scarcity import is_out_of_memory
from lattice_serve.engine.slab import Slab

_STOPPED_SECONDS = 60.0
"""For so long a tier that found no memory does not ask for any."""


@dataclass(slots=True, eq=False)
class Snapshot:
    """The state after `length` tokens."""

    row: Tensor
    """[row_size]"""
    length: int
    logits: Tensor | None
    """[V] of the last of them, where they are known: without these, a sequence cannot go on from its very end."""
    salt: str
    node: Node[Snapshot]
    lent: bool = True
    """Whether `row` is somebody else's memory, which stays as it is until `PrefixCache.settle`."""

    @property
    def nbytes(self) -> int:
        return self.row.nbytes + (0 if self.logits is None else self.logits.nbytes)


class Tier:
    """Takes what it is given; to keep to the budget is the cache's part."""

    def __init__(self, device: str, budget: int) -> None:
        """budget: bytes."""
        self.device, self.budget = device, budget
        self.used = 0
        """Bytes of what is in it, lent ones included."""
        self.snapshots: OrderedDict[int, Snapshot] = OrderedDict()
        """By identity, the least recently used first."""
        self._row_size: int | None = None
        """Floats of a row, once one has come."""
        self._slabs: dict[int, Slab] = {}
        """Of host memory, by the size of what lies there; a GPU's is kept by torch."""
        self._stopped_until = 0.0
        """Monotonic seconds, until which no new memory is asked for."""
        self._told = False

    @property
    def _stopped(self) -> bool:
        return time.monotonic() < self._stopped_until

    def __contains__(self, snapshot: Snapshot) -> bool:
        return id(snapshot) in self.snapshots

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor`, from anywhere, in this tier's memory. Raises `MemoryError` where there is no more."""
        try:
            if self.device != "cpu":
                return tensor.to(self.device, copy=True)
            slab = self._slab(tensor.numel())
            if not slab.ready and self._stopped:
                raise MemoryError
            return slab.copy(tensor)
        except (MemoryError, RuntimeError) as error:
            self.stop_growing(error)
            raise MemoryError from error

    def stop_growing(self, error: Exception) -> None:
        """For a while: what is optional does not take the last memory. Raises `error` where it is of another kind."""
        if not is_out_of_memory(error):
            raise error
        if not self._stopped:
            self._stopped_until = time.monotonic() + _STOPPED_SECONDS
        if not self._told:
            self._told = True
            print(
                f"engine: out of memory: the prefix cache on {self.device} does not grow beyond {self.used:,} bytes, "
                f"though it may have {self.budget:,}",
                file=sys.stderr,
            )

    def give_way(self) -> None:
        """Give memory back to the system, once there is nothing in it, and take none for a while."""
        assert not self.snapshots, "there are states in it"
        self._slabs.clear()
        self._stopped_until = time.monotonic() + _STOPPED_SECONDS

    def add(self, snapshot: Snapshot) -> None:
        """All it has lies in this tier's memory, but for its row if that is lent."""
        self.snapshots[id(snapshot)] = snapshot
        self.used += snapshot.nbytes
        self._row_size = snapshot.row.numel()

    def settle(self, snapshot: Snapshot) -> None:
        """Copy a row that is lent. Raises `MemoryError` where there is no room for it."""
        snapshot.row, snapshot.lent = self.copy(snapshot.row), False

    def remove(self, snapshot: Snapshot) -> None:
        """Its memory is for others from now on."""
        del self.snapshots[id(snapshot)]
        self.used -= snapshot.nbytes
        for tensor in (None if snapshot.lent else snapshot.row, snapshot.logits):
            if tensor is not None and self.device == "cpu":
                self._slab(tensor.numel()).give_back(tensor)

    def move(self, snapshot: Snapshot, other: Tier) -> None:
        """Give it to another tier, which has copies of what it has. Raises `MemoryError` where that has no room."""
        row, logits = other.copy(snapshot.row), None if snapshot.logits is None else other.copy(snapshot.logits)
        self.remove(snapshot)
        snapshot.row, snapshot.logits, snapshot.lent = row, logits, False
        other.add(snapshot)

    def ready(self, rows: int) -> bool:
        """Whether there is touched memory for so many rows more, as far as is known and the budget goes."""
        if self.device != "cpu" or self._row_size is None or self._stopped:
            return True
        slab = self._slab(self._row_size)
        return slab.ready >= min(rows, self.budget // (4 * self._row_size) - slab.places + slab.ready)

    def prepare(self, nbytes: int) -> None:
        """Touch so much memory for rows, where it is not `ready`."""
        assert self._row_size is not None, "there is nothing to get ready for"
        try:
            self._slab(self._row_size).prepare(nbytes)
        except (MemoryError, RuntimeError) as error:
            self.stop_growing(error)

    def check(self) -> None:
        """Assert that it knows its bytes, and that they are nobody else's."""
        held = self.snapshots.values()
        assert self.used == sum(snapshot.nbytes for snapshot in held) <= self.budget, "the cache has lost count"
        places = [tensor.data_ptr() for each in held for tensor in (each.row, each.logits) if tensor is not None]
        places += [place for slab in self._slabs.values() for place in slab.free]
        assert len(set(places)) == len(places), "two cached states lie in one place"

    def _slab(self, size: int) -> Slab:
        if size not in self._slabs:
            self._slabs[size] = Slab(size)
        return self._slabs[size]
