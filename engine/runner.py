"""Runs the model over one batch: tokens in, next tokens out, states updated in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lattice_serve.engine.backend import Backend
from lattice_serve.engine.errors import NumericalError
from lattice_serve.engine.sampler import Sampled, prompt_logprobs, sample
from lattice_serve.engine.scheduler import Piece
from lattice_serve.engine.sequence import Sequence
from lattice_serve.kernels.mixer import Segments


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out for one piece of a step."""

    piece: Piece
    sampled: Sampled | None
    """Where the piece ends in a choice."""
    error: NumericalError | None = None
    logits: Tensor | None = None
    """[V] that it was chosen from; good until the next step."""


class Runner:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> list[StepResult]:
        """One forward pass over `pieces`, whose sequences hold rows; advances what they have computed and scored."""
        ids: list[int] = []
        segments = []
        wanted: list[int] = []
        scoring: dict[int, tuple[int, list[int]]] = {}
        pooling: dict[int, range] = {}
        sampling: dict[int, int | None] = {}
        """Piece -> its place in `wanted`; None where its sequence came with logits."""
        for i, piece in enumerate(pieces):
            assert piece.sequence.row is not None, "a sequence runs without a state row"
            if not piece.tokens:
                sampling[i] = None
                continue
            begin = len(ids)
            ids += piece.sequence.tokens(piece.start, piece.end)
            segments.append((piece.sequence.row, piece.start, piece.tokens))
            if targets := piece.scored:
                scoring[i] = len(wanted), targets
                wanted += range(begin, begin + len(targets))
            if (pooled := piece.sequence.pooled) is not None and not piece.sequence.output_ids:
                pooling[i] = pooled.places(begin, len(ids), piece.ends_prompt)
            if piece.samples:
                sampling[i] = len(wanted)
                wanted.append(len(ids) - 1)
        logits = hidden = torch.empty(0)
        if ids:
            places = [place for span in pooling.values() for place in span]
            logits, hidden = self._backend(ids, Segments.of(segments), wanted, places)
        vectors = dict(zip(pooling, hidden.split([len(span) for span in pooling.values()]), strict=True))
        if len(sampling) == len(wanted) and None not in sampling.values():
            chosen = logits
        else:
            chosen = _rows(logits, [(place, pieces[i].sequence) for i, place in sampling.items()])
        sampled = dict(zip(sampling, sample(chosen, [pieces[i].sequence.sample_row for i in sampling]), strict=True))
        row_of = {i: place for place, i in enumerate(sampling)}
        results = []
        for i, piece in enumerate(pieces):
            error = None
            try:
                if i in scoring:
                    first, targets = scoring[i]
                    _score(piece.sequence, logits[first : first + len(targets)], targets)
                if i in vectors and (pooled := piece.sequence.pooled) is not None:
                    pooled.add(vectors[i])
                if i in sampled and not sampled[i].finite:
                    raise NumericalError("the model's output for this request is not finite: its state was discarded")
            except NumericalError as failure:
                error = failure
            piece.sequence.computed = piece.end
            chosen_from = chosen[row_of[i]] if i in sampled else None
            results.append(StepResult(piece, sampled.get(i), error, chosen_from))
        return results


def _rows(logits: Tensor, places: list[tuple[int | None, Sequence]]) -> Tensor:
    """[B, V]: of each a row of `logits`, or those that its sequence came with."""
    rows = []
    for place, sequence in places:
        row = sequence.logits if place is None else logits[place]
        assert row is not None, "a sequence without tokens to run has no logits"
        rows.append(row)
        sequence.logits = None
    return torch.stack(rows) if rows else logits[:0]


def _score(sequence: Sequence, logits: Tensor, targets: list[int]) -> None:
    """Append the log-probabilities of prompt tokens. Raises `NumericalError`."""
    assert sequence.prompt_logprobs is not None
    sequence.prompt_logprobs += prompt_logprobs(logits, targets, sequence.params.prompt_logprobs or 0)
