"""The promise that a request's bits do not depend on its company, tried before the first one comes."""

from __future__ import annotations

from itertools import pairwise

import torch

from lattice_serve.engine.backend import Backend
from lattice_serve.engine.errors import NumericalError
from lattice_serve.engine.state_pool import StatePool
from lattice_serve.kernels.mixers.segments import Segments


def check_bits(backend: Backend, pool: StatePool, vocab_size: int, max_step_tokens: int) -> None:
    """That a sequence has the same logits alone and cut up beside another, on these weights and this processor.

    Also compiles what compiles at its first call. Raises `NumericalError`: promises would not be kept.
    """
    k = backend.multiple
    n = max(2 * k, min(12, max_step_tokens) // k * k)  # tokens of a prompt; three of an answer follow
    if pool.rows < 2 or max_step_tokens < max(n, k + 1):
        return
    ids = [token % vocab_size for token in range(1, n + 4)]
    with torch.inference_mode():
        row, other = pool.allocate(), pool.allocate()
        for start, end in pairwise((0, n, n + 1, n + 2, n + 3)):
            segments = Segments.of([(row, start, end - start)], int(start >= n))
            whole = backend(ids[start:end], segments, [end - start - 1])[0].clone()
        pool.free(row)
        row = pool.allocate()
        for start, end in pairwise((*range(0, n, k), n, n + 1, n + 2, n + 3)):
            beside = Segments.of([(other, start, 1), (row, start, end - start)], 1 + int(start >= n))
            alone, _ = backend([ids[0], *ids[start:end]], beside, [end - start])
        pool.free(row)
        pool.free(other)
    if not torch.equal(whole, alone):
        raise NumericalError(
            f"{backend.name}: this processor gives a request other bits in a batch than alone: "
            "please report it with its name, and serve with another device until it is mended"
        )
