"""Runs the model over one batch: tokens in, next tokens out, states updated in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lattice_serve.engine.errors import NumericalError
from lattice_serve.engine.models.lattice import LatticeForCausalLM
from lattice_serve.engine.ops import ServingOps
from lattice_serve.engine.sampler import Sampled, prompt_logprobs, sample
from lattice_serve.engine.scheduler import Piece
from lattice_serve.engine.sequence import Sequence
from lattice_serve.engine.state_pool import StatePool
from lattice_serve.kernels.mixer import Segments


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out for one piece of a batch."""

    sequence: Sequence
    sampled: Sampled | None
    """Where the piece ends in a choice."""
    error: NumericalError | None = None


class Runner:
    def __init__(self, model: LatticeForCausalLM, ops: ServingOps, pool: StatePool, device: str) -> None:
        self.model, self.ops, self.pool, self.device = model, ops, pool, device

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> list[StepResult]:
        """One forward pass over `pieces`, whose sequences hold rows; advances what they have computed and scored."""
        ids: list[int] = []
        segments = []
        for piece in pieces:
            assert piece.sequence.row is not None, "a sequence runs without a state row"
            ids += piece.sequence.tokens(piece.start, piece.end)
            segments.append((piece.sequence.row, piece.start, piece.end - piece.start))
        ragged = Segments.of(segments)
        self.ops.begin(self.pool.memory, ragged)
        hidden = self.model.hidden(torch.tensor(ids, device=self.device), self.ops)
        ends = ragged.starts[1:].tolist()
        sampling = [i for i, piece in enumerate(pieces) if piece.samples]
        sampled: dict[int, Sampled] = {}
        if sampling:
            logits = self._logits(hidden[[ends[i] - 1 for i in sampling]])
            chosen = sample(logits, [pieces[i].sequence.sample_row for i in sampling])
            sampled = dict(zip(sampling, chosen, strict=True))
        results = []
        for i, piece in enumerate(pieces):
            error = None
            try:
                self._score(piece, hidden[ends[i] - (piece.end - piece.start) : ends[i]])
                if i in sampled and not sampled[i].finite:
                    raise NumericalError("the model's output for this request is not finite: its state was discarded")
            except NumericalError as failure:
                error = failure
            piece.sequence.computed = piece.end
            results.append(StepResult(piece.sequence, sampled.get(i), error))
        return results

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.ops.linear(hidden, self.model.head_weight)

    def _score(self, piece: Piece, hidden: Tensor) -> None:
        """Append the log-probabilities of the prompt tokens that follow those of a piece, if they are asked for."""
        sequence = piece.sequence
        if sequence.prompt_logprobs is None:
            return
        targets = list(sequence.prompt_ids[piece.start + 1 : piece.end + 1])
        if targets:
            logits = self._logits(hidden[: len(targets)])
            sequence.prompt_logprobs += prompt_logprobs(logits, targets, sequence.params.prompt_logprobs or 0)
