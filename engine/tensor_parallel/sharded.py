"""What the engine works with, state rows and backend, where each process has a share of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from lattice_serve.engine.backend import Backend
from lattice_serve.engine.state_pool import StatePool
from lattice_serve.engine.tensor_parallel.commands import CheckScrubbed, Initialise, Read, Run, Scrub, Write
from lattice_serve.engine.tensor_parallel.group import Group
from lattice_serve.engine.tensor_parallel.workers import Workers
from lattice_serve.kernels.mixers.segments import Segments


class ShardedPool(StatePool):
    """`memory` is the leader's share of each row. A state that leaves or enters the pool is whole: all shares, one
    after another, so that what is parked or cached is of one piece and cannot come apart."""

    lends = False

    def __init__(self, initial: Tensor, rows: int, device: str, workers: Workers, group: Group) -> None:
        super().__init__(initial, rows, device)
        self._workers, self._group = workers, group

    def initialise(self, row: int) -> None:
        self._workers.send(Initialise(row))
        super().initialise(row)

    def scrub(self, row: int) -> None:
        self._workers.send(Scrub(row))
        super().scrub(row)

    def read(self, row: int) -> Tensor:
        self._workers.send(Read(row))
        return self._group.gather(self.memory[None, row]).flatten()

    def write(self, row: int, state: Tensor) -> None:
        self._workers.send(Write(row))
        self._group.scatter(self.memory[row], state.to(self.memory.device).view(self._group.share.size, -1))

    def check_scrubbed(self, rows: Collection[int]) -> None:
        self._workers.send(CheckScrubbed(sorted(rows)))
        super().check_scrubbed(rows)


class ShardedBackend:
    """Runs a step in all processes."""

    def __init__(self, share: Backend, workers: Workers, size: int) -> None:
        """share: the backend of the leader's share."""
        self.name, self.arithmetic = f"{share.name}, tensor parallel {size}", share.arithmetic
        self.multiple = share.multiple
        self._share, self._workers = share, workers

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        pieces = [(row, position, end - start) for row, position, start, end in segments]
        self._workers.send(Run(list(ids), pieces, segments.decodes))
        return self._share(ids, segments, wanted, hidden)
