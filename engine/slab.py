"""Memory for tensors of one size that come and go.

It is kept for the next one: what a system gives anew it first has to find, page by page, and on a virtual machine that
can take ten times as long as to fill it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lattice_serve.engine.scarcity import HEADROOM, check_room

_BLOCK_BYTES = 32 << 20
"""Memory is asked for in such pieces. What of one has not been touched yet is not resident."""


class Slab:
    """Places of `size` float32 each in host memory, as many as were wanted at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.places = 0
        """Whose pages are there, in use or free."""
        self._free: list[Tensor] = []
        """[size] each, the one that was given back last at the end."""
        self._block = torch.empty(0, size)
        self._touched = 0
        """Floats of the block whose pages are there."""

    @property
    def free(self) -> list[int]:
        """Addresses of the places that a copy could be made to without new memory."""
        return [place.data_ptr() for place in self._free]

    @property
    def ready(self) -> int:
        """How many they are."""
        return len(self._free)

    def prepare(self, nbytes: int) -> None:
        """Touch so many bytes of new memory, up to the end of a block. Raises as torch does where there is none."""
        if self._touched == self._block.numel():
            check_room(HEADROOM + max(_BLOCK_BYTES, 4 * self._size))
            self._block = torch.empty(max(1, _BLOCK_BYTES // (4 * self._size)), self._size)
            self._touched = 0
        begin, end = self._touched, min(self._touched + -(-nbytes // 4), self._block.numel())
        self._block.view(-1)[begin:end].zero_()
        new = self._block[begin // self._size : end // self._size]
        self._free += new.unbind()
        self.places += len(new)
        self._touched = end

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of [size], from any device, in a place that is the caller's until it gives it back."""
        while not self._free:
            self.prepare(4 * self._size)
        return self._free.pop().copy_(tensor)

    def give_back(self, place: Tensor) -> None:
        """What is in it stays until a copy takes its place, all of it: nobody sees it."""
        self._free.append(place)
