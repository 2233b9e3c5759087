"""Bits per byte of held-out documents: total negative log-likelihood / ln 2 / UTF-8 bytes of the text.

Every document starts from the initial memory behind one end-of-text token, and its memory is carried to its end.
"""

from __future__ import annotations

import math

import torch
from tqdm import tqdm

from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.training.data import Books
from lattice_serve.training.forward import total_nll


@torch.no_grad()
def bits_per_byte(
    model: LatticeForCausalLM, books: Books, *, length: int = 512, dtype: torch.dtype = torch.float32, bar: bool = False
) -> float:
    """Score `books`, all rows at once, `length` tokens at a time."""
    state = model.initial_state(books.rows)
    total = 0.0
    segments = list(books.segments(length))
    for tokens, targets in tqdm(segments, desc="validation", unit=" segments", leave=False, disable=not bar):
        nll, state = total_nll(model, tokens, targets, state, dtype)
        total += float(nll)
    return total / math.log(2) / books.bytes
