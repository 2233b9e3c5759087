"""Memory that is not to be had: how that shows, and what may ask for more."""

from __future__ import annotations

import torch

from lattice_serve.engine.errors import LatticeError, OutOfMemory

HEADROOM = 64 << 20
"""Bytes that must be there beside what the prefix cache takes: requests need some, and it is optional."""
_SIGNS = ("allocate memory", "not enough memory", "bad_alloc", "out of memory", "start new thread")
"""Of torch's and Python's messages."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, or a thread, was not to be had."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def reported(error: Exception) -> LatticeError:
    """`error` as its request's client is told it. Raises it where it is not of one request."""
    if isinstance(error, LatticeError):
        return error
    if not is_out_of_memory(error):
        raise error
    return OutOfMemory("the server has no memory for this request now: try again later, or ask for less")


def check_room(nbytes: int) -> None:
    """Raises `RuntimeError` or `MemoryError` where so much, which is not kept, is not to be had."""
    torch.empty(nbytes, dtype=torch.uint8)
