"""What runs the network for the engine: chosen once, by the device.

Batches are ragged: the tokens of several sequences, one segment after another. The state of each segment's sequence is
a row of the state pool, updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.models.causal_lm import CausalLM, Gather
from lattice_serve.kernels.linear import RowInvariantLinear
from lattice_serve.kernels.mixers.segments import Segments

_PARALLEL_ALONE, _PARALLEL_BESIDE = 4_000_000, 60_000_000
"""Multiply-adds of a step from which on threads share it: a fifth of a millisecond, where nothing else wants the
processors; some milliseconds where threads would mostly take them from those who send the answers."""


class Backend(Protocol):
    name: str
    arithmetic: str
    """What the bits of a state depend on, beside weights and tokens."""
    multiple: int
    """A prompt is cut into segments at multiples of so many tokens."""

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """ids: the tokens of all segments; wanted, hidden: places among them -> logits [len(wanted), V] of the first,
        final hidden states [len(hidden), hidden_size] of the second, both float32.

        A token's bits depend on its own sequence alone, and on which of its tokens are its prompt's. Wanted places of
        decode come before those of prompts. The tensors are good until the next call.
        """
        ...


class TorchBackend:
    """The torch reference of any family on any device, one segment after another."""

    name = arithmetic = "torch reference"

    def __init__(self, model: CausalLM, pool: Tensor, max_tokens: int, gather: Gather | None = None) -> None:
        """pool: [rows, row_size] float32. gather: as `make_backend`."""
        weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        self.linear = RowInvariantLinear(weights, max_tokens)
        self._model, self._pool, self._gather = model, pool, gather
        self.multiple = model.config.chunk_alignment

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        self._segments = segments
        final = self._model.run(torch.tensor(ids, device=self._pool.device), self)
        return self.linear(final[list(wanted)], self._model.head_weight), final[list(hidden)].float()

    # The rest of what `RaggedBatch` asks for.

    def add(self, x: Tensor, product: Tensor) -> Tensor:
        for part in [product] if self._gather is None else self._gather(product[None]):
            x = x + part
        return x

    def scan(self, x: Tensor, width: int, recur: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        out = x.new_empty(len(x), width)
        for row, position, start, end in self._segments:
            # A chunk at a time: how torch rounds an element depends on how near the end of its tensor it lies.
            first = min(end, start + self.multiple - position % self.multiple)
            for begin, stop in pairwise((start, *range(first, end, self.multiple), end)):
                out[begin:stop] = recur(x[begin:stop], self._pool[row], position + begin - start)
        return out


def make_backend(
    model: CausalLM,
    pool: Tensor,
    *,
    max_tokens: int,
    threads: int,
    beside: bool,
    quantization: Literal["int8"] | None = None,
    gather: Gather | None = None,
) -> Backend:
    """Returns the fastest there is for the device of `pool` [rows, row_size], for steps of up to `max_tokens` tokens.

    beside: whether other work wants the processors too. gather: for a model that is one share of several. The matrices
    of `model` may be the backend's alone afterwards: only its small tensors are there for others. Raises `ConfigError`
    for a quantization that the device does not have.
    """
    backend = model.compile_step(
        pool,
        max_tokens=max_tokens,
        threads=threads,
        parallel_from=_PARALLEL_BESIDE if beside else _PARALLEL_ALONE,
        quantization=quantization,
        gather=gather,
    )
    if backend is not None:
        return backend
    if quantization is not None:
        raise ConfigError(f"no quantization by torch on {pool.device}: leave it out", param="quantization")
    return TorchBackend(model, pool, max_tokens, gather)
