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
    """What came out for one piece of a batch."""

    sequence: Sequence
    sampled: Sampled | None
    """Where the piece ends in a choice."""
    error: NumericalError | None = None


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
        sampling: dict[int, int] = {}
        for i, piece in enumerate(pieces):
            assert piece.sequence.row is not None, "a sequence runs without a state row"
            begin = len(ids)
            ids += piece.sequence.tokens(piece.start, piece.end)
            segments.append((piece.sequence.row, piece.start, piece.end - piece.start))
            if targets := piece.scored:
                scoring[i] = len(wanted), targets
                wanted += range(begin, begin + len(targets))
            if piece.samples:
                sampling[i] = len(wanted)
                wanted.append(len(ids) - 1)
        decodes = sum(piece.decodes for piece in pieces)
        logits = self._backend(ids, Segments.of(segments, decodes), wanted)
        rows = logits if len(sampling) == len(wanted) else logits[list(sampling.values())]
        sampled = dict(zip(sampling, sample(rows, [pieces[i].sequence.sample_row for i in sampling]), strict=True))
        results = []
        for i, piece in enumerate(pieces):
            error = None
            try:
                if i in scoring:
                    first, targets = scoring[i]
                    _score(piece.sequence, logits[first : first + len(targets)], targets)
                if i in sampled and not sampled[i].finite:
                    raise NumericalError("the model's output for this request is not finite: its state was discarded")
            except NumericalError as failure:
                error = failure
            piece.sequence.computed = piece.end
            results.append(StepResult(piece.sequence, sampled.get(i), error))
        return results


def _score(sequence: Sequence, logits: Tensor, targets: list[int]) -> None:
    """Append the log-probabilities of prompt tokens. Raises `NumericalError`."""
    assert sequence.prompt_logprobs is not None
    sequence.prompt_logprobs += prompt_logprobs(logits, targets, sequence.params.prompt_logprobs or 0)
