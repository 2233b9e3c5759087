"""What kernels that write to given memory are run in: bands around it, and a look at the bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BAND, _MARK = 64, -12345.0


@contextmanager
def bands(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Copies of float32 tensors, each between two bands in memory; asserts at the end that these are as they were."""
    memory = [torch.full((x.numel() + 2 * _BAND,), _MARK) for x in tensors]
    yield [flat[_BAND:-_BAND].view_as(x).copy_(x) for flat, x in zip(memory, tensors, strict=True)]
    for flat in memory:
        assert bool((flat[:_BAND] == _MARK).all()), "written before the start"
        assert bool((flat[-_BAND:] == _MARK).all()), "written past the end"


def poison(*shape: int) -> Tensor:
    """NaN, float32."""
    return torch.full(shape, float("nan"))


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Of two float32 tensors; NaN is like itself, and 0 unlike -0."""
    return torch.equal(actual.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))
